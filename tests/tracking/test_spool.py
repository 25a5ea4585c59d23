from __future__ import annotations

import os
from pathlib import Path

import pytest

from echox.tracking import spool
from echox.tracking.spool import Spool


def tags(number: int) -> spool.Operation:
    return {"kind": "tags", "items": {"n": str(number)}}


def drain(path: Path) -> list[spool.Operation]:
    found: list[spool.Operation] = []
    while True:
        part, offset = spool.read(path)
        if not part:
            return found
        found += part
        spool.confirm(path, offset)


def test_what_was_confirmed_is_not_read_again(tmp_path: Path) -> None:
    journal = Spool(tmp_path, "rank0")
    journal.append([tags(1), tags(2)])
    assert drain(journal.path) == [tags(1), tags(2)]
    journal.append([tags(3)])
    assert spool.undelivered(journal.path)
    assert drain(journal.path) == [tags(3)]
    assert not spool.undelivered(journal.path)


def test_a_long_journal_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "CHUNK_BYTES", 100)
    journal = Spool(tmp_path, "rank0")
    journal.append([tags(number) for number in range(50)])
    first, _ = spool.read(journal.path)
    assert 0 < len(first) < 10
    assert drain(journal.path) == [tags(number) for number in range(50)]


def test_a_line_cut_by_a_crash_is_passed_over_and_a_full_disk_leaves_none(tmp_path: Path) -> None:
    journal = Spool(tmp_path, "rank0")
    journal.append([tags(1)])
    with journal.path.open("a") as file:
        file.write('{"kind": "ta')
    assert drain(journal.path) == [tags(1)]

    other = Spool(tmp_path, "rank1")
    other.append([tags(1)])
    os.truncate(other.path, other.path.stat().st_size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pathlib.Path.open", _cutting(Path.open))
        with pytest.raises(OSError, match="took 5"):
            other.append([tags(2)])
    other.append([tags(3)])
    assert drain(other.path) == [tags(1), tags(3)]


def _cutting(real: object) -> object:
    """Files that take five bytes of every write, as a full disk may."""

    class Cut:
        def __init__(self, file: object) -> None:
            self._file = file

        def __enter__(self) -> Cut:
            return self

        def __exit__(self, *_: object) -> None:
            self._file.close()  # type: ignore[attr-defined]

        def __getattr__(self, name: str) -> object:
            return getattr(self._file, name)

        def write(self, data: bytes) -> int:
            return int(self._file.write(data[:5]))  # type: ignore[attr-defined]

    return lambda path, *args, **kwargs: Cut(real(path, *args, **kwargs))  # type: ignore[operator]


def test_a_delivered_journal_makes_room_while_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "ROTATE_BYTES", 100)
    journal = Spool(tmp_path, "rank0")
    for number in range(100):
        journal.append([tags(number)])
        assert drain(journal.path) == [tags(number)]
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 400


def test_a_journal_removed_by_somebody_else_begins_again(tmp_path: Path) -> None:
    journal = Spool(tmp_path / "spool", "rank0")
    journal.append([tags(1)])
    drain(journal.path)
    spool.remove(journal.path)
    assert not (tmp_path / "spool").exists()
    journal.append([tags(2)])
    assert drain(journal.path) == [tags(2)]


def test_roles_inherit_their_own_journals_alone_oldest_first(tmp_path: Path) -> None:
    old = [Spool(tmp_path, name) for name in ("rank0", "rank8", "rank0")]
    for journal in old:
        journal.append([tags(1)])
    assert Spool(tmp_path, "rank0").inherited() == [old[0].path, old[2].path]
    assert spool.pending(tmp_path) == [journal.path for journal in old]
