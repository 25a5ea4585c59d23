"""Small files that survive a crash in the middle of a write."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from echox.files import append_line, fsync, names_inside, rename_to_free, write_atomically


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

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, "new")
    monkeypatch.undo()
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["small.json"]
    write_atomically(path, "new")
    assert path.read_text() == "new"


def test_what_is_written_is_on_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, seen = tmp_path / "small.json", list[tuple[bool, int]]()
    monkeypatch.setattr(os, "fsync", lambda descriptor: seen.append((path.exists(), os.fstat(descriptor).st_size)))
    write_atomically(path, "five!")
    assert seen == [(False, 5)]
    write_atomically(path, "again", durable=False)
    assert len(seen) == 1 and path.read_text() == "again"


def test_hosts_with_equal_process_ids_do_not_write_into_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, names = tmp_path / "small.json", set[str]()
    monkeypatch.setattr(os, "getpid", lambda: 7)
    monkeypatch.setattr(os, "fsync", lambda descriptor: names.update(os.listdir(tmp_path)))
    write_atomically(path, "one")
    path.unlink()
    write_atomically(path, "two")
    assert len(names) == 2


@pytest.mark.parametrize("lost", [False, True], ids=["answered", "answer lost"])
def test_a_rename_that_nfs_sends_twice_has_worked(lost: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, times = os.replace, 2 if lost else 1

    def over_nfs(source: Path, target: Path) -> None:
        for _ in range(times):
            real(source, target)

    monkeypatch.setattr(os, "replace", over_nfs)
    monkeypatch.setattr(os, "rename", over_nfs)
    write_atomically(tmp_path / "small.json", "new")
    write_atomically(tmp_path / "small.json", "newer")
    assert (tmp_path / "small.json").read_text() == "newer"
    (tmp_path / "folder").mkdir()
    rename_to_free(tmp_path / "folder", tmp_path / "published")
    assert sorted(os.listdir(tmp_path)) == ["published", "small.json"]


def test_a_rename_of_what_is_not_there_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "other").mkdir()
    with pytest.raises(FileNotFoundError):
        rename_to_free(tmp_path / "none", tmp_path / "new")

    def loses(source: Path, target: Path) -> None:
        os.unlink(source)
        raise FileNotFoundError(source)

    (tmp_path / "small.json").write_text("old")
    monkeypatch.setattr(os, "replace", loses)
    with pytest.raises(FileNotFoundError):
        write_atomically(tmp_path / "small.json", "new")
    assert (tmp_path / "small.json").read_text() == "old"


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EBADF])
def test_a_file_system_whose_folders_cannot_be_forced_to_disk_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuses(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    file = tmp_path / "file"
    file.touch()
    monkeypatch.setattr(os, "fsync", refuses)
    fsync(tmp_path)
    with pytest.raises(OSError, match=os.strerror(number)):
        fsync(file)


def test_a_broken_disk_is_an_error_of_a_folder_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", breaks)
    with pytest.raises(OSError, match="Input/output"):
        fsync(tmp_path)


@pytest.mark.parametrize("name", ["", "/a", "..", "../a", "a/../b", "a/.."])
def test_a_name_that_may_lead_out_of_a_folder_is_told(name: str) -> None:
    assert not names_inside(name)
    assert names_inside("a..b/.c")
