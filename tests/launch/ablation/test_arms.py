"""Arms of an ablation: their recipes are right, and differ from the base in nothing but what the arm is about."""

from __future__ import annotations

from pathlib import Path

import pytest

from echox.config.load import leaves, load_recipe, resolved
from echox.config.schema import Recipe
from echox.errors import RecipeError
from launch.ablation.arms import ARMS, BASE, Arm, arms_of, chosen
from launch.ablation.runs import Ablation

SCALES = ("demo", "small")
KEYS = {
    "annotated": {"model.echo.labels", "model.echo.pseudo_text", "model.echo.segmentation.mode"},
    "teacher-forced": {"model.echo.pseudo_text"},
    "reference": {"model.echo.pseudo_text"},
    "no-denoising": {"optim.steps", *(f"model.echo.denoising.{key}" for key in ("weighting", "weight", "align_steps"))},
    "raw-embeddings": {"model.t2c.text_embeddings"},
    "no-segments": {"model.echo.segmentation.mode"},
}
OF_A_RUN = {"name", "storage", "tracking.parent_run", "tracking.uri"}


def different(one: Recipe, other: Recipe) -> set[str]:
    first, second = dict(leaves(resolved(one))), dict(leaves(resolved(other)))
    return {key for key in first.keys() | second.keys() if first.get(key) != second.get(key)}


def ablation(scale: str, folder: Path, *overrides: str) -> Ablation:
    return Ablation(scale=scale, storage=folder / scale, corpus=folder / "corpus", overrides=overrides)


def trained(scale: str) -> list[Arm]:
    return [arm for arm in arms_of(scale) if arm.trained]


@pytest.mark.parametrize("scale", SCALES)
def test_an_arm_changes_the_keys_that_it_names_and_no_other(scale: str, tmp_path: Path) -> None:
    runs = ablation(scale, tmp_path)
    base = load_recipe(f"{scale}/echo", runs.echo(ARMS[0], 17))
    assert different(base, load_recipe(f"{scale}/echo")) == {*OF_A_RUN, "init.s2t", "init.t2c"}
    for arm in trained(scale)[1:]:
        recipe = load_recipe(f"{scale}/echo", runs.echo(arm, 17))
        wanted = KEYS[arm.name] | {"name"} | ({"init.t2c"} if arm.decoder else set())
        assert different(base, recipe) == wanted, arm.name
        assert (recipe.name, recipe.seed) == (f"{arm.name}-s17", 17)
        assert (recipe.tracking.parent_run, recipe.tracking.uri) == (
            f"ablation-{scale}",
            f"sqlite:///{tmp_path / scale / 'mlflow.db'}",
        )


@pytest.mark.parametrize("scale", SCALES)
def test_without_denoising_loss_as_many_steps_train_the_echo_decoder(scale: str, tmp_path: Path) -> None:
    (arm,) = [arm for arm in ARMS if not arm.aligned]
    for runs in (ablation(scale, tmp_path), ablation(scale, tmp_path, "echo.optim.steps=991")):
        base, without = (load_recipe(f"{scale}/echo", runs.echo(each, 17)) for each in (ARMS[0], arm))
        assert without.model.echo.denoising.align_steps == 0 < base.model.echo.denoising.align_steps
        assert without.optim.steps == base.optim.steps - base.model.echo.denoising.align_steps


@pytest.mark.parametrize("scale", SCALES)
def test_an_arm_with_another_decoder_trains_it_alike_in_both_stages(scale: str, tmp_path: Path) -> None:
    runs, (arm,) = ablation(scale, tmp_path), [arm for arm in trained(scale) if arm.decoder]
    decoder, echo = (
        load_recipe(f"{scale}/{stage}", words(arm, 18)) for stage, words in (("t2c", runs.decoder), ("echo", runs.echo))
    )
    assert different(load_recipe(f"{scale}/t2c"), decoder) == {*OF_A_RUN, "seed", "model.t2c.text_embeddings"}
    assert decoder.model.t2c == echo.model.t2c and (decoder.seed, echo.seed) == (18, 18)
    assert echo.init.t2c == f"{decoder.storage}/{decoder.name}"
    assert echo.init.s2t == str(tmp_path / scale / f"{scale}-s2t")


@pytest.mark.parametrize("scale", SCALES)
def test_the_base_is_the_method_of_the_paper(scale: str) -> None:
    echo = load_recipe(f"{scale}/echo").model.echo
    assert (echo.pseudo_text, echo.labels, echo.segmentation.mode) == ("generated", "teacher", "trigger")
    assert echo.denoising.weighting == "dynamic_cap"


def test_an_arm_that_is_the_base_at_a_scale_is_left_out() -> None:
    for scale in SCALES:
        names = [arm.name for arm in arms_of(scale)]
        own = load_recipe(f"{scale}/t2c").model.t2c
        assert own is not None
        assert names[0] == BASE and ("centred" in names) == (own.text_embeddings == "raw") != (
            "raw-embeddings" in names
        )
        assert len(names) == len(ARMS) - 1
    with pytest.raises(RecipeError, match="arm centred is what the recipes of scale demo have"):
        chosen("demo", ["centred"])


def test_arms_are_chosen_by_name_and_the_base_is_always_among_them() -> None:
    assert [arm.name for arm in chosen("demo", ["reference", "annotated"])] == [BASE, "annotated", "reference"]
    assert chosen("demo", []) == arms_of("demo")
    with pytest.raises(RecipeError, match='did you mean "reference"'):
        chosen("demo", ["referense"])


def test_overrides_are_for_all_stages_or_for_the_one_they_name(tmp_path: Path) -> None:
    runs = ablation(
        "demo", tmp_path, "echo.optim.steps=299", "scaling.workers=1", "seed=5", "tracking.uri=http://mlflow:5000"
    )
    echo, s2t = load_recipe("demo/echo", runs.echo(ARMS[0], 5)), load_recipe("demo/s2t", runs.shared("s2t"))
    assert (echo.optim.steps, s2t.optim.steps) == (299, load_recipe("demo/s2t").optim.steps)
    assert echo.scaling.workers == s2t.scaling.workers == 1
    assert runs.seeds(3) == [5, 6, 7]
    assert echo.tracking.uri == "http://mlflow:5000"


def test_every_sign_of_the_paper_has_its_claim() -> None:
    for arm in ARMS[1:]:
        assert (arm.paper is None) == arm.claim.startswith("none"), arm.name
