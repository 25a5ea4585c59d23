"""Answers on disk: what was written is read again, what was cut is made whole, and nothing of others is mixed in."""

from __future__ import annotations

import json
import os
import random
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from echox.errors import DataError
from echox.evaluate.benchmarks.records import Answered, Part, read_answers, writing

IDENTITY = {"run": {"weights": "aa"}, "batch": 16, "decoding": {"max_new": 9, "temperature": 0.0}}
ROWS = [
    Answered(number=n, text=f"té{n}\n", heard="\u2028x", cascade_heard="", units=[n, 65535], seconds=0.5, failed=0)
    for n in range(4)
]
ROWS.append(replace(ROWS[0], number=4, quality=[2.5, 3.0, 1.0, 4.25]))


def write(folder: Path, rows: list[Answered], name: str = "greedy-0.jsonl") -> Path:
    with writing(folder, name, IDENTITY) as writer:
        for row in rows:
            writer.add(row)
    return folder / name


def test_what_was_written_is_read_again(tmp_path: Path) -> None:
    folder = tmp_path / "made" / "llama-questions"
    write(folder, ROWS[:2])
    file = write(folder, ROWS[2:])
    assert read_answers(folder, "greedy-0", IDENTITY) == dict(enumerate(ROWS))
    assert len(file.read_bytes().splitlines()) == 6
    assert json.loads(file.read_bytes().splitlines()[0]) == {"version": 1, "identity": IDENTITY}
    assert read_answers(folder, "greedy-1", IDENTITY) == {}


def test_the_files_of_all_processes_count_and_those_of_other_decodings_do_not(tmp_path: Path) -> None:
    for row, part in zip(ROWS, (Part(), Part(0, 2), Part(1, 2), Part(11, 12), Part(2, 3)), strict=True):
        write(tmp_path, [row], part.file("release-1"))
    write(tmp_path, [replace(ROWS[0], number=9)], "release-17.jsonl")
    write(tmp_path, [replace(ROWS[0], number=8)], "release-17-0of2.jsonl")
    assert sorted(path.name for path in tmp_path.iterdir())[0] == "release-1-0of2.jsonl"
    assert read_answers(tmp_path, "release-1", IDENTITY) == dict(enumerate(ROWS))
    assert list(read_answers(tmp_path, "release-17", IDENTITY)) == [9, 8]


def test_a_file_cut_anywhere_becomes_what_it_would_have_been(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole", ROWS).read_bytes()
    cuts = random.Random(0).sample(range(len(whole) + 1), 40)
    ends = [at + 1 for at, byte in enumerate(whole) if byte == 10]
    for cut in {0, 1, *cuts, *ends, *(end - 1 for end in ends)}:
        folder = tmp_path / str(cut)
        folder.mkdir()
        (folder / "greedy-0.jsonl").write_bytes(whole[:cut])
        kept = read_answers(folder, "greedy-0", IDENTITY)
        assert list(kept.values()) == ROWS[: max(0, whole[:cut].count(b"\n") - 1)]
        assert write(folder, ROWS[len(kept) :]).read_bytes() == whole


def test_each_answer_is_on_disk_before_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forced: list[int] = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda place: (forced.append(os.fstat(place).st_size), real(place))[1])
    file = write(tmp_path, ROWS)
    ends = [at + 1 for at, byte in enumerate(file.read_bytes()) if byte == 10]
    assert [size for size in forced if size in ends] == ends


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({**IDENTITY, "run": {"weights": "bb"}}, "run.weights"),
        ({**IDENTITY, "batch": 8}, "batch"),
        ({**IDENTITY, "decoding": {"max_new": 9, "temperature": 0.2}}, "decoding.temperature"),
        ({**IDENTITY, "judge": {"files": {}}}, "judge"),
    ],
)
def test_answers_of_another_identity_are_refused_by_name(tmp_path: Path, other: dict[str, object], named: str) -> None:
    before = write(tmp_path, ROWS).read_bytes()
    with pytest.raises(DataError, match=f"answers of another {named}") as caught:
        read_answers(tmp_path, "greedy-0", other)
    assert "--out" in caught.value.fix and (tmp_path / "greedy-0.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    "content",
    [
        b"\x00\xff\n",
        b"[]\n",
        b'{"version": 2, "identity": {}}\n',
        b'{"version": 1}\n',
        b'{"version": 1, "identity": 5}\n',
        b"[" * 100_000 + b"\n",
        *(
            json.dumps({"version": 1, "identity": IDENTITY}).encode() + b"\n" + row + b"\n"
            for row in (
                b"{}",
                b"5",
                *(
                    json.dumps({**asdict(ROWS[0]), name: value}).encode()
                    for name, value in (
                        ("number", "1"), ("number", -1), ("number", True), ("text", None), ("heard", 5),
                        ("units", [70_000]), ("units", ["1"]), ("units", [True]), ("units", "12"),
                        ("seconds", float("nan")), ("seconds", -1.0), ("failed", -1), ("more", 1),
                        ("quality", "1234"), ("quality", [1.0]), ("quality", [1.0, 2.0, 3.0, float("inf")]),
                        ("quality", [1.0, 2.0, 3.0, "4"]),
                    )
                ),
            )
        ),
    ],
)  # fmt: skip
def test_a_file_that_holds_something_else_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "greedy-0.jsonl").write_bytes(content)
    with pytest.raises(DataError, match="these are no answers to a benchmark") as caught:
        read_answers(tmp_path, "greedy-0", IDENTITY)
    assert "greedy-0.jsonl" in caught.value.where


def test_links_and_pipes_are_neither_read_nor_written(tmp_path: Path) -> None:
    outside = write(tmp_path / "outside", ROWS)
    before = outside.read_bytes()
    folder = tmp_path / "own"
    folder.mkdir()
    for make in (lambda path: path.symlink_to(outside), os.mkfifo):
        make(folder / "greedy-0.jsonl")
        with pytest.raises(DataError):
            read_answers(folder, "greedy-0", IDENTITY)
        with pytest.raises(DataError, match="cannot be written"):
            write(folder, ROWS)
        (folder / "greedy-0.jsonl").unlink()
    assert outside.read_bytes() == before


def test_two_processes_do_not_write_one_file(tmp_path: Path) -> None:
    with writing(tmp_path, "greedy-0.jsonl", IDENTITY) as writer:
        writer.add(ROWS[0])
        with pytest.raises(DataError, match="another process is answering") as caught:
            write(tmp_path, ROWS)
        assert "--shard" in caught.value.fix
        write(tmp_path, ROWS, "greedy-0-0of2.jsonl")
    assert read_answers(tmp_path, "greedy-0", IDENTITY) == dict(enumerate(ROWS))
