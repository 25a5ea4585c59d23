"""The header walk against the standard library's tar, on everything a sound shard may look like."""

from __future__ import annotations

import random
import tarfile
from pathlib import Path

import pytest

from echox.errors import DataError
from echox.stream.format.tar_headers import Spans, mapped, walk
from tests.stream.tars import File, files, header_of, write_tar


def walked(path: Path) -> Spans:
    with mapped(path) as data:
        return walk(data, path)


@pytest.mark.parametrize(
    ("tar_format", "length"),
    [
        *((tarfile.USTAR_FORMAT, length) for length in (3, 90, 98)),
        *((kind, length) for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT) for length in (3, 98, 99, 140, 600)),
    ],
)
def test_members_are_those_of_the_standard_library(tmp_path: Path, tar_format: int, length: int) -> None:
    choose = random.Random(length)
    content: list[File] = []
    for number in range(20):
        key = f"{number:03d}".rjust(length, "k")
        content += [(f"{key}.{ext}", choose.randbytes(choose.choice([0, 1, 511, 512, 513, 2000]))) for ext in "ab"]
    path = write_tar(tmp_path / "x.tar", content, tar_format)
    spans = walked(path)
    with tarfile.open(path) as tar:
        known = [(member.name, member.offset, member.offset_data, member.size) for member in tar]
    members = spans.members
    assert members.names == [name for name, *_ in known]
    assert members.data.tolist() == [data for *_, data, _ in known]
    assert members.sizes.tolist() == [size for *_, size in known]
    assert spans.extensions == [("a", "b")] * 20
    assert [name[:-2] for name in members.names[::2]] == spans.keys
    # The first byte of a sample is that of the header that carries its long name.
    assert spans.starts[:-1].tolist() == [offset for _, offset, *_ in known][::2]
    assert spans.starts[-1] == known[-1][2] + -(-known[-1][3] // 512) * 512


def test_names_keep_folders_unicode_and_dots_after_the_first(tmp_path: Path) -> None:
    names = ["./a/ü-1.question.flac", "./a/ü-1.question.encoded.npy", "./a/ü-1.JSON", "./b/ü-1.json"]
    spans = walked(write_tar(tmp_path / "x.tar", [(name, b"1") for name in names], tarfile.PAX_FORMAT))
    assert spans.keys == ["./a/ü-1", "./b/ü-1"]
    assert spans.extensions == [("question.flac", "question.encoded.npy", "json"), ("json",)]


def test_directories_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        folder = tarfile.TarInfo("./")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        tar.addfile(tarfile.TarInfo("./a.json"))
    assert walked(path).keys == ["./a"]


def test_a_tar_without_samples_is_sound(tmp_path: Path) -> None:
    spans = walked(write_tar(tmp_path / "x.tar", []))
    assert spans.keys == [] and spans.starts.tolist() == [0]


@pytest.mark.parametrize(
    ("content", "message", "culprit"),
    [
        ([("a.json", b""), ("b.json", b""), ("a.flac", b"")], "sample a comes back", "a.flac"),
        ([("a.json", b""), ("b", b"")], "b has no key or no extension", "b"),
        ([("a.json", b""), ("x/.json", b"")], "x/.json has no key or no extension", "x/.json"),
        ([("a.json", b""), ("a.1.flac", b"")], r"the key of a\.1\.flac has a dot", "a.1.flac"),
        ([("a.json", b""), ("a.flac", b""), ("a.FLAC", b"")], "sample a has member flac twice", "a.FLAC"),
    ],
)
def test_names_that_readers_would_misread_are_refused(
    tmp_path: Path, content: list[File], message: str, culprit: str
) -> None:
    path = write_tar(tmp_path / "x.tar", content)
    with pytest.raises(DataError, match=message) as caught:
        walked(path)
    assert f"x.tar, byte {header_of(path, culprit)}:" in caught.value.what and caught.value.where == str(path)


def test_links_and_other_special_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        tar.addfile(tarfile.TarInfo("a.json"))
        link = tarfile.TarInfo("a.flac")
        link.type, link.linkname = tarfile.SYMTYPE, "elsewhere.flac"
        tar.addfile(link)
    with pytest.raises(DataError, match=r"byte 512: a\.flac is a link"):
        walked(path)


@pytest.mark.parametrize("size", [b"0000000-001\0", b"zzzzzzzzzzz\0", b"\x80" + (2**33).to_bytes(11, "big")])
def test_a_size_that_is_none_is_refused_though_the_checksum_fits(tmp_path: Path, size: bytes) -> None:
    path = write_tar(tmp_path / "x.tar", files(2))
    content = bytearray(path.read_bytes())
    at = header_of(path, "s001.json")
    content[at + 124 : at + 136] = size
    content[at + 148 : at + 156] = b" " * 8
    content[at + 148 : at + 156] = b"%06o\0 " % sum(content[at : at + 512])
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"byte {at}: the size in a tar header"):
        walked(path)


def test_binary_sizes_and_signed_checksums_of_old_tars_are_read(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", [("é.json", b"12345"), ("f.json", b"")], tarfile.GNU_FORMAT)
    content = bytearray(path.read_bytes())
    content[124:136] = b"\x80" + (5).to_bytes(11, "big")
    content[148:156] = b" " * 8
    signed = sum(byte - 256 * (byte > 127) for byte in content[:512])
    content[148:156] = b"%07o\0" % signed
    path.write_bytes(content)
    assert walked(path).members.sizes.tolist() == [5, 0]


def test_a_folder_without_the_shard_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Cannot open"):
        walked(tmp_path / "none.tar")
