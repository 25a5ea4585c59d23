"""Publishes a folder of shards with `dataset.json`, what it was built from, and what was rejected."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from echox.errors import DataError
from echox.stream.format.catalogue import DATASET_NAME
from echox.stream.format.indexing import index_folder
from shards.builder.convert import tar_path
from shards.builder.records import digest, read_json, write_json

BUILD_NAME = "build.json"
"""What the shards were built from."""
LEDGER_NAME = "rejected.jsonl"
"""Utterances that were left out and why, one a line."""
_COMPLETE = "complete"


def is_built(out: Path) -> bool:
    """Whether the folder holds shards that a recipe has built.

    Raises:
        DataError: it holds something else.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if read_json(out / BUILD_NAME) is None or read_json(out / DATASET_NAME) is None:
        raise DataError("The folder for the shards holds something else", where=str(out), fix="Name another --out.")
    return True


def write_ledger(path: Path, records: list[dict[str, Any]]) -> dict[str, Any]:
    """Write what was rejected, in order; returns the first."""
    rejected = [
        {"id": item["id"], "reason": item["reason"], "files": [file[0] for file in item["files"]]}
        for record in records
        for item in record["rejected"]
    ]
    path.write_text("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in rejected), encoding="utf-8")
    return rejected[0] if rejected else {}


def publish(work: Path, out: Path, records: list[dict[str, Any]], workers: int = 1) -> dict[str, Any]:
    """Give the shards their final numbers and the folder its name; shards without a sample are left out.

    Args:
        work: folder of the build.
        out: the folder of shards; an existing one is replaced.
        records: of all shards in order, as `convert` returns them.
        workers: processes that index the shards.

    Returns:
        The content of `dataset.json`.

    Raises:
        DataError: no utterance could be used.
    """
    ready = stage(work)
    shards = 0
    write_ledger(ready / LEDGER_NAME, records)
    for number, record in enumerate(records):
        if record["samples"]:
            add_shard(tar_path(work, number), ready / f"shard-{shards:06d}.tar")
            shards += 1
    if not shards:
        raise DataError("Not one utterance could be used", where=str(ready / LEDGER_NAME), fix="Read there why.")
    described = index(ready, records, workers)
    write_json(ready / BUILD_NAME, {"version": 1, "identity": digest([record["identity"] for record in records])})
    complete(work, out)
    return described


def stage(work: Path) -> Path:
    """An empty folder to put finished shards in, before it gets its name in one step."""
    ready = work / "ready"
    shutil.rmtree(ready, ignore_errors=True)
    ready.mkdir()
    return ready


def add_shard(path: Path, name: Path) -> None:
    """Give a finished shard its final name too; the old one stays, so that an interruption loses nothing."""
    try:
        name.hardlink_to(path)
    except OSError:
        # A file system without hard links; an interruption here costs the shards already moved.
        path.rename(name)


def complete(work: Path, out: Path) -> None:
    """Put the staged folder in the place of `out`, in two steps between which it may be killed."""
    (work / "ready").rename(work / _COMPLETE)
    finish_publishing(work, out)


def finish_publishing(work: Path, out: Path) -> None:
    """Put a complete folder in its place that an interruption left behind, and clear away what it was made from."""
    if not (work / _COMPLETE).is_dir():
        return
    shutil.rmtree(out, ignore_errors=True)
    (work / _COMPLETE).rename(out)
    for path in work.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name.startswith("part-") or path.name == LEDGER_NAME:
            path.unlink()


def index(folder: Path, records: list[dict[str, Any]], workers: int) -> dict[str, Any]:
    """Make the shards a dataset (`dataset.json`, the catalogue and an index beside each), read back from the disk.

    Members that not every sample has are the optional ones.

    Args:
        folder: where the shards lie.
        records: of all shards, see `convert`.
        workers: processes that read.
    """
    samples, members = sum(record["samples"] for record in records), Counter[str]()
    for record in records:
        members.update(record["members"])
    optional = {extension for extension, count in members.items() if count < samples}
    return index_folder(folder, optional=optional, workers=workers)
