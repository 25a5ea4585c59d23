"""Where the parts of a recipe meet: datasets, unit language, T2C run, Echo run; known, unknown and different units."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from echox.builders import setup
from echox.builders.unit_sets import LANGUAGE, check_units, run_files, with_own_language
from echox.config.load import load_recipe
from echox.config.schema import Recipe
from echox.engine import run_files as engine_files
from echox.engine.checkpoint.manifest import WEIGHTS, write_manifest
from echox.errors import CheckpointError, DataError
from echox.files import sha256_file
from echox.models.compiled import CompiledParts
from echox.speak import pipeline
from echox.stream.format.catalogue import Catalogue
from echox.stream.sampling.source import Source
from echox.stream.storage.remote_index import index_remote
from echox.units.identity import RECORD, UnitSetIdentity, write_unit_set
from echox.units.language import UnitLanguage
from tests.stream.datasets import make_dataset
from tests.stream.http_server import serve

A = UnitSetIdentity(features="hubert", model="mhubert", layer=11, clusters=500, weights="aa", centroids="bb")
NAMED = replace(A, weights="", centroids="")
B = replace(A, centroids="cc")


@pytest.fixture(autouse=True)
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ECHOX_CACHE", str(tmp_path))
    for seed, name in enumerate(("one", "two", "held")):
        make_dataset(tmp_path / "data" / name, 6, per_shard=3, seed=seed, task="sqa")
    return tmp_path / "data"


def language_file(path: Path, unit_set: UnitSetIdentity | None, seed: int = 0) -> UnitLanguage:
    random = np.random.default_rng(seed)
    sequences = [random.integers(0, 500, 60) for _ in range(20)]
    language = UnitLanguage.fit(sequences, 500, vocab_size=510, unit_set=unit_set)
    language.save(path)
    return language


def recipe(stage: str = "t2c", *more: str) -> Recipe:
    task = "tts" if stage == "t2c" else "sqa"
    train, valid = (
        ", ".join(f"{{path: {name}, task: {task}}}" for name in part) for part in (("one", "two"), ("held",))
    )
    overrides = ["model.random_init=true", "model.t2c.unit_language=language.json"]
    return load_recipe(f"3b/{stage}", [*overrides, f"data.train=[{train}]", f"data.valid=[{valid}]", *more])


def sources(data: Path) -> list[Source]:
    return [Source(name, "tts", Catalogue.open(data / name)) for name in ("one", "two", "held")]


def record(data: Path, **found: UnitSetIdentity | None) -> None:
    for name, unit_set in found.items():
        write_unit_set(data / name, unit_set)


def check(data: Path, unit_set: UnitSetIdentity | None, *, quiet: bool = False) -> None:
    language = language_file(data / "language.json", unit_set)
    check_units(recipe(), sources(data), language, quiet=quiet)


def test_datasets_and_language_of_one_unit_set_pass_in_silence(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(data, one=A, two=NAMED, held=A)
    check(data, A)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("found", "language", "names"),
    [
        ({"one": A, "two": B}, None, ("dataset one", "dataset two")),
        ({"one": A, "two": A, "held": replace(NAMED, layer=9)}, None, ("dataset one", "dataset held")),
        ({"one": A, "two": A, "held": A}, B, ("dataset one", "the unit language ")),
        ({"held": A}, B, ("dataset held", "the unit language ")),
    ],
)
def test_two_unit_sets_in_one_recipe_are_an_error(
    data: Path, found: dict[str, UnitSetIdentity], language: UnitSetIdentity | None, names: tuple[str, str]
) -> None:
    record(data, **found)
    with pytest.raises(DataError) as caught:
        check(data, language, quiet=True)
    assert caught.value.exit_code == 4
    said = caught.value.what
    assert all(name in said for name in names) and str(A) in said and "echox shards build --units" in caught.value.fix


def test_unknown_units_are_one_line_of_one_rank(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(data, one=A)
    check(data, A)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "which units dataset two and dataset held has" in said and str(A) in said
    check(data, A, quiet=True)
    assert capsys.readouterr().err == ""


def test_annotated_labels_of_stage_three_are_of_the_unit_set_of_the_language(data: Path) -> None:
    record(data, one=B, two=A, held=A)
    language = language_file(data / "language.json", A)
    asked = [Source(name, task, Catalogue.open(data / name)) for name, task in (("one", "sqa"), ("two", "asr"))]
    labels = "model.echo.labels=annotated", "model.echo.pseudo_text=reference", "model.echo.segmentation.mode=none"
    check_units(recipe("echo", "init.t2c=null"), asked, language)
    with pytest.raises(DataError, match="dataset one.*language.json"):
        check_units(recipe("echo", "init.t2c=null", *labels), asked, language)
    record(data, one=A, two=B)
    check_units(recipe("echo", "init.t2c=null", *labels), asked, language)


def test_the_record_of_a_remote_dataset_is_fetched(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record(data, one=A, two=B)
    with serve(data / "two") as server:
        far = Source(server.url, "tts", Catalogue.open(data / "two"))
        far = replace(far, catalogue=SimpleNamespace(location=server.url))  # type: ignore[arg-type]
        near = sources(data)[0]
        with pytest.raises(DataError, match="differ in centroids"):
            check_units(recipe(), [near, far], None)
        (data / "two" / RECORD).unlink()
        check_units(recipe(), [near, far], None)
        assert f"which units dataset {server.url} has" in capsys.readouterr().err
        # Shards elsewhere, catalogue here: the record of either place counts.
        index_remote(f"{server.url}/shard-{{000000..000001}}.tar", data / "index")
        local = Source("index", "tts", Catalogue.open(data / "index"))
        for folder in ("two", "index"):
            write_unit_set(data / folder, B)
            with pytest.raises(DataError, match="differ in centroids"):
                check_units(recipe(), [near, local], None)
            write_unit_set(data / folder, None)


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The setup without its networks; what was built."""
    found: list[str] = []

    def build_stage(recipe: Recipe, text: Any, **_: Any) -> torch.nn.Module:
        found.append(recipe.stage)
        return torch.nn.Linear(1, 1)

    monkeypatch.setattr(setup, "build_stage", build_stage)
    yield found


def test_the_setup_checks_before_any_model_is_loaded_and_keeps_the_language(data: Path, built: list[str]) -> None:
    record(data, one=A, two=A, held=A)
    language = language_file(data / "language.json", A)
    made = setup.build_setup(recipe(), 0, 1)
    made.train_loader.close()
    file = made.files[LANGUAGE]
    assert built == ["t2c"]
    assert (file.path, file.sha256, file.about["unit_set"]["centroids"]) == (
        data / "language.json",
        language.sha256,
        "bb",
    )
    record(data, two=B)
    with pytest.raises(DataError, match="unit sets that differ in centroids"):
        setup.build_setup(recipe(), 1, 2)
    assert built == ["t2c"]


def test_the_setup_compiles_where_the_recipe_asks_and_says_how_much(
    data: Path, built: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    language_file(data / "language.json", None)
    given: list[Any] = []
    monkeypatch.setattr(setup, "compile_pointwise", lambda module: given.append(module) or CompiledParts(3, 4))
    for asked, counts in (("false", {}), ("true", {"rotary": 3, "gated": 4})):
        made = setup.build_setup(recipe("t2c", f"engine.compile={asked}"), 0, 1)
        made.train_loader.close()
        assert made.compiled == counts
    assert given == [made.module]


def checkpoint(tmp_path: Path, kept: Recipe, language: UnitLanguage | None, name: str = "run") -> Path:
    """A checkpoint as a run leaves it, with its unit language beside it; without any as older ones."""
    folder = tmp_path / name / "checkpoints" / "step-00000002"
    folder.mkdir(parents=True)
    (folder / WEIGHTS).write_bytes(b"weights")
    contents: Any = {"stage": kept.stage, "recipe": kept.model_dump(mode="json")}
    if language is not None:
        files = run_files(kept, language)
        contents["run_files"] = engine_files.describe(files)
        engine_files.store(files, tmp_path / name)
    files_of = {WEIGHTS: {"bytes": 7, "sha256": sha256_file(folder / WEIGHTS)}}
    write_manifest(folder, contents, files_of)  # type: ignore[arg-type]
    return folder


def echo(run: Path) -> Recipe:
    return recipe("echo", f"init.t2c={run}", "init.s2t=null")


def test_an_echo_recipe_needs_the_unit_language_of_its_t2c_run(
    data: Path, tmp_path: Path, built: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    place = data / "language.json"
    first = language_file(place, A)
    folder = checkpoint(tmp_path, recipe(), first)
    check_units(echo(folder.parent.parent), [], first)
    check_units(echo(folder), [], first)
    # Fitted again on the same units: ids are others although the unit set is the same.
    second = language_file(place, A, seed=1)
    with pytest.raises(CheckpointError) as caught:
        setup.build_setup(echo(folder.parent.parent), 0, 1)
    assert caught.value.exit_code == 5 and built == []
    said = caught.value.what
    assert all(part in said for part in (str(place), str(folder), second.sha256[:8], first.sha256[:8], str(A)))
    copy = tmp_path / "run" / LANGUAGE
    assert f"model.t2c.unit_language={copy}" in caught.value.fix
    check_units(recipe("echo", f"init.t2c={folder}", f"model.t2c.unit_language={copy}"), [], UnitLanguage.load(copy))
    other = language_file(place, B, seed=1)
    with pytest.raises(CheckpointError, match=f"words of {B}".replace("(", r"\(").replace(")", r"\)")):
        check_units(echo(folder), [], other)
    assert capsys.readouterr().err == ""


def test_an_older_t2c_run_is_one_line(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = checkpoint(tmp_path, recipe(), None)
    check_units(echo(folder), [], language_file(data / "language.json", A))
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"{folder} does not record its unit language" in said


def test_a_language_that_says_only_more_of_its_units_is_the_same(data: Path, tmp_path: Path) -> None:
    place = data / "language.json"
    folder = checkpoint(tmp_path, recipe(), language_file(place, None))
    check_units(echo(folder), [], language_file(place, A))


def test_stages_without_units_have_nothing_to_check(data: Path) -> None:
    record(data, one=A, two=B)
    language = language_file(data / "language.json", B)
    check_units(recipe("echo", "init.t2c=null", "init.s2t=null"), sources(data), language)
    s2t = load_recipe("3b/s2t", ["model.random_init=true"])
    check_units(s2t, sources(data), None)
    assert run_files(s2t, language) == run_files(recipe(), None) == {}


class Loaded(Exception):
    """Stands for the networks, which no test needs."""


def test_a_run_speaks_with_the_unit_language_that_it_keeps(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = data / "language.json"
    kept = language_file(place, A)
    spoken = recipe("echo", "init.t2c=null", "init.s2t=null")
    folder = checkpoint(tmp_path, spoken, kept)
    old = checkpoint(tmp_path, spoken, None, "old")
    used: list[str] = []

    def build_stage(recipe: Recipe, text: Any) -> Any:
        used.append(text.language.sha256)
        raise Loaded

    monkeypatch.setattr(pipeline, "build_stage", build_stage)

    def load(run: Path) -> str:
        with pytest.raises(Loaded):
            pipeline.SpeechToSpeech.load(run)
        return used.pop()

    refitted = language_file(place, A, seed=1)
    assert load(tmp_path / "run") == load(folder) == kept.sha256 != refitted.sha256
    assert capsys.readouterr().err == ""
    assert load(old) == refitted.sha256
    assert "does not record its unit language" in capsys.readouterr().err
    # Without its copy, only the very same language will do.
    shutil.move(tmp_path / "run" / LANGUAGE, tmp_path / "aside.json")
    with pytest.raises(CheckpointError, match="is not the one that"):
        pipeline.SpeechToSpeech.load(folder)
    shutil.copy(tmp_path / "aside.json", place)
    assert load(folder) == kept.sha256
    refitted.save(tmp_path / "run" / LANGUAGE)
    with pytest.raises(CheckpointError, match="is not the one that"):
        pipeline.SpeechToSpeech.load(folder)


def test_a_checkpoint_that_left_its_run_has_no_language_beside_it(data: Path, tmp_path: Path) -> None:
    spoken = recipe("echo", "init.t2c=null", "init.s2t=null")
    folder = checkpoint(tmp_path, spoken, language_file(data / "language.json", A))
    shutil.copytree(folder, tmp_path / "elsewhere" / "best")
    language_file(tmp_path / LANGUAGE, A, seed=3)
    assert with_own_language(spoken, tmp_path / "elsewhere" / "best") == spoken
    own = with_own_language(spoken, folder).model.t2c
    assert own is not None and own.unit_language == str(tmp_path / "run" / LANGUAGE)
    assert json.loads(Path(own.unit_language).read_text())["unit_set"]["centroids"] == "bb"
