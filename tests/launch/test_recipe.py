"""A job trains what its recipe's `stage` says: a stage of EchoX or a vocoder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from echox.config.load import resolved
from echox.config.schema import Recipe
from echox.errors import RecipeError
from echox.vocoder.recipe import VoiceRecipe
from launch import paths
from launch.deploy.plan import plan_of
from launch.job.worker import load_object
from launch.recipe import config_files, datasets, load_job, train_function, validated, worker_counts

VOCODER = "launch/vocoders/demo.yaml"


def test_the_recipe_says_what_trains(tmp_path: Path) -> None:
    stage, voice = load_job("demo/s2t", ["seed=3"]), load_job(VOCODER, ["seed=3"])
    assert isinstance(stage, Recipe) and isinstance(voice, VoiceRecipe) and stage.seed == voice.seed == 3
    assert validated(resolved(stage)) == stage and validated(resolved(voice)) == voice
    # What a run's folder holds is submitted again by `echox resume`.
    (tmp_path / "recipe.resolved.yaml").write_text(yaml.safe_dump(resolved(voice), sort_keys=False))
    assert load_job(tmp_path / "recipe.resolved.yaml") == voice


def test_each_is_trained_by_its_own_function_on_its_own_data() -> None:
    stage, voice = load_job("demo/s2t"), load_job(VOCODER, ["data.train=[a,b]", "data.valid=c"])
    functions: list[Callable[..., object]] = [load_object(train_function(recipe)) for recipe in (stage, voice)]
    assert [function.__name__ for function in functions] == ["train", "train_in_job"]
    assert datasets(stage) == ["demo/sqa-train", "demo/asr-train", "demo/sqa-valid"]
    assert datasets(voice) == ["a", "b", "c"]
    assert [file.name for file in config_files(stage)] == ["zero3_cpu.json"] and config_files(voice) == []


def test_a_vocoder_has_workers_and_places_like_a_stage(tmp_path: Path) -> None:
    voice = load_job(VOCODER, ["data.global_batch=12", "data.micro_batch=2", "scaling.workers=[1,6]"])
    assert worker_counts(voice) == (1, 2, 3, 6)
    moved = paths.make_absolute(voice, tmp_path)
    assert moved.storage == str(tmp_path / "runs/demo") and paths.make_absolute(moved, Path("/other")) == moved
    large = plan_of(load_job("launch/vocoders/hifi_gan.yaml"), ["launch/vocoders/hifi_gan.yaml"])
    assert (large.least, large.gpus) == (1, 8) and large.words[-2:] == ("launch.train", "launch/vocoders/hifi_gan.yaml")


def test_the_mistakes_are_those_of_its_kind() -> None:
    with pytest.raises(RecipeError, match=r"data.global_batch=5 is not a multiple of .* = 4 \* 1 = 4"):
        load_job(VOCODER, ["data.global_batch=5"])
    with pytest.raises(RecipeError, match="did you mean"):
        load_job("demo/s2")
