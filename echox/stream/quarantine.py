"""Records permanently damaged samples in a ledger, and limits how many of them a run may drop.

A dropped sample leaves its place in the plan empty, so the order of all others is what it would be without the damage.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from echox.errors import DataError
from echox.files import append_line, write_atomically

FOLDER = "quarantine"
MERGED = "ledger.jsonl"
TREND = 1000
"""Samples a share is taken of at least: one accident at the start is no trend."""


@dataclass(frozen=True)
class Entry:
    """One dropped visit.

    Attributes:
        sample: key of the sample.
        source: the recipe's name of its dataset.
        shard, offset: where it lies.
        kind: class of the damage.
        what: the damage in a sentence.
        epoch, turn: the visit.
        step: optimizer step it was due in, counted from 1.
    """

    sample: str
    source: str
    shard: str
    offset: int
    kind: str
    what: str
    epoch: int
    turn: int
    step: int


class Ledger:
    """Append-only file of one rank, `quarantine/rank-NNNNN.jsonl` in the run folder; made with its first entry."""

    def __init__(self, run_folder: Path, rank: int) -> None:
        self.path = run_folder / FOLDER / f"rank-{rank:05d}.jsonl"

    def append(self, entries: Iterable[Entry]) -> None:
        """Write entries and force them to disk."""
        lines = "\n".join(json.dumps(asdict(entry)) for entry in entries)
        if not lines:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        append_line(self.path, lines, durable=True)


def merge(run_folder: Path) -> list[dict[str, Any]]:
    """Join the ledgers of all ranks and attempts into `quarantine/ledger.jsonl`, by step, each visit once.

    Returns:
        The entries; no file is made where there are none.
    """
    visits: dict[tuple[Any, ...], dict[str, Any]] = {}
    for path in sorted((run_folder / FOLDER).glob("rank-*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue  # A line cut short by a crash: its step was not committed and is done again.
            visits[tuple(entry[name] for name in ("source", "sample", "epoch", "turn"))] = entry
    entries = [visits[visit] for visit in sorted(visits, key=lambda visit: (visits[visit]["step"], visit))]
    if entries:
        merged = run_folder / FOLDER / MERGED
        write_atomically(merged, "".join(json.dumps(entry) + "\n" for entry in entries))
    return entries


@dataclass(frozen=True)
class Allowance:
    """How much a run may drop.

    Attributes:
        most: samples in all; None is any number.
        share: of the samples seen, of `TREND` at least.
    """

    most: int | None
    share: float

    def check(self, dropped: int, seen: int, run_folder: Path) -> None:
        """Stop a run whose data are worse than allowed.

        Raises:
            DataError: with both numbers; the same on every rank, since all count the same.
        """
        over_most = self.most is not None and dropped > self.most
        if not over_most and dropped <= self.share * max(seen, TREND):
            return
        allowed = f"data.quarantine.samples={self.most}" if over_most else f"data.quarantine.share={self.share:g}"
        raise DataError(
            f"{dropped:,} of {seen:,} samples were damaged and dropped, more than {allowed} allows",
            where=str(run_folder / FOLDER),
            fix="repair the shards that the ledgers there name (`echox shards check`), or allow more",
        )
