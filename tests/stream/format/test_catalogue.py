"""The catalogue against the standard library's reading of the same shards."""

from __future__ import annotations

import errno
import json
import os
import random
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from echox.audio.io import encode_flac
from echox.errors import CorruptSampleError, DataError, TransientReadError
from echox.stream.format.catalogue import CATALOGUE_NAME, Catalogue
from echox.stream.format.indexing import index_folder
from echox.stream.format.writer import write_shards
from echox.stream.storage.retry import Retry
from echox.stream.storage.store import ShardStore, read_folder
from tests.hostile.inputs import header_of
from tests.stream.tars import File, flip, write_tar

QUICK = Retry(attempts=3, first_wait_s=0.001)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Shards of three, no and four samples, as a stranger's tool may write them."""
    choose = random.Random(0)
    for shard, numbers in enumerate((range(3), range(0), range(3, 7))):
        content: list[File] = []
        for n in numbers:
            meta = {
                "id": f"s{n}",
                "question_s": n + 0.5,
                "answer_text": "ü" * n,
                "source": "xy"[n % 2],
                "turns": [1] * n,
            }
            members = [
                (f"./s{n}.question.flac", choose.randbytes(choose.randrange(3000))),
                (f"./s{n}.answer.units", bytes(2 * n)),
                (f"./s{n}.json", json.dumps(meta).encode()),
            ]
            content += (
                choose.sample(members, 3) if n % 2 else [member for member in members if "units" not in member[0]]
            )
        write_tar(tmp_path / f"part{shard}.tar", content, tarfile.PAX_FORMAT)
    index_folder(tmp_path, optional=["answer.units"])
    return tmp_path


def known(folder: Path) -> list[tuple[str, str, dict[str, tuple[int, int]], dict[str, bytes]]]:
    """Key, shard, places and bytes of every sample, by the standard library."""
    found: dict[str, tuple[str, str, dict[str, tuple[int, int]], dict[str, bytes]]] = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                base, _, extension = member.name.removeprefix("./").partition(".")
                row = found.setdefault(f"./{base}", (f"./{base}", path.name, {}, {}))
                row[2][extension] = (member.offset_data, member.size)
                handle = tar.extractfile(member)
                assert handle is not None
                row[3][extension] = handle.read()
    return list(found.values())


def test_every_sample_is_where_the_standard_library_finds_it(folder: Path) -> None:
    catalogue = Catalogue.open(folder)
    catalogue.verify()
    rows = known(folder)
    assert catalogue.samples == len(rows) == 7
    assert list(catalogue.shard_names) == ["part0.tar", "part1.tar", "part2.tar"]
    assert catalogue.shard_starts.tolist() == [0, 3, 3, 7] and catalogue.shard_starts.dtype == np.int64
    store = ShardStore(catalogue)
    for number, (key, shard, member_spans, content) in enumerate(rows):
        assert catalogue.key(number) == key
        assert catalogue.members(number) == member_spans
        assert catalogue.shard_names[catalogue.records["shard"][number]] == shard
        sample = store.read(number)
        assert (sample.key, sample.number, dict(sample.members)) == (key, number, content)
        assert sample.meta == json.loads(content["json"])
        assert set(store.read(number, {"question.flac"}).members) == {"question.flac"}
    store.close()


def test_lengths_and_names_are_those_of_the_metadata(folder: Path) -> None:
    catalogue = Catalogue.open(folder)
    records = catalogue.records
    assert records["question_s"].tolist() == [n + 0.5 for n in range(7)]
    assert records["answer_chars"].tolist() == list(range(7))
    assert records["units"].tolist() == [n if n % 2 else 0 for n in range(7)]
    assert records["turns"].tolist() == list(range(7))
    assert [catalogue.sources[n] for n in records["source"]] == ["xy"[n % 2] for n in range(7)]
    assert records["text"][0] == 0 and len(set(records["text"].tolist())) == 7


def test_each_shard_has_an_index_of_sample_offsets(folder: Path) -> None:
    rows = known(folder)
    with tarfile.open(folder / "part2.tar") as tar:
        members = list(tar)
    first = {name: min(m.offset for m in members if m.name.startswith(f"{name}.")) for name, *_ in rows[3:]}
    end = max(m.offset_data + -(-m.size // 512) * 512 for m in members)
    assert np.fromfile(folder / "part2.tar.idx", "<u8").tolist() == [*first.values(), end]
    assert np.fromfile(folder / "part1.tar.idx", "<u8").tolist() == [0]


def test_a_length_left_out_is_that_of_the_audio(tmp_path: Path) -> None:
    audio = encode_flac(np.zeros(4000, np.float32))
    write_shards(tmp_path / "d", [{"__key__": "a", "question.flac": audio, "json": {"answer_s": 2}}])
    record = Catalogue.open(tmp_path / "d").records[0]
    assert (record["question_s"], record["answer_s"]) == (0.25, 2.0)


def test_the_index_does_not_depend_on_how_it_was_made(folder: Path, tmp_path: Path) -> None:
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.glob("dataset.json")}
    catalogue = (folder / CATALOGUE_NAME).read_bytes()
    calls: list[tuple[int, ...]] = []
    index_folder(folder, workers=2, progress=lambda *done: calls.append(done))
    assert calls == [(1, 3, 3), (2, 3, 3), (3, 3, 7)]
    assert (folder / CATALOGUE_NAME).read_bytes() == catalogue
    assert {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.glob("dataset.json")} == before
    written = write_shards(
        tmp_path / "w", [{"__key__": f"k{n}", "x.bin": b"1", "json": {}} for n in range(5)], per_shard=2
    )
    assert index_folder(tmp_path / "w") == written


@pytest.mark.parametrize("place", ["start", "middle", "header"])
def test_a_damaged_catalogue_is_refused(folder: Path, place: str) -> None:
    path = folder / CATALOGUE_NAME
    catalogue = Catalogue.open(folder)
    part = catalogue._segments["records"]
    flip(path, {"start": 3, "middle": part["offset"] + 40, "header": 60}[place])
    with pytest.raises(DataError, match="catalogue") as caught:
        Catalogue.open(folder)
    assert caught.value.fix == f"run `echox shards index {folder}`"


@pytest.mark.parametrize("claimed", [1, 1 << 40])
def test_a_catalogue_of_other_records_than_it_claims_is_refused(tmp_path: Path, claimed: int) -> None:
    header_of(tmp_path / "set", lambda header: header.update(samples=claimed))
    with pytest.raises(DataError, match="not of its samples"):
        Catalogue.open(tmp_path / "set")


@pytest.mark.parametrize("segment", ["keys", "members"])
def test_damage_beside_the_records_is_found_by_verify(folder: Path, segment: str) -> None:
    flip(folder / CATALOGUE_NAME, Catalogue.open(folder)._segments[segment]["offset"] + 1)
    with pytest.raises(DataError, match=f"damaged in its segment {segment}"):
        Catalogue.open(folder).verify()


def test_missing_and_stale_files_are_refused_by_name(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        Catalogue.open(folder / "none")
    shard = folder / "part2.tar"
    content = shard.read_bytes()
    shard.write_bytes(content + bytes(512))
    with pytest.raises(DataError, match=rf"part2.tar has {len(content) + 512:,} bytes where .* {len(content):,}"):
        Catalogue.open(folder)
    shard.unlink()
    with pytest.raises(DataError, match=r"part2.tar of the catalogue is missing"):
        Catalogue.open(folder)
    shard.write_bytes(content)
    listing = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps({**listing, "catalogue": "0" * 16}))
    with pytest.raises(DataError, match="belongs to another catalogue"):
        Catalogue.open(folder)
    (folder / "dataset.json").write_text(json.dumps({"version": 1, "shards": []}))
    with pytest.raises(DataError, match="does not name a catalogue"):
        Catalogue.open(folder)
    (folder / CATALOGUE_NAME).unlink()
    with pytest.raises(DataError, match="there is no dataset.catalogue"):
        Catalogue.open(folder)


def test_a_refused_index_leaves_the_old_one(folder: Path) -> None:
    write_tar(folder / "part3.tar", [("./s0.question.flac", b""), ("./s0.json", b"{}")])
    with pytest.raises(DataError, match="s0 is in part0.tar too"):
        index_folder(folder)
    assert Catalogue.open(folder).samples == 7


def test_threads_read_what_one_reads(folder: Path) -> None:
    alone = list(read_folder(folder))
    store = ShardStore(Catalogue.open(folder))
    order = [random.Random(1).randrange(7) for _ in range(500)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(store.read, order)) == [alone[n] for n in order]


class Disk:
    """os.pread that fails a number of times."""

    def __init__(self, code: int, times: int) -> None:
        self.code, self.times, self.true = code, times, os.pread

    def __call__(self, *args: Any) -> bytes:
        if self.times:
            self.times -= 1
            raise OSError(self.code, os.strerror(self.code))
        return self.true(*args)


def test_reading_is_tried_again_and_then_fails_the_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ShardStore(Catalogue.open(folder), retry=QUICK)
    good = store.read(5)
    monkeypatch.setattr(os, "pread", Disk(errno.ESTALE, 2))
    assert store.read(5) == good
    monkeypatch.setattr(os, "pread", Disk(errno.EIO, 10**6))
    with pytest.raises(TransientReadError, match="reading failed 3 times, last: Input/output error") as caught:
        store.read(5)
    assert caught.value.where == str(folder / "part2.tar")
    monkeypatch.setattr(os, "pread", Disk(errno.EACCES, 10**6))
    with pytest.raises(DataError, match="cannot be read: Permission denied"):
        store.read(5)


def test_a_shard_that_shrinks_or_goes_while_it_is_read(folder: Path) -> None:
    store = ShardStore(Catalogue.open(folder), retry=QUICK)
    content = (folder / "part2.tar").read_bytes()
    (folder / "part2.tar").write_bytes(
        content[: content.index(b"PaxHeader", 2000) if b"PaxHeader" in content else 1024]
    )
    with pytest.raises(CorruptSampleError) as caught:
        store.read(6)
    assert caught.value.kind == "truncated"
    (folder / "part0.tar").unlink()
    with pytest.raises(DataError, match="No such file"):
        store.read(0)


def test_a_member_that_is_not_there(folder: Path) -> None:
    sample = ShardStore(Catalogue.open(folder)).read(0)
    with pytest.raises(CorruptSampleError, match="sample ./s0 has no member answer.units") as caught:
        sample["answer.units"]
    assert caught.value.kind == "member"


def test_the_error_keeps_its_kind_between_processes() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(CorruptSampleError("w", kind="decode", where="x", fix="f")))
    assert (error.what, error.kind, error.where, error.fix) == ("w", "decode", "x", "f")


def test_declaring_json_optional_is_refused(folder: Path) -> None:
    with pytest.raises(DataError, match="json member cannot be optional"):
        index_folder(folder, optional=["json"])
