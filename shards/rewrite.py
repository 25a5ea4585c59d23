"""Reads a folder of shards back sample by sample, and replaces it by the same samples with something added."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from echox.errors import DataError
from echox.stream.writer import DATASET_NAME, write_shards
from shards.records import PER_SHARD, read_json


def read_samples(folder: Path) -> Iterator[dict[str, Any]]:
    """Samples of a set in shard order: {"__key__", "json": decoded, other members: bytes}.

    Raises:
        DataError: no `dataset.json`, or a shard that cannot be read.
    """
    described = read_json(folder / DATASET_NAME)
    if described is None:
        raise DataError(f"{folder.name} has not been built", where=str(folder), fix="Build the corpus.")
    for shard in described["shards"]:
        yield from read_shard(folder / shard["name"])


def read_shard(shard: Path) -> Iterator[dict[str, Any]]:
    """Samples of one shard, see `read_samples`.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with tarfile.open(shard, "r:") as tar:
            sample: dict[str, Any] = {}
            for member in tar:
                key, _, extension = member.name.partition(".")
                if sample and sample["__key__"] != key:
                    yield sample
                    sample = {}
                handle = tar.extractfile(member)
                data = handle.read() if handle is not None else b""
                sample["__key__"] = key
                sample[extension] = json.loads(data) if extension == "json" else data
            if sample:
                yield sample
    except (OSError, tarfile.TarError, ValueError) as error:
        raise DataError(
            f"Cannot read {shard.name}: {error}", where=str(shard.parent), fix="Build the corpus again."
        ) from error


def rewrite(folder: Path, samples: Iterable[Mapping[str, Any]]) -> None:
    """Replace a set's shards; the files beside them, which say what it was made of, stay.

    Args:
        folder: the set.
        samples: its new samples, usually its old ones with a member more.
    """
    kept = {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.suffix in (".json", ".jsonl") and path.name != DATASET_NAME
    }
    write_shards(folder, samples, PER_SHARD)
    for name, content in kept.items():
        (folder / name).write_bytes(content)
