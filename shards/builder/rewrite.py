"""Reads a folder of shards back sample by sample, and replaces it by the same samples with something added."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from echox.errors import DataError
from echox.stream.format.catalogue import DATASET_NAME, Catalogue
from echox.stream.format.writer import write_shards
from echox.stream.storage.store import read_folder
from shards.builder.records import PER_SHARD


def read_samples(location: str | Path) -> Iterator[dict[str, Any]]:
    """Samples of a dataset in shard order, checked: {"__key__", "json": decoded, other members: bytes}.

    Raises:
        DataError: no index, or a damaged shard.
    """
    for sample in read_folder(location):
        yield {"__key__": sample.key, **sample.members, "json": sample.meta}


def read_shard(shard: Path) -> Iterator[dict[str, Any]]:
    """Samples of one shard, indexed or not, see `read_samples`.

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
    write_shards(folder, samples, PER_SHARD, optional=Catalogue.open(folder).optional)
    for name, content in kept.items():
        (folder / name).write_bytes(content)
