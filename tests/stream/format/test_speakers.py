"""Who speaks an answer: as a sample says it, and as a catalogue notes it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from echox.errors import DataError
from echox.stream.format.catalogue import CATALOGUE_NAME, DATASET_NAME, PREAMBLE, Catalogue, write_segments
from echox.stream.format.indexing import index_folder
from echox.stream.format.speakers import LONGEST, answer_speaker
from echox.stream.format.writer import write_shards
from echox.stream.storage.store import read_folder
from tests.shards.layouts import build as build_corpus
from tests.shards.layouts import clip, encoded, put, put_lines

WHO: list[Any] = ["bo", None, "ann", "bo", 7, None, "ann", "zoë"]


def write_speakers(folder: Path, who: list[Any] = WHO) -> Path:
    """Shards of three samples."""
    samples = (
        {"__key__": f"s{number}", "json": {"id": f"{number}", "fields": {} if name is None else {"speaker": name}}}
        for number, name in enumerate(who)
    )
    write_shards(folder, samples, per_shard=3)
    return folder


def names(catalogue: Catalogue) -> list[str | None]:
    return [None if each == 0 else catalogue.speaker_names[each - 1] for each in catalogue.speakers.tolist()]


@pytest.mark.parametrize(
    ("meta", "who"),
    [
        ({"task": "tts", "fields": {"speaker": "bo"}}, "bo"),
        ({"speaker": " bo "}, "bo"),
        ({"task": "tts", "fields": {"speaker": 19}}, "19"),
        ({"task": "tts", "answer_spoken_by": "joe", "fields": {"speaker": "bo"}}, "joe"),
        ({"task": "sqa", "fields": {"speaker": "who asks"}}, ""),
        ({"task": "sqa", "fields": {"speaker": "who asks", "answer_speaker": "bo"}}, "bo"),
        ({"task": "asr", "speaker": "19"}, ""),
        ({"task": "sqa", "question_spoken_by": "joe"}, ""),
        ({"fields": ["speaker"], "speaker": ""}, ""),
        ({"fields": {"speaker": True}}, ""),
        ({"speaker": {"name": "bo"}}, ""),
        ({"speaker": "x" * (LONGEST + 1)}, ""),
        ({}, ""),
    ],
)
def test_who_speaks_the_answer(meta: dict[str, Any], who: str) -> None:
    assert answer_speaker(meta) == who


def test_a_catalogue_notes_who_speaks_in_shards_of_any_order(tmp_path: Path) -> None:
    folder = write_speakers(tmp_path / "set")
    catalogue = Catalogue.open(folder)
    assert names(catalogue) == [None if name is None else str(name) for name in WHO]
    assert sorted(catalogue.speaker_names) == ["7", "ann", "bo", "zoë"], "each once"
    catalogue.verify()
    listing = json.loads((folder / DATASET_NAME).read_text())
    (folder / CATALOGUE_NAME).unlink()
    assert index_folder(folder) == listing and names(Catalogue.open(folder)) == names(catalogue)


def test_where_nobody_is_named_the_catalogue_has_no_word_of_it(tmp_path: Path) -> None:
    catalogue = Catalogue.open(write_speakers(tmp_path / "set", [None] * 4))
    assert set(catalogue._segments) == {"shards", "shard_names", "records", "tasks", "members", "keys"}
    assert catalogue.speaker_names == [] and catalogue.speakers.tolist() == [0] * 4


def resealed(folder: Path, **changes: Callable[[bytes], bytes | None]) -> Path:
    """The dataset with segments of its catalogue changed, or gone, and sealed again."""
    path = folder / CATALOGUE_NAME
    content = path.read_bytes()
    header = json.loads(content[PREAMBLE.size :][: PREAMBLE.unpack(content[: PREAMBLE.size])[2]])
    files: dict[str, Path] = {}
    for name, part in header.pop("segments").items():
        made = changes.get(name, lambda data: data)(content[part["offset"] :][: part["bytes"]])
        if made is not None:
            files[name] = folder / f"{name}.segment"
            files[name].write_bytes(made)
    digest = write_segments(path, header, files)
    for file in files.values():
        file.unlink()
    listing = json.loads((folder / DATASET_NAME).read_text())
    (folder / DATASET_NAME).write_text(json.dumps({**listing, "catalogue": digest}))
    return folder


@pytest.mark.parametrize(
    ("segment", "change", "said"),
    [
        ("speakers", lambda data: b"\xff" * len(data), "speakers are not of its samples"),
        ("speakers", lambda data: data[:-4], "speakers are not of its samples"),
        ("speakers", lambda data: data[:-1], "segment speakers has"),
        ("speaker_names", lambda data: None, "speakers are not of its samples"),
        ("speaker_names", lambda data: b"[", "names of its speakers cannot be read"),
        ("speaker_names", lambda data: b'{"bo": 1}', "names of its speakers are no list"),
        ("speaker_names", lambda data: b"[7, 8, 9, 10]", "names of its speakers are no list"),
    ],
)
def test_a_catalogue_whose_speakers_cannot_be_is_refused(
    segment: str, change: Callable[[bytes], bytes | None], said: str, tmp_path: Path
) -> None:
    folder = resealed(write_speakers(tmp_path / "set"), **{segment: change})
    with pytest.raises(DataError, match=said):
        names(Catalogue.open(folder))


def test_a_damaged_segment_is_found_when_the_catalogue_is_opened(tmp_path: Path) -> None:
    folder = write_speakers(tmp_path / "set")
    at = Catalogue.open(folder)._segments["speaker_names"]["offset"]
    content = bytearray((folder / CATALOGUE_NAME).read_bytes())
    content[at + 2] ^= 1
    (folder / CATALOGUE_NAME).write_bytes(content)
    with pytest.raises(DataError, match="damaged in its segment speaker_names"):
        Catalogue.open(folder)


def test_the_speaker_of_a_list_reaches_shards_and_catalogue(tmp_path: Path) -> None:
    for name in ("1.wav", "2.wav", "3.wav", "4.wav"):
        put(tmp_path / name, encoded(clip(1)))
    rows = [
        {"answer_audio": "1.wav", "answer_text": "Paris.", "speaker": "bo"},
        {"audio": "2.wav", "text": "who wrote hamlet", "speaker": "ann"},
        {"audio": "3.wav", "text": "who", "answer_audio": "4.wav", "answer_text": "He.", "answer_speaker": "zoe"},
    ]
    build_corpus("manifest", put_lines(tmp_path / "m.jsonl", rows), tmp_path / "out", task="")
    catalogue = Catalogue.open(tmp_path / "out")
    found = {
        sample.meta["id"]: who for sample, who in zip(read_folder(tmp_path / "out"), names(catalogue), strict=True)
    }
    assert found == {"1": "bo", "2": None, "3": "zoe"}
