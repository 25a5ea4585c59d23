"""Small files that survive a crash in the middle of a write."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from echox.files import append_line, write_atomically


@pytest.mark.parametrize("durable", [True, False])
def test_a_line_after_one_that_was_cut_short_begins_anew(tmp_path: Path, durable: bool) -> None:
    path = tmp_path / "lines"
    append_line(path, "one", durable=durable)
    with path.open("a") as file:
        file.write("tw")
    append_line(path, "three\nfour", durable=durable)
    append_line(path, "five", durable=durable)
    assert path.read_text().splitlines() == ["one", "tw", "three", "four", "five"]


def test_a_durable_line_is_forced_to_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_disk: list[bytes] = []
    path = tmp_path / "lines"
    monkeypatch.setattr(os, "fsync", lambda descriptor: on_disk.append(path.read_bytes()))
    append_line(path, "one")
    append_line(path, "two", durable=True)
    assert on_disk == [b"one\ntwo\n"], "flushed first, and only where it was asked for"


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "small.json"
    write_atomically(path, "old")
    really = Path.write_text

    def half(self: Path, text: str, **more: str) -> int:
        really(self, text[:1])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, "new")
    monkeypatch.undo()
    assert path.read_text() == "old"
    write_atomically(path, "new")
    assert path.read_text() == "new"
