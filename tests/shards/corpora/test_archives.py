"""JSON lists read piece by piece, and members of tars found by place."""

from __future__ import annotations

import io
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from echox.errors import DataError
from shards.corpora import archives
from shards.corpora.archives import Archives, archived_list, json_list, stem
from shards.corpus import MemberAudio, SpanAudio
from tests.shards.layouts import put, put_archive

VALUES: list[Any] = [{"a": ["é", '"]'], "b": None}, [], 12345, "x,]y", 1.5, {"deep": {"er": [1, 2]}}, "日本", True]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1 << 20])
@pytest.mark.parametrize("indent", [None, 2])
def test_a_list_in_pieces_is_the_list(monkeypatch: pytest.MonkeyPatch, size: int, indent: int | None) -> None:
    monkeypatch.setattr(archives, "_CHUNK", size)
    for count in range(len(VALUES) + 1):
        data = json.dumps(VALUES[:count], indent=indent, ensure_ascii=False).encode()
        assert list(json_list(io.BytesIO(b" \n" + data + b"\n"), "x")) == VALUES[:count]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"a": 1}', "Not a JSON list"),
        (b"[1, 2", "cut short"),
        (b"", "cut short"),
        (b"[1, oops]", "Broken JSON"),
        (b'[1, {"a": ', "Broken JSON"),
    ],
)
def test_what_is_no_list_is_refused_with_its_place(data: bytes, message: str) -> None:
    with pytest.raises(DataError, match=rf"{message}.*\[where it lies\]"):
        list(json_list(io.BytesIO(data), "where it lies"))


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.tgz"])
def test_members_are_found(tmp_path: Path, name: str) -> None:
    archive = put_archive(tmp_path / name, [1, 2], {"./x/1.wav": b"one", "2.wav": b"two two"})
    assert stem(archive) == "a" and list(archived_list(archive, "data.json")) == [1, 2]
    lines: list[str] = []
    found = Archives(tmp_path / "scratch", lines.append)
    for member, data in (("x/1.wav", b"one"), ("2.wav", b"two two")):
        audio = found.locate(MemberAudio(archive, member))
        assert isinstance(audio, SpanAudio) and audio.read() == data
    absent = found.locate(MemberAudio(archive, "3.wav"))
    with pytest.raises(FileNotFoundError, match=rf"{name} has no member 3\.wav"):
        absent.read()
    assert lines == ([] if name == "a.tar" else [f"decompressing {name}"])


def test_a_decompressed_archive_serves_again_until_the_archive_changes(tmp_path: Path) -> None:
    lines: list[str] = []
    for sound in (b"old", b"old", b"newer"):
        if not lines or sound == b"newer":
            put_archive(tmp_path / "a.tar.gz", [], {"1.wav": sound})
        audio = Archives(tmp_path / "scratch", lines.append).locate(MemberAudio(tmp_path / "a.tar.gz", "1.wav"))
        assert audio.read() == sound
    assert len(lines) == 2


def test_damaged_archives_are_refused_by_name(tmp_path: Path) -> None:
    whole = put_archive(tmp_path / "a.tar.gz", list(range(9)), {"1.wav": bytes(range(256)) * 400}).read_bytes()
    for data in (whole[: len(whole) // 2], b"not gzip", whole[:-20] + b"\0" * 20):
        put(tmp_path / "b.tar.gz", data)
        with pytest.raises(DataError, match=r"Cannot read the archive.*b\.tar\.gz.*Download it again"):
            Archives(tmp_path / "scratch", print).locate(MemberAudio(tmp_path / "b.tar.gz", "1.wav"))
    put(tmp_path / "c.tar.gz", b"not gzip")
    with pytest.raises(DataError, match=r"Cannot read the archive"):
        list(archived_list(tmp_path / "c.tar.gz", "data.json"))
    with pytest.raises(DataError, match=r"The archive has no other\.json"):
        list(archived_list(tmp_path / "a.tar.gz", "other.json"))


def test_an_archive_that_grows_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "_ANY_SIZE", 1 << 20)
    silence = put_archive(tmp_path / "bomb.tar.gz", [], {"a.wav": bytes(30 << 20)})
    assert silence.stat().st_size < 100_000
    found = Archives(tmp_path / "scratch", lambda line: None)
    with pytest.raises(DataError, match=r"grows to more than 50 times its .* bytes"):
        found.locate(MemberAudio(silence, "a.wav"))
    assert list((tmp_path / "scratch").iterdir()) == [], "nothing of it is left"
    honest = put_archive(tmp_path / "honest.tar.gz", [], {"a.wav": bytes(100_000)})
    assert isinstance(found.locate(MemberAudio(honest, "a.wav")), SpanAudio)


def test_sparse_and_huge_members_are_no_recordings(tmp_path: Path) -> None:
    sparse = tmp_path / "sparse.bin"
    with sparse.open("wb") as file:
        file.truncate(50 << 20)
    words = ["tar", "--sparse", "--format=gnu", "-cf", str(tmp_path / "a.tar"), "-C", str(tmp_path), sparse.name]
    subprocess.run(words, check=True)
    assert (tmp_path / "a.tar").stat().st_size < 1 << 20
    found = Archives(tmp_path / "scratch", lambda line: None)
    with pytest.raises(FileNotFoundError):
        found.locate(MemberAudio(tmp_path / "a.tar", "sparse.bin")).read()
    with pytest.raises(ValueError, match=r"a member of 3\.0 GiB is no recording"):
        SpanAudio(sparse, 0, 3 << 30, sparse).read()


def test_json_that_is_deep_or_never_ends_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="nested too deeply"):
        list(json_list(io.BytesIO(b"[" + b"[" * 200_000), "x"))
    monkeypatch.setattr(archives, "_LONGEST_ITEM", 1 << 20)
    with pytest.raises(DataError, match="longer than 1 MiB"):
        list(json_list(io.BytesIO(b'["' + b"a" * (5 << 20) + b'"]'), "x"))
