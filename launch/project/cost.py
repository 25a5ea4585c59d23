"""Predicts what the stages of a project cost on its GPUs, by the code of `echox plan`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from echox.errors import EchoXError

if TYPE_CHECKING:
    from echox.bench.plan.load import Sample
    from echox.config.schema import Recipe
    from launch.project.look import Recordings

CHARACTERS_PER_TOKEN = 4.0
"""Of English text, about; nothing is tokenised for a forecast."""


def sample_of(found: Recordings) -> Sample:
    """Lengths of a sample, from the mean of what was found; what is not known is as `echox plan` assumes it."""
    from echox.bench.plan.load import Sample

    usual = Sample()
    heard, answered = found.count - found.silent, found.count - found.unanswered
    seconds = found.hours * 3600 / heard if heard and found.hours else usual.question_s
    reply = found.characters / answered / CHARACTERS_PER_TOKEN if answered and found.characters else usual.reply
    return Sample(question_s=round(seconds, 2), reply=max(1, round(reply)))


def costs(
    recipes: Mapping[str, Recipe], hardware: str, gpus: int, voice: Recordings, questions: Recordings | None
) -> Iterator[str]:
    """What the stages cost on GPUs, and what to change where they do not fit; a line each.

    Args:
        recipes: by stage.
        hardware: kind of GPU, as `echox plan` names it.
        gpus: of the cluster.
        voice, questions: what they are trained on.
    """
    from echox.bench.plan.forecast import forecast
    from echox.engine.hardware import GPUS

    read, asked = sample_of(voice), sample_of(questions or voice)
    hours: dict[str, float] = {}
    for stage, recipe in recipes.items():
        try:
            found = forecast(recipe, GPUS[hardware], hardware, gpus, sample=read if stage == "t2c" else asked)
        except EchoXError as error:
            yield f"hours of {stage} on {gpus} x {hardware} cannot be predicted: {error.what}"
            continue
        hours[stage] = found.steps * found.step_s / 3600
        yield from (f"{stage} on {hardware}: {advice}" for advice in found.advice)
    if hours:
        each = ", ".join(f"{stage} {taken:.2f} h" for stage, taken in hours.items())
        total = gpus * sum(hours.values())
        yield (
            f"to expect on {gpus} x {hardware}: {each}, {total:.2f} GPU hours in all, as `echox plan` predicts them "
            "(not measured); the vocoder and the answers that Stage III learns from come on top"
        )
