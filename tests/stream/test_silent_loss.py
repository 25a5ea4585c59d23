"""Damage that plain webdataset passes over in silence, or that leaves it with half a sample; each is refused here."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from echox.errors import CorruptSampleError, DataError
from echox.stream.format.catalogue import CATALOGUE_NAME, Catalogue
from echox.stream.format.indexing import index_folder
from echox.stream.storage.store import ShardStore
from tests.stream.tars import files, flip, header_of, meta, plain_webdataset, write_tar


def refused(folder: Path, message: str) -> DataError:
    """The index's refusal; nothing of it may be left behind."""
    with pytest.raises(DataError, match=message) as caught:
        index_folder(folder)
    assert not (folder / CATALOGUE_NAME).exists()
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []
    return caught.value


def test_a_corrupt_header_in_the_middle(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", files(100))
    at = header_of(path, "s030.question.flac")
    flip(path, at + 3)
    assert len(plain_webdataset(path)) == 30
    error = refused(tmp_path, f"x.tar, byte {at}: the checksum of a tar header is wrong")
    assert error.where == str(path)


@pytest.mark.parametrize("member", ["question.flac", "answer.units", "json"])
@pytest.mark.parametrize("place", ["before its header", "in its header", "before its bytes", "in its bytes"])
def test_a_shard_cut_at_any_member(tmp_path: Path, member: str, place: str) -> None:
    path = write_tar(tmp_path / "x.tar", files(10))
    at = header_of(path, f"s004.{member}")
    cut = at + {"before its header": 0, "in its header": 100, "before its bytes": 512, "in its bytes": 530}[place]
    path.write_bytes(path.read_bytes()[:cut])
    got = plain_webdataset(path, tolerant=True)
    assert len(got) < 10
    if member == "json" and place != "in its bytes":
        assert "json" not in got[-1]
    byte = at if place in ("before its bytes", "in its bytes") else cut if place == "before its header" else at
    refused(tmp_path, rf"x.tar, byte {byte}: (the tar has no end|the shard is cut: \d+ bytes of s004.{member})")


def test_interleaved_members(tmp_path: Path) -> None:
    names = ["a.question.flac", "b.question.flac", "a.json", "b.json"]
    path = write_tar(tmp_path / "x.tar", [(name, meta(0)) for name in names])
    assert len(plain_webdataset(path)) == 4
    refused(tmp_path, f"byte {header_of(path, 'a.json')}: sample a comes back after others")


def test_dots_in_keys(tmp_path: Path) -> None:
    names = [f"utt.{number}.{extension}" for number in range(3) for extension in ("flac", "json")]
    path = write_tar(tmp_path / "x.tar", [(name, meta(0)) for name in names])
    assert [sample["__key__"] for sample in plain_webdataset(path)] == ["utt"]
    refused(tmp_path, r"byte 0: the key of utt\.0\.flac has a dot")


def test_dots_in_keys_that_look_like_members(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", [(f"reader.{n}.{ext}", meta(0)) for n in "ab" for ext in ("flac", "json")])
    assert len(plain_webdataset(path)) == 1
    refused(tmp_path, "byte 0: sample reader has no json member")


def test_a_flipped_byte_of_a_payload(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", files(10))
    index_folder(tmp_path)
    at = header_of(path, "s006.answer.units") + 512 + 7
    flip(path, at)
    assert len(plain_webdataset(path)) == 10
    store = ShardStore(Catalogue.open(tmp_path))
    for sample in range(10):
        if sample != 6:
            store.read(sample)
    with pytest.raises(CorruptSampleError, match=rf"byte {at - 7}: member answer.units of sample s006") as caught:
        store.read(6)
    assert caught.value.kind == "checksum" and caught.value.where == str(path)
    assert store.read(6, {"question.flac"}).members["question.flac"] == b"\x06" * 40


def test_a_missing_member(tmp_path: Path) -> None:
    content = [file for file in files(10) if file[0] != "s005.answer.units"]
    path = write_tar(tmp_path / "x.tar", content)
    assert "answer.units" not in plain_webdataset(path)[5]
    refused(tmp_path, f"byte {header_of(path, 's005.question.flac')}: sample s005 has no answer.units member")
    assert index_folder(tmp_path, optional=["answer.units"])["optional"] == ["answer.units"]
    # What was declared once need not be declared again.
    assert index_folder(tmp_path)["samples"] == 10


def test_a_member_too_many(tmp_path: Path) -> None:
    content = files(4)
    content.insert(-1, ("s003.extra.txt", b""))
    path = write_tar(tmp_path / "x.tar", content)
    assert len(plain_webdataset(path)) == 4
    refused(tmp_path, f"byte {header_of(path, 's003.question.flac')}: sample s003 has a member extra.txt")


def test_another_member_set_in_a_later_shard(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", files(2))
    write_tar(tmp_path / "b.tar", [file for file in files(2, 2) if not file[0].endswith("units")])
    refused(tmp_path, "b.tar: sample s002 has no answer.units member")


def test_missing_end_blocks(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", files(3))
    end = header_of(path, "s002.json") + 1024
    path.write_bytes(path.read_bytes()[:end])
    assert len(plain_webdataset(path)) == 3
    refused(tmp_path, f"byte {end}: the tar has no end")
    path.write_bytes(path.read_bytes() + bytes(512))
    refused(tmp_path, f"byte {end}: the tar ends after one zero block of two")


def test_a_zero_block_between_members(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", files(6))
    at = header_of(path, "s003.question.flac")
    content = path.read_bytes()
    path.write_bytes(content[:at] + bytes(512) + content[at:])
    assert len(plain_webdataset(path)) == 3
    refused(tmp_path, f"byte {at}: a lone zero block")


def test_bytes_after_the_end(tmp_path: Path) -> None:
    path, more = write_tar(tmp_path / "x.tar", files(3)), write_tar(tmp_path / "more", files(3, 3))
    end = path.stat().st_size
    path.write_bytes(path.read_bytes() + more.read_bytes())
    more.unlink()
    assert len(plain_webdataset(path)) == 3
    refused(tmp_path, f"byte {end}: there are bytes after the end")


def test_a_compressed_tar(tmp_path: Path) -> None:
    plain = write_tar(tmp_path / "plain", files(3))
    path = tmp_path / "x.tar"
    path.write_bytes(gzip.compress(plain.read_bytes()))
    plain.unlink()
    refused(tmp_path, "byte 0: the tar is compressed with gzip")
    path.rename(tmp_path / "x.tar.gz")
    refused(tmp_path, "x.tar.gz is a compressed tar")


def test_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "x.tar").touch()
    refused(tmp_path, "byte 0: the file is empty")


def test_a_file_that_webdataset_skips(tmp_path: Path) -> None:
    content = files(2)
    content.insert(3, ("README", b"about"))
    path = write_tar(tmp_path / "x.tar", content)
    assert len(plain_webdataset(path)) == 2
    refused(tmp_path, f"byte {header_of(path, 'README')}: README has no key or no extension")


def test_a_key_in_two_shards(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", files(5))
    other = write_tar(tmp_path / "b.tar", files(5, 4))
    keys = [sample["__key__"] for sample in plain_webdataset(tmp_path / "a.tar", other)]
    assert len(keys) == 10 and len(set(keys)) == 9
    refused(tmp_path, r"b.tar, byte 0: sample s004 is in a.tar too")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[1]", "holds a list, not an object"),
        (b"{", "cannot be read"),
        (b'{"question_s": "long"}', "question_s is 'long'"),
        (b'{"question_s": -1}', "question_s is -1"),
        (b'{"answer_text": 7}', "answer_text is a int, not text"),
    ],
)
def test_metadata_that_cannot_be_used(tmp_path: Path, content: bytes, message: str) -> None:
    path = write_tar(
        tmp_path / "x.tar", [*files(1), ("t.question.flac", b""), ("t.answer.units", b""), ("t.json", content)]
    )
    assert len(plain_webdataset(path)) == 2
    refused(tmp_path, rf"byte {header_of(path, 't.question.flac')}: sample t: .*{message}")


def test_a_key_used_twice_in_a_shard(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", [("a.json", meta(0)), ("b.json", meta(1)), ("a.json", meta(2))])
    assert len(plain_webdataset(path)) == 3
    refused(tmp_path, "sample a comes back after others: its members are interleaved, or the key is used twice")
