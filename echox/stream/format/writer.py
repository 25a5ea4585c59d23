"""Writes samples to a folder of shards: plain tars through webdataset's writer, the same bytes for the same samples."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from webdataset.writer import TarWriter

from echox.errors import DataError
from echox.files import rename_to_free
from echox.stream.format.indexing import CatalogueBuilder
from echox.stream.format.scan import scan_shard, write_index


def _encode(sample: Mapping[str, Any], seen: set[str]) -> dict[str, Any]:
    """Members as bytes, checked against the data contract."""
    key = sample.get("__key__")
    if not isinstance(key, str) or not key or "." in key or "/" in key:
        raise DataError(
            f"Sample key {key!r} is not a plain name",
            fix="Use letters, digits, - and _; a dot would start the extension.",
        )
    if key in seen:
        raise DataError(f"Sample key {key!r} occurs twice")
    seen.add(key)
    if not isinstance(sample.get("json"), Mapping):
        raise DataError(f"Sample {key!r} has no json member", fix="Give its id, texts, task and durations.")
    encoded: dict[str, Any] = {"__key__": key}
    for name, value in sample.items():
        if name == "__key__":
            continue
        if isinstance(value, Mapping):
            value = json.dumps(value, ensure_ascii=False, sort_keys=True).encode()
        if not isinstance(value, bytes):
            raise DataError(f"Member {name} of sample {key!r} is a {type(value).__name__}, not bytes")
        encoded[name] = value
    return encoded


def _write_shard(path: Path, samples: list[dict[str, Any]]) -> None:
    # Fixed times and names: the hash of a shard is a function of its samples alone.
    fixed = {"user": "echox", "group": "echox", "mode": 0o644, "mtime": 0}
    with path.open("wb") as file, TarWriter(file, encoder=False, compress=False, **fixed) as tar:
        for sample in samples:
            tar.write(sample)


def write_shards(
    folder: str | Path,
    samples: Iterable[Mapping[str, Any]],
    per_shard: int = 256,
    *,
    optional: Collection[str] = (),
) -> dict[str, Any]:
    """Write `shard-000000.tar`, their indexes, the catalogue and `dataset.json`; the folder appears when complete.

    Args:
        folder: where the shards go; an existing one is replaced.
        samples: each {"__key__": name without a dot, "json": mapping, other members: bytes}; consumed one at a time.
        per_shard: samples a shard.
        optional: members that a sample may lack; all others are in every sample.

    Returns:
        The content of `dataset.json`, see `index_folder`.

    Raises:
        DataError: a dotted, repeated or missing key, no json member, a member that is not bytes, members unlike those
            of the samples before, lengths that are not numbers, or no sample at all.
    """
    if per_shard < 1:
        raise DataError(f"per_shard is {per_shard}, but a shard holds at least one sample")
    final = Path(folder)
    building = final.with_name(f".{final.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    seen: set[str] = set()
    pending: list[dict[str, Any]] = []
    shards = 0

    def flush() -> None:
        nonlocal shards
        path = building / f"shard-{shards:06d}.tar"
        _write_shard(path, pending)
        # Read back, so that what is indexed is what lies on the disk.
        table = scan_shard(path, optional)
        write_index(path, table)
        builder.add(path.name, table)
        pending.clear()
        shards += 1

    try:
        with CatalogueBuilder(building, optional) as builder:
            for sample in samples:
                pending.append(_encode(sample, seen))
                if len(pending) == per_shard:
                    flush()
            if pending:
                flush()
            if not shards:
                raise DataError(f"There are no samples to write into {final}", where=str(final))
            listing = builder.finish()
        shutil.rmtree(final, ignore_errors=True)
        rename_to_free(building, final)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return listing
