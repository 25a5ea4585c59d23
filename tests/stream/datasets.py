"""Small datasets to plan and read: real ones on the disk, and catalogues that have lengths and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, cast

import numpy as np

from echox.stream.format.catalogue import Catalogue
from echox.stream.format.scan import JSON, RECORD
from echox.stream.format.writer import write_shards
from echox.stream.sampling.source import Source

Task = Literal["sqa", "tts"]


def make_dataset(folder: Path, samples: int, *, per_shard: int, seed: int = 0, task: Task = "sqa") -> Path:
    """Shards of short members whose lengths, as the metadata says, spread as those of speech do."""
    rng = np.random.default_rng(seed)

    def sample(number: int) -> dict[str, object]:
        units = rng.integers(0, 500, rng.integers(1, 60)).astype("<u2")
        return {
            "__key__": f"{task}{seed}-{number:05d}",
            "question.flac": rng.bytes(int(rng.integers(1, 30))),
            "answer.units": units.tobytes(),
            "json": {
                "id": f"{task}{seed}-{number:05d}",
                "question_text": f"question {number}",
                "answer_text": "a" * int(rng.integers(1, 80)),
                "task": task,
                "question_s": float(rng.lognormal(1.2, 0.6)),
                "answer_s": len(units) / 12.5,
            },
        }

    write_shards(folder, (sample(number) for number in range(samples)), per_shard)
    return folder


def source(folder: Path, task: Task = "sqa", repeat: int = 1, weight: float | None = None) -> Source:
    return Source(folder.name, task, Catalogue.open(folder), repeat, weight)


def sized(
    shards: Sequence[int], *, name: str = "set", task: Task = "sqa", repeat: int = 1, weight: float | None = None
) -> Source:
    """A source with these many samples in its shards, without files; the name decides the lengths."""
    rng = np.random.default_rng(list(name.encode()))
    records = np.zeros(sum(shards), dtype=RECORD)
    records["question_s"] = rng.lognormal(1.2, 0.6, len(records))
    records["units"] = rng.integers(1, 60, len(records))
    records["answer_s"] = records["units"] / 12.5
    records["answer_chars"] = rng.integers(0, 80, len(records))
    catalogue = SimpleNamespace(
        location=f"/data/{name}",
        fingerprint=f"{name:0<64}",
        samples=len(records),
        shard_starts=np.cumsum([0, *shards]),
        records=records,
        tasks=None,
        layouts=[(JSON,)],
    )
    return Source(name, task, cast(Catalogue, catalogue), repeat, weight)
