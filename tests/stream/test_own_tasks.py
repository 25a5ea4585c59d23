"""Datasets whose samples have tasks of their own: a recipe's task takes those that serve it, and no others."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from echox.audio.io import encode_flac
from echox.builders.data import build_plan, open_sources, transcripts, valid_readers
from echox.config.load import load_recipe
from echox.errors import DataError
from echox.stream.collate import Item
from echox.stream.format.catalogue import CATALOGUE_NAME, DATASET_NAME, Catalogue
from echox.stream.format.indexing import index_folder
from echox.stream.sampling.source import Source
from echox.stream.storage.store import ShardStore
from tests.shards.layouts import build as build_corpus
from tests.shards.layouts import clip, encoded, put, put_lines
from tests.stream.datasets import write_shards

TASKS = ("asr", "sqa", "tts", None)
SERVED = {"asr": ("asr", "sqa", None), "sqa": ("sqa", None), "tts": ("tts", "sqa", None)}
SOUND = encode_flac(np.full(2000, 0.1, np.float32))


def sample(number: int) -> dict[str, Any]:
    task = TASKS[number * 7 % 4]
    meta = {"id": f"s{number}", "question_text": "ab", "answer_text": "c", "question_s": 0.1 + number % 5}
    members: dict[str, Any] = {"__key__": f"k{number:03d}", "json": meta | ({"task": task} if task else {})}
    if task != "tts":
        members["question.flac"] = SOUND
    if task != "asr" and number % 5:  # some have no units
        members["answer.units"] = b"\1\0\2\0"
    return members


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixed") / "set"
    write_shards(folder, map(sample, range(60)), 7, optional=("question.flac", "answer.units"))
    return folder


def serving(task: str) -> list[int]:
    """By looking at every sample."""
    wanted = "answer.units" if task == "tts" else "question.flac"
    found = [(number, sample(number)) for number in range(60)]
    return [number for number, each in found if each["json"].get("task") in SERVED[task] and wanted in each]


def recipe(folder: Path, task: str, stage: str, **source: Any) -> Any:
    data = json.dumps([{"path": str(folder), "task": task, **source}])
    return load_recipe(f"3b/{stage}", ["model.random_init=true", f"data.train={data}", "data.global_batch=4",
                                       "data.micro_batch=2", "scaling.workers=2"])  # fmt: skip


@pytest.mark.parametrize(("task", "stage"), [("asr", "s2t"), ("sqa", "s2t"), ("tts", "t2c")])
@pytest.mark.parametrize("mixing", [{}, {"repeat": 2}, {"weight": 1.0}])
def test_an_epoch_is_of_the_samples_that_serve(mixed: Path, task: str, stage: str, mixing: dict[str, Any]) -> None:
    wanted = recipe(mixed, task, stage, **mixing)
    (source,) = open_sources(wanted, wanted.data.train)
    expected = serving(task)
    assert 10 < len(expected) < 50 and source.samples == len(expected)
    assert source.numbers().tolist() == expected
    assert [number for number in range(60) if source.serves(number)] == expected
    plan = build_plan(wanted, [source])
    visited: list[int] = []
    window, turns = 0, mixing.get("repeat", 1)
    while len(visited) < turns * len(expected):
        visited += plan.window(0, window).number_N.tolist()
        window += 1
    assert sorted(visited[: turns * len(expected)]) == sorted(expected * turns)
    assert set(visited) == set(expected)
    lengths = plan.window(0, 0)
    seconds = [sample(number)["json"]["question_s"] for number in lengths.number_N.tolist()]
    assert task == "tts" or np.allclose(lengths.seconds_N, seconds)


@pytest.mark.parametrize("rank", [0, 1])
def test_validation_reads_the_samples_that_serve(mixed: Path, rank: int) -> None:
    wanted = recipe(mixed, "sqa", "s2t")
    (source,) = open_sources(wanted, wanted.data.train)
    (reader,) = valid_readers(wanted, [source], Names(), rank, 2).values()
    (other,) = valid_readers(wanted, [source], Names(), 1 - rank, 2).values()
    read = [name for part in (reader, other) for batch in part for name in batch]
    assert sorted(read) == [f"k{number:03d}" for number in serving("sqa")]


class Names:
    """A collate whose batch is the names of its samples."""

    members = frozenset[str]()

    def decode(self, item: Item) -> str:
        return item.sample.key

    def join(self, rows: Sequence[str], step: int) -> list[str]:
        return list(rows)

    def blank(self, step: int) -> list[str]:
        return []


def test_transcripts_are_those_of_the_samples_that_serve(mixed: Path) -> None:
    wanted = recipe(mixed, "asr", "s2t")
    assert len(list(transcripts(open_sources(wanted, wanted.data.train)))) == len(serving("asr"))


def test_where_all_serve_the_stream_is_as_it_was(mixed: Path, tmp_path: Path) -> None:
    write_shards(tmp_path / "set", ({**sample(1), "__key__": f"k{n:03d}"} for n in range(20)), 6)
    catalogue = Catalogue.open(tmp_path / "set")
    one = Source("set", "tts", catalogue, members=frozenset({"answer.units"}))
    assert one.serving is None and one.samples == 20
    assert np.array_equal(one.shard_starts, catalogue.shard_starts)


def test_a_catalogue_that_notes_no_tasks_is_taken_whole(mixed: Path, tmp_path: Path) -> None:
    catalogue = Catalogue.open(mixed)
    del catalogue._segments["tasks"], catalogue.tasks  # the latter is what has been read of the former
    assert Source("set", "sqa", catalogue).samples == 60
    assert Source("set", "sqa", Catalogue.open(mixed)).samples < 60


def test_a_dataset_of_which_nothing_serves_is_refused_with_what_it_holds(
    mixed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    others = ({"__key__": f"k{n}", "json": {"id": f"{n}"}, "wav": b"x", "txt": b"y"} for n in range(5))
    write_shards(tmp_path / "set", others, 5)
    wanted = recipe(tmp_path / "set", "sqa", "s2t")
    with pytest.raises(DataError) as caught:
        open_sources(wanted, wanted.data.train)
    assert caught.value.what == (
        f"0 of 5 samples of {tmp_path / 'set'} serve for task sqa: it takes those of task sqa, or of none, that have "
        "question.flac; there are 5 of no task with json, txt, wav"
    )
    part = recipe(mixed, "sqa", "s2t")
    with caplog.at_level("INFO"):
        open_sources(part, part.data.train, quiet=False)
    assert f"{len(serving('sqa'))} of 60 samples of {mixed} serve for task sqa; there are " in caplog.text


def test_the_manifest_of_three_tasks_is_three_datasets_in_one(tmp_path: Path) -> None:
    for name in ("1.wav", "2.wav", "3.wav"):
        put(tmp_path / name, encoded(clip(1)))
    rows = [
        {"audio": "1.wav", "text": "what is the capital of france"},
        {"audio": "2.wav", "text": "who wrote hamlet", "answer_text": "Shakespeare wrote Hamlet."},
        {"answer_audio": "3.wav", "answer_text": "Paris is the capital of France."},
    ]
    build_corpus("manifest", put_lines(tmp_path / "m.jsonl", rows), tmp_path / "out", task="")
    for task, stage, expected in (("asr", "s2t", ["1", "2"]), ("sqa", "s2t", ["2"])):
        wanted = recipe(tmp_path / "out", task, stage)
        (source,) = open_sources(wanted, wanted.data.train)
        store = ShardStore(source.catalogue)
        assert [store.read(number, ()).meta["id"] for number in source.numbers().tolist()] == expected
        store.close()
    wanted = recipe(tmp_path / "out", "tts", "t2c")
    with pytest.raises(DataError, match="that have answer.units; there are 1 tts with answer.flac, json; 1 sqa"):
        open_sources(wanted, wanted.data.train)


def test_indexing_anew_notes_tasks_and_changes_no_fingerprint(mixed: Path) -> None:
    before = json.loads((mixed / DATASET_NAME).read_text())
    (mixed / CATALOGUE_NAME).unlink()
    after = index_folder(mixed)
    assert after["fingerprint"] == before["fingerprint"] and after["catalogue"] == before["catalogue"]
    tasks = Catalogue.open(mixed).tasks
    assert tasks is not None and [("", "asr", "sqa", "tts")[place] or None for place in tasks.tolist()] == [
        TASKS[number * 7 % 4] for number in range(60)
    ]
    assert replace(Source("set", "tts", Catalogue.open(mixed)), task="asr").samples == 45
