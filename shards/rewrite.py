"""Reads a folder of shards back sample by sample, and replaces it by the same samples with something added."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from echox.stream.catalogue import DATASET_NAME, Catalogue
from echox.stream.store import read_folder
from echox.stream.writer import write_shards
from shards.records import PER_SHARD


def read_samples(location: str | Path) -> Iterator[dict[str, Any]]:
    """Samples of a dataset in shard order, checked: {"__key__", "json": decoded, other members: bytes}.

    Raises:
        DataError: no index, or a damaged shard.
    """
    for sample in read_folder(location):
        yield {"__key__": sample.key, **sample.members, "json": sample.meta}


def rewrite(folder: Path, samples: Iterable[Mapping[str, Any]]) -> None:
    """Replace a set's shards; the files beside them, which say what it was made of, stay.

    Args:
        folder: the set.
        samples: its new samples, usually its old ones with a member more.
    """
    kept = {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.suffix == ".json" and path.name != DATASET_NAME
    }
    write_shards(folder, samples, PER_SHARD, optional=Catalogue.open(folder).optional)
    for name, content in kept.items():
        (folder / name).write_bytes(content)
