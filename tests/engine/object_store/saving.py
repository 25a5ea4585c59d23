"""Saves checkpoints into a store as the ranks of two nodes do, one after the other, without an engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
import torch

from echox.engine import rng_state
from echox.engine.checkpoint.manifest import checkpoints_folder, step_name
from echox.engine.checkpoint.retention import Retention
from echox.engine.checkpoint.sharded_state import SavedSlices
from echox.engine.checkpoint.writer import Consolidation, RankPart, publish_whole, write_part
from echox.engine.monitor.run_dir import RunDir
from echox.engine.object_store.checkpoints import PublishedCheckpoints, StoreUpload
from echox.engine.object_store.run_store import RunStore
from echox.stream.storage.retry import Retry

RANKS, ELEMENTS = 2, 500
KINDS = ("fp32", "exp_avg", "exp_avg_sq")
QUICK = Retry(attempts=3, first_wait_s=0.001)
CLOCK = "2026-01-02T03:04:05Z"


def store_of(bucket: str, name: str = "run") -> RunStore:
    return RunStore(f"{bucket}/runs/{name}", QUICK)


def begin(store: RunStore, folder: Path) -> PublishedCheckpoints:
    """Rank 0's start of an attempt on a node."""
    attempt = RunDir(folder, store).next_attempt()
    published = PublishedCheckpoints(store)
    published.begin_attempt(attempt)
    return published


def save(
    published: PublishedCheckpoints,
    nodes: Path,
    step: int,
    *,
    retention: Retention | None = None,
    metrics: dict[str, float] | None = None,
    allowed: Callable[[], None] = lambda: None,
    number: int = 1,
) -> None:
    """One checkpoint of ranks 0 and 1, each on a node of its own."""
    place = f"{step_name(step)}.{published._attempt}.{number}"
    upload = StoreUpload(published, step, place, RANKS)
    files: dict[str, Any] = {}
    upload.begin()
    temporaries = []
    for rank in range(RANKS):
        temporary = checkpoints_folder(nodes / f"node-{rank}") / f".attempt-{step}-{step_name(step)}"
        part = torch.full((ELEMENTS,), float(step))
        written = write_part(
            temporary,
            RankPart(rank=rank, slices={f"{kind}/weight": part.clone() for kind in KINDS}, random=rng_state.capture()),
        )
        upload.part(temporary, written)
        files |= written
        temporaries.append(temporary)
    contents = {"step": step, "metrics": metrics or {}, "world_size": RANKS, "created": CLOCK}
    whole = Consolidation(
        contents=contents,  # type: ignore[arg-type]
        ranks=RANKS,
        trainable={"weight": ((RANKS * ELEMENTS,), torch.float32)},
        buffers={},
        allowed=allowed,
    )
    home = nodes / "node-0"
    publish_whole(temporaries[0], checkpoints_folder(home) / step_name(step), whole, files, upload)
    published.retire(place, metrics or {}, retention or Retention(last=2), home)


def step_in(folder: Path, checkpoint: Path) -> int:
    """The step whose values every part of a checkpoint holds."""
    found = set()
    with SavedSlices(checkpoint, RANKS) as saved:
        for kind in KINDS:
            found |= set(saved.read(f"{kind}/weight", 0, RANKS * ELEMENTS).tolist())
    (value,) = found
    return int(value)


def objects(bucket: str, variables: dict[str, str]) -> dict[str, int]:
    """What the bucket holds, by the store's own word: key to size."""
    client = boto3.client("s3", endpoint_url=variables["AWS_ENDPOINT_URL"], region_name="us-east-1")
    found = client.list_objects_v2(Bucket=bucket.removeprefix("s3://")).get("Contents", [])
    return {each["Key"]: each["Size"] for each in found}
