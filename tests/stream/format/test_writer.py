"""Shards against the standard library's tar and webdataset's own reader."""

from __future__ import annotations

import hashlib
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import webdataset

from echox.errors import DataError
from echox.stream.format.writer import write_shards


def samples(n: int) -> list[dict[str, Any]]:
    return [
        {
            "__key__": f"s{i:03d}",
            "answer.units": bytes([i, 0]),
            "json": {"id": f"s{i:03d}", "question_s": 1.0, "answer_s": 2.6},
        }
        for i in range(n)
    ]


def test_webdataset_reads_back_what_was_written(tmp_path: Path) -> None:
    described = write_shards(tmp_path / "d", iter(samples(7)), per_shard=3)
    assert [shard["samples"] for shard in described["shards"]] == [3, 3, 1]
    assert described["hours"] == pytest.approx(7 * 3.6 / 3600) and described["samples"] == 7
    urls = [str(tmp_path / "d" / shard["name"]) for shard in described["shards"]]
    got = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [g["__key__"] for g in got] == [f"s{i:03d}" for i in range(7)]
    assert got[4]["answer.units"] == bytes([4, 0]) and json.loads(got[4]["json"])["id"] == "s004"
    assert json.loads((tmp_path / "d" / "dataset.json").read_text()) == described


def test_bytes_depend_on_the_samples_alone(tmp_path: Path) -> None:
    first = write_shards(tmp_path / "a", samples(5), per_shard=2)
    second = write_shards(tmp_path / "b", samples(5), per_shard=2)
    assert first == second
    hashes = [hashlib.sha256((tmp_path / "a" / s["name"]).read_bytes()).hexdigest() for s in first["shards"]]
    assert hashes == [s["sha256"] for s in first["shards"]]
    assert first["fingerprint"] == hashlib.sha256("".join(hashes).encode()).hexdigest()
    with tarfile.open(tmp_path / "a" / "shard-000000.tar") as tar:
        assert {(m.mtime, m.uname, m.uid) for m in tar} == {(0, "echox", 0)}
    assert write_shards(tmp_path / "b", samples(4), per_shard=2)["fingerprint"] != first["fingerprint"]


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"__key__": "a.b", "json": {}}, "plain name"),
        ({"__key__": "a/b", "json": {}}, "plain name"),
        ({"json": {}}, "plain name"),
        ({"__key__": "s000", "json": {}}, "twice"),
        ({"__key__": "x"}, "no json"),
        ({"__key__": "x", "json": {}, "question.flac": 3}, "not bytes"),
    ],
)
def test_broken_samples_are_refused_and_leave_the_old_folder(
    tmp_path: Path, broken: dict[str, Any], message: str
) -> None:
    old = write_shards(tmp_path / "d", samples(2), per_shard=1)
    with pytest.raises(DataError, match=message):
        write_shards(tmp_path / "d", [*samples(3), broken], per_shard=1)
    assert json.loads((tmp_path / "d" / "dataset.json").read_text()) == old
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


def test_nothing_to_write_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no samples"):
        write_shards(tmp_path / "d", [], per_shard=1)
    with pytest.raises(DataError, match="per_shard"):
        write_shards(tmp_path / "d", samples(1), per_shard=0)
