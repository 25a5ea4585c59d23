"""The DeepSpeed JSON: what is filled in, and what is refused that DeepSpeed would swallow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from echox.config.deepspeed import FILLED, OWNED, PASSED, check_file, load_deepspeed
from echox.config.load import load_recipe, recipe_names
from echox.config.paths import project_root, resolve_file
from echox.errors import RecipeError

FILES = sorted((project_root() / "ds_configs").glob("*.json"))
RUN: dict[str, Any] = {"global_batch": 128, "micro_batch": 4, "world_size": 8, "clip": 0.7, "precision": "bf16"}


def write(folder: Path, **config: Any) -> Path:
    file = folder / "ds.json"
    file.write_text(json.dumps(config))
    return file


def refused(file: Path, **run: Any) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_deepspeed(file, **{**RUN, **run})
    return [line.removeprefix("  - ") for line in str(caught.value).splitlines() if line.startswith("  - ")]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_file_of_the_project_is_right_and_complete(file: Path) -> None:
    assert check_file(file) == []
    config = load_deepspeed(file, **RUN)
    assert config["train_batch_size"] == 128
    assert config["train_micro_batch_size_per_gpu"] == 4
    assert config["gradient_accumulation_steps"] == 4
    assert config["gradient_clipping"] == 0.7
    assert config["bf16"]["enabled"] is True
    assert "auto" not in json.dumps(config)
    assert load_deepspeed(file, **{**RUN, "precision": "fp32"})["bf16"]["enabled"] is False


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_deepspeed_reads_them_as_meant(file: Path) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    config = load_deepspeed(file, **RUN)
    # One process here, eight in the run: DeepSpeed multiplies by the ranks it sees.
    seen = DeepSpeedConfig({**config, "train_batch_size": 16})
    assert seen.gradient_clipping == 0.7
    assert seen.zero_optimization_stage == 3
    assert seen.bfloat16_config.enabled
    assert seen.zero_config.param_persistence_threshold == 0
    assert (seen.train_batch_size, seen.train_micro_batch_size_per_gpu, seen.gradient_accumulation_steps) == (16, 4, 4)


@pytest.mark.parametrize("name", recipe_names())
def test_each_recipe_fits_its_file(name: str) -> None:
    recipe = load_recipe(name)
    config = load_deepspeed(
        resolve_file(recipe.engine.deepspeed),
        global_batch=recipe.data.global_batch,
        micro_batch=recipe.data.micro_batch,
        world_size=recipe.scaling.workers,
        clip=recipe.optim.clip,
        precision="fp32",
    )
    per_step = config["gradient_accumulation_steps"] * recipe.data.micro_batch * recipe.scaling.workers
    assert per_step == recipe.data.global_batch


def test_clipping_is_written_even_when_the_file_leaves_it_out(tmp_path: Path) -> None:
    config = load_deepspeed(write(tmp_path, zero_optimization={"stage": 3}), **RUN)
    assert config["gradient_clipping"] == 0.7
    assert config["bf16"] == {"enabled": True}


def test_every_mistake_is_found_at_once(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        gradient_cliping=0.1,
        train_batch_size=64,
        optimizer={"type": "AdamW"},
        bf16={"enabled": False, "check_grad_overflw": True},
        zero_optimization={
            "stage": 3,
            "stage3_prefetch_buket_size": 5,
            "overlap_comm": "auto",
            "reduce_bucket_size": -1,
        },
        aio={"block_sise": 1},
    )
    found = refused(file)
    expected = [
        'gradient_cliping: unknown key, which DeepSpeed would ignore without a word; did you mean "gradient_clipping"?',
        "optimizer: belongs to the recipe (optim)",
        'zero_optimization.overlap_comm="auto": is not filled by anyone',
        'aio.block_sise: unknown key; did you mean "block_size"?',
        "train_batch_size=64: contradicts the recipe, where data.global_batch makes it 128",
        'bf16.check_grad_overflw: unknown key; did you mean "check_grad_overflow"?',
        "bf16.enabled=false: contradicts the precision of this run, bf16",
        'zero_optimization.stage3_prefetch_buket_size: unknown key; did you mean "stage3_prefetch_bucket_size"?',
        "zero_optimization.reduce_bucket_size=-1",
    ]
    assert len(found) == len(expected)
    for start in expected:
        assert sum(line.startswith(start) for line in found) == 1, start


def test_deepspeed_itself_swallows_the_misspelt_key() -> None:
    """Why the top level is checked here; when this fails, the check can go."""
    from deepspeed.runtime.config import DeepSpeedConfig

    assert DeepSpeedConfig({"train_batch_size": 1, "gradient_cliping": 0.1}).gradient_clipping == 1.0


def test_known_keys_are_keys_deepspeed_knows() -> None:
    """A key allowed here that DeepSpeed does not read would be ignored in silence again."""
    import deepspeed

    source = "\n".join(file.read_text() for file in Path(deepspeed.__file__).parent.rglob("*.py"))
    for key in {*FILLED, *PASSED, *OWNED} - {"monitor"}:
        assert f'"{key}"' in source or f"'{key}'" in source, key


@pytest.mark.parametrize(
    ("config", "run", "expected"),
    [
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 3}}, {}, "does not divide the number of ranks"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}, {}, "must be false"),
        ({"zero_optimization": {"stage": 3}}, {"global_batch": 100}, "a global batch of 100 is not a multiple"),
        ({}, {}, "zero_optimization: missing"),
        ({"zero_optimization": 3}, {}, "zero_optimization=3: must be a section"),
        ({"zero_optimization": {"stage": 3}, "bf16": True}, {}, "bf16=true: must be a section"),
        ({"zero_optimization": {"stage": 3}, "data_types": []}, {}, "data_types=[]: must be a section"),
        ({"zero_optimization": {"stage": 7}}, {}, "zero_optimization.stage=7"),
    ],
)
def test_settings_that_cannot_run(tmp_path: Path, config: dict[str, Any], run: dict[str, Any], expected: str) -> None:
    found = refused(write(tmp_path, **config), **run)
    assert len(found) == 1 and expected in found[0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "not valid JSON at line 1"),
        ("[]", "one object"),
        ('{"bf16": {}, "bf16": {}}', 'key "bf16" is given twice'),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path: Path, text: str, expected: str) -> None:
    file = tmp_path / "ds.json"
    file.write_text(text)
    assert any(expected in line for line in refused(file))


def test_a_misspelt_deepspeed_key_is_reported_with_the_recipe(tmp_path: Path) -> None:
    file = write(tmp_path, zero_optimization={"stage": 3}, gradient_cliping=1)
    with pytest.raises(RecipeError) as caught:
        load_recipe("demo/s2t", [f"engine.deepspeed={file}", "optim.step=3"])
    assert "gradient_cliping" in caught.value.what and "optim.step:" in caught.value.what
    assert caught.value.what.startswith("2 mistakes")
