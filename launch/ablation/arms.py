"""Lists the arms of an ablation: what each changes in the recipes and asks, and the sign that the paper implies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from echox.config.load import load_recipe
from echox.config.mistakes import did_you_mean
from echox.errors import RecipeError

Sign = Literal["+", "-", "0"]
BASE, CASCADE = "echo", "cascade"


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One variant.

    Attributes:
        name: of its runs and its row.
        asks: what it is for, for readers.
        changes: `key=value` overrides of Stage III.
        decoder: `key=value` overrides of Stages II and III alike; its T2C decoder is then trained anew.
        paper: sign that the paper's claims give to this arm minus the base; None where they say nothing of it.
        claim: the claim, or why there is none.
        annotated: it learns units of recorded answers, which the questions' dataset has to get first.
        trained: it has runs of its own; the cascade is a score of the base arm's.
        aligned: it has the base arm's steps in which the Denoising Adapter alone learns; else only those after them.
    """

    name: str
    asks: str
    changes: tuple[str, ...] = ()
    decoder: tuple[str, ...] = ()
    paper: Sign | None = None
    claim: str
    annotated: bool = False
    trained: bool = True
    aligned: bool = True

    @property
    def overrides(self) -> tuple[str, ...]:
        """All that Stage III has otherwise than in the base arm."""
        return (*self.decoder, *self.changes)


ARMS = (
    Arm(
        name=BASE,
        asks="the method: the teacher speaks the LLM's own answer, and Echo learns to say it from hidden states",
        claim="what the other arms are compared with",
    ),
    Arm(
        name="annotated",
        asks="learns units of the recorded reference answer, whole, and no pseudo labels; compare with no-segments too",
        changes=(
            "model.echo.labels=annotated",
            "model.echo.pseudo_text=reference",
            "model.echo.segmentation.mode=none",
        ),
        paper="-",
        claim="annotated speech widens the gap between meaning and sound that pseudo labels of the own text close",
        annotated=True,
    ),
    Arm(
        name=CASCADE,
        asks="no training: the frozen teacher speaks the text that the base arm has written",
        claim="none of a sign: the cascade is what Echo's labels come from, and what its speech is measured by",
        trained=False,
    ),
    Arm(
        name="teacher-forced",
        asks="the teacher speaks the LLM's most probable token after each beginning of the reference",
        changes=("model.echo.pseudo_text=argmax_teacher_forced",),
        claim="none: it is the other reading of the paper's pseudo text, which does not compare the two",
    ),
    Arm(
        name="reference",
        asks="the teacher speaks the data's answer, not the LLM's own",
        changes=("model.echo.pseudo_text=reference",),
        paper="-",
        claim="labels come from the model's own text, so that they say what its hidden states hold",
    ),
    Arm(
        name="no-denoising",
        asks="nothing draws the adapter's output to the text embeddings; as many steps that train the Echo decoder",
        changes=(
            "model.echo.denoising.weighting=fixed",
            "model.echo.denoising.weight=0",
            "model.echo.denoising.align_steps=0",
        ),
        aligned=False,
        paper="-",
        claim="the denoising loss (Eq. 2) helps the Echo decoder, which starts as a reader of text embeddings",
    ),
    Arm(
        name="raw-embeddings",
        asks="T2C, Echo and denoising loss on the LLM's text embeddings as they are",
        decoder=("model.t2c.text_embeddings=raw",),
        claim="none: the paper has no other form",
    ),
    Arm(
        name="centred",
        asks="T2C, Echo and denoising loss on text embeddings without their mean and of equal variance",
        decoder=("model.t2c.text_embeddings=centred",),
        claim="none: the paper has no such form",
    ),
    Arm(
        name="no-segments",
        asks="one segment an answer, in training as when speaking",
        changes=("model.echo.segmentation.mode=none",),
        paper="-",
        claim="cutting as when streaming helps a small decoder, which long sequences are hard for (3B)",
    ),
)


def arms_of(scale: str) -> tuple[Arm, ...]:
    """The arms that differ from the base recipe of a scale, the base first."""
    base = load_recipe(f"{scale}/echo")
    return tuple(arm for arm in ARMS if not arm.overrides or load_recipe(f"{scale}/echo", arm.overrides) != base)


def chosen(scale: str, names: Sequence[str]) -> tuple[Arm, ...]:
    """Arms by name, the base always among them; all arms of the scale where none is named.

    Raises:
        RecipeError: there is no such arm, or at this scale it is the base.
    """
    known = arms_of(scale)
    for name in names:
        if name in {arm.name for arm in ARMS} - {arm.name for arm in known}:
            raise RecipeError(
                f"arm {name} is what the recipes of scale {scale} have", fix=f"leave it out: it is {BASE}"
            )
        if name not in {arm.name for arm in known}:
            raise RecipeError(
                f"there is no arm {name}", fix=did_you_mean(name, [arm.name for arm in known], noun="arms")
            )
    return tuple(arm for arm in known if not names or arm.name in (BASE, *names))
