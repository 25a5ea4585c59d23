"""A folder of shards from samples: plain tars through webdataset's writer, the same bytes for the same samples."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from webdataset.writer import TarWriter

from echox.errors import DataError
from echox.release.checksums import sha256_file

DATASET_NAME = "dataset.json"


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


def _write_shard(path: Path, samples: list[dict[str, Any]]) -> dict[str, Any]:
    # Fixed times and names: the hash of a shard is a function of its samples alone.
    fixed = {"user": "echox", "group": "echox", "mode": 0o644, "mtime": 0}
    with path.open("wb") as file, TarWriter(file, encoder=False, compress=False, **fixed) as tar:
        for sample in samples:
            tar.write(sample)
    return {"name": path.name, "sha256": sha256_file(path), "samples": len(samples), "bytes": path.stat().st_size}


def write_shards(folder: str | Path, samples: Iterable[Mapping[str, Any]], per_shard: int = 256) -> dict[str, Any]:
    """Write `shard-000000.tar`, … and `dataset.json`; the folder appears only when it is complete.

    Args:
        folder: where the shards go; an existing one is replaced.
        samples: each {"__key__": name without a dot, "json": mapping, other members: bytes}; consumed one at a time.
        per_shard: samples a shard.

    Returns:
        The content of `dataset.json`: {"version", "samples", "shards", "hours", "fingerprint"}; hours are those of
        `question_s` and `answer_s` together, the fingerprint is SHA-256 over the shards' hashes in order.

    Raises:
        DataError: a dotted, repeated or missing key, no json member, a member that is not bytes, or no sample at all.
    """
    if per_shard < 1:
        raise DataError(f"per_shard is {per_shard}, but a shard holds at least one sample")
    final = Path(folder)
    building = final.with_name(f".{final.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    shards: list[dict[str, Any]] = []
    seen: set[str] = set()
    seconds = 0.0
    pending: list[dict[str, Any]] = []

    def flush() -> None:
        if pending:
            shards.append(_write_shard(building / f"shard-{len(shards):06d}.tar", pending))
            pending.clear()

    try:
        for sample in samples:
            pending.append(_encode(sample, seen))
            meta = sample["json"]
            seconds += float(meta.get("question_s") or 0.0) + float(meta.get("answer_s") or 0.0)
            if len(pending) == per_shard:
                flush()
        flush()
        if not shards:
            raise DataError(f"There are no samples to write into {final}", where=str(final))
        described = {
            "version": 1,
            "samples": len(seen),
            "shards": shards,
            "hours": round(seconds / 3600, 6),
            "fingerprint": hashlib.sha256("".join(shard["sha256"] for shard in shards).encode()).hexdigest(),
        }
        (building / DATASET_NAME).write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
        shutil.rmtree(final, ignore_errors=True)
        building.rename(final)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return described
