"""Where models, datasets and files are looked for, and what is said when they are not there."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from echox.config.paths import (
    KNOWN_MODELS,
    cache_dir,
    project_root,
    resolve_data,
    resolve_data_file,
    resolve_file,
    resolve_model,
)
from echox.errors import DataError, MissingModelError


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ECHOX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def model(folder: Path, *files: str) -> Path:
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    return folder


def test_the_cache_is_in_the_home_folder_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ECHOX_CACHE", raising=False)
    assert cache_dir() == Path.home() / ".cache" / "echox"


def test_a_model_is_found_by_folder_and_by_name(cache: Path, tmp_path: Path) -> None:
    here = model(tmp_path / "mine", "config.json", "model.safetensors")
    assert resolve_model(str(here)) == here
    named = model(cache / "models" / "org" / "name", "config.json", "pytorch_model.bin")
    assert resolve_model("org/name") == named


def test_a_voice_is_one_onnx_file(cache: Path) -> None:
    folder = model(cache / "models" / "rhasspy" / "voice", "voice.onnx", "voice.onnx.json")
    assert resolve_model("rhasspy/voice") == folder


@pytest.mark.parametrize("ref", list(KNOWN_MODELS))
def test_an_absent_large_model_says_which_files_and_how(cache: Path, ref: str) -> None:
    with pytest.raises(MissingModelError) as caught:
        resolve_model(ref)
    command = next(part for part in caught.value.fix.split("`") if part.startswith("hf download"))
    words = shlex.split(command)
    assert words[2] == ref
    assert words[words.index("--local-dir") + 1] == f"$ECHOX_CACHE/models/{ref}"
    assert {"config.json", "tokenizer.json"} <= set(words)
    assert any(word.endswith(".safetensors") for word in words)
    assert ("licence" in caught.value.fix) == ref.startswith("meta-llama")
    assert caught.value.exit_code == 3


def test_an_absent_demo_model_points_to_the_demo(cache: Path) -> None:
    with pytest.raises(MissingModelError, match="make demo"):
        resolve_model("openai/whisper-base")


def test_a_missing_weight_shard_is_named(cache: Path) -> None:
    folder = model(cache / "models" / "org" / "big", "config.json", "model-00001-of-00002.safetensors")
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(MissingModelError, match=r"model-00002-of-00002\.safetensors is missing"):
        resolve_model("org/big")
    assert resolve_model("org/big", weights=False) == folder


def test_a_folder_without_weights_does_for_random_weights_only(cache: Path) -> None:
    folder = model(cache / "models" / "org" / "shape", "config.json", "tokenizer.json")
    assert resolve_model("org/shape", weights=False) == folder
    with pytest.raises(MissingModelError, match=r"model\.safetensors"):
        resolve_model("org/shape")


def test_an_empty_folder_is_no_model(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingModelError, match="every file"):
        resolve_model(str(tmp_path / "empty"))


def test_data_is_found_by_path_and_by_name(cache: Path, tmp_path: Path) -> None:
    (cache / "data" / "demo" / "units").mkdir(parents=True)
    (cache / "data" / "demo" / "units" / "unit_language.json").write_text("{}")
    assert resolve_data("demo/units") == cache / "data" / "demo" / "units"
    assert resolve_data(str(tmp_path)) == tmp_path
    file = cache / "data" / "demo" / "units" / "unit_language.json"
    assert resolve_data_file("demo/units/unit_language.json") == file
    with pytest.raises(DataError, match="shards build demo"):
        resolve_data("demo/absent")
    with pytest.raises(DataError):
        resolve_data_file("demo/units")


def test_relative_files_start_here_then_at_the_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve_file("ds_configs/zero3_cpu.json") == project_root() / "ds_configs" / "zero3_cpu.json"
    model(tmp_path / "ds_configs", "zero3_cpu.json")
    assert resolve_file("ds_configs/zero3_cpu.json").resolve() == tmp_path / "ds_configs" / "zero3_cpu.json"
    assert not resolve_file("ds_configs/none.json").exists()
