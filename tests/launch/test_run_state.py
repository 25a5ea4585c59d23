from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from echox.config.load import load_recipe, resolved
from echox.config.schema import Recipe
from echox.vocoder.recipe import VoiceRecipe, load_voice
from launch import paths, run_state


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ECHOX_CACHE", str(tmp_path / "cache"))
    index = tmp_path / "cache" / "data" / "demo" / "sqa-train" / "dataset.json"
    index.parent.mkdir(parents=True)
    index.write_text("{}")
    _date(index, -100)
    return tmp_path / "cache"


def _date(path: Path, seconds: float) -> None:
    moment = time.time() + seconds
    os.utime(path, (moment, moment))


def recipe(tmp_path: Path, stage: str = "echo", *overrides: str) -> Recipe:
    short = ["optim.steps=20", "optim.warmup_steps=1", "model.echo.denoising.align_steps=0", "storage=runs"]
    return paths.make_absolute(load_recipe(f"demo/{stage}", [*short, *overrides]), tmp_path)


def trained(recipe: Recipe, step: int, age: float) -> Path:
    path = Path(recipe.storage) / recipe.name / "checkpoints" / f"step-{step:08d}" / "manifest.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"step": step, "recipe": resolved(recipe)}))
    _date(path, -age)
    return path


def test_a_run_is_reused_continued_or_replaced(tmp_path: Path, cache: Path) -> None:
    echo = recipe(tmp_path)
    assert run_state.run_state(echo)[0] == "none"
    trained(echo, 8, age=50)
    assert run_state.run_state(echo) == ("partial", "continues at step 8 of 20")
    trained(echo, 20, age=40)
    assert run_state.run_state(echo)[0] == "done"
    assert run_state.run_state(recipe(tmp_path, "echo", "engine.log_every=5"))[0] == "done"
    assert run_state.run_state(recipe(tmp_path, "echo", "optim.lr.echo=0.5")) == ("stale", "the recipe changed")


def test_a_finished_stage_is_kept_where_only_free_keys_changed(tmp_path: Path, cache: Path) -> None:
    trained(recipe(tmp_path), 20, age=40)
    for override in ("health.spike_sigma=6", "scaling.workers=1", "data.micro_batch=4", "engine.async_save=false"):
        assert run_state.run_state(recipe(tmp_path, "echo", override))[0] == "done", override
    for override in ("optim.lr.lora=0.5", "optim.lr.echo=0.5", "seed=18", "model.ctc.weight=0.4"):
        assert run_state.run_state(recipe(tmp_path, "echo", override)) == ("stale", "the recipe changed"), override


def test_newer_inputs_make_a_run_stale(tmp_path: Path, cache: Path) -> None:
    echo = recipe(tmp_path, "echo", "init.s2t=runs/demo-s2t", "init.t2c=runs/demo-t2c")
    trained(echo, 20, age=40)
    trained(recipe(tmp_path, "t2c"), 20, age=60)
    assert run_state.run_state(echo)[0] == "done"
    upstream = recipe(tmp_path, "s2t", "model.ctc.align_steps=1")
    trained(upstream, 20, age=30)
    assert run_state.run_state(echo) == ("stale", "demo-s2t was trained again")
    run_state.set_aside(upstream)
    assert run_state.run_state(echo)[0] == "done"
    _date(cache / "data" / "demo" / "sqa-train" / "dataset.json", -5)
    assert run_state.run_state(echo) == ("stale", "demo/sqa-train was built again")


def test_setting_aside_keeps_the_run(tmp_path: Path, cache: Path) -> None:
    echo = recipe(tmp_path)
    assert run_state.set_aside(echo) is None
    manifest = trained(echo, 20, age=1)
    aside = run_state.set_aside(echo)
    assert aside is not None and (aside / "checkpoints" / "step-00000020" / "manifest.json").exists()
    assert not manifest.exists()


def test_an_unreadable_manifest_is_stale_not_a_crash(tmp_path: Path, cache: Path) -> None:
    echo = recipe(tmp_path)
    trained(echo, 20, age=1).write_text('{"step": 20, "recipe": {"na')
    assert run_state.run_state(echo)[0] == "stale"


def voice(tmp_path: Path, *overrides: str) -> VoiceRecipe:
    data = ["data.train=[demo/sqa-train]", "data.valid=null", "optim.steps=20", f"storage={tmp_path / 'runs'}"]
    return load_voice("demo", [*data, *overrides])


def spoken(recipe: VoiceRecipe, step: int, age: float) -> None:
    path = Path(recipe.storage) / recipe.name / "checkpoints" / f"step-{step:08d}" / "manifest.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"step": step, "recipe": resolved(recipe)}))
    _date(path, -age)


def test_a_vocoder_is_reused_continued_or_replaced_like_a_stage(tmp_path: Path, cache: Path) -> None:
    assert run_state.run_state(voice(tmp_path))[0] == "none"
    spoken(voice(tmp_path), 8, age=50)
    assert run_state.run_state(voice(tmp_path)) == ("partial", "continues at step 8 of 20")
    spoken(voice(tmp_path), 20, age=40)
    for free in ("log_every=5", "data.micro_batch=2", "optim.steps=19"):
        assert run_state.run_state(voice(tmp_path, free))[0] == "done", free
    assert run_state.run_state(voice(tmp_path, "optim.steps=30"))[0] == "partial", "it goes on with more"
    for other in ("optim.lr=0.5", "seed=18", "generator.embedding=16"):
        assert run_state.run_state(voice(tmp_path, other)) == ("stale", "the recipe changed"), other
    _date(cache / "data" / "demo" / "sqa-train" / "dataset.json", -5)
    assert run_state.run_state(voice(tmp_path)) == ("stale", "demo/sqa-train was built again")
    aside = run_state.set_aside(voice(tmp_path))
    assert aside is not None and (aside / "checkpoints" / "step-00000020" / "manifest.json").is_file()
    assert run_state.run_state(voice(tmp_path))[0] == "none"
