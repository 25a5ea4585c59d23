"""Counts what the ranks trained, beside the losses, and checks it against the plan: exactly-once accounting.

Every micro-batch carries a vector of numbers. They are added over ranks and micro-batches by an all-reduce that runs
anyway, stay on the device, and are compared with the plan when the metrics are read. The hashes of all visits, trained
and dropped, must add up to the plan's modulo 2^64: a lost, repeated or foreign sample changes the sum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypedDict

import numpy as np

from echox.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from echox.stream.sampling.plan import Window

KINDS = ("checksum", "truncated", "member", "decode", "schema", "empty", "other")
"""Classes of damage that are counted apart."""
COLUMNS = ("samples", "seconds", "tokens", "length", "padded", "quarantined", "cut", "cut_s", "turns_dropped")
"""Numbers kept of each source; `length` and `padded` are what the budget counts, without and with padding.

`cut` and `cut_s` are the samples trained without the end of their audio, and the seconds that they lack of it;
`turns_dropped` are turns of the dialogues before their questions that had no room in the prompt.
"""
_TRAINED, _DROPPED = slice(0, 3), slice(3, 6)
_KINDS = slice(6, 6 + len(KINDS))
_FIXED = _KINDS.stop
_BITS = 22
_MASK = (1 << _BITS) - 1
_WRAP = (1 << 64) - 1


def micro_batch_account(
    window: Window,
    trained: NDArray[np.int64],
    hashes_N: NDArray[np.uint64],
    dropped: Mapping[int, str],
    sources: int,
    cut_s_N: NDArray[np.float64] | None = None,
    turns_dropped_N: NDArray[np.float64] | None = None,
) -> NDArray[np.float64]:
    """The vector of one micro-batch; counts and hashes in it may be added up in float64 without loss.

    Args:
        window: that it belongs to.
        trained: places of the samples in the batch.
        hashes_N: visit hashes of those, of what was really read.
        dropped: places of the samples that were not usable, and the kind of their damage.
        sources: of the run.
        cut_s_N: seconds of audio that each sample in the batch lacks; None where all is there.
        turns_dropped_N: the same of turns before the question.
    """
    vector = np.zeros(_FIXED + sources * len(COLUMNS))
    table = vector[_FIXED:].reshape(sources, len(COLUMNS))
    gone = np.fromiter(dropped, dtype=np.int64, count=len(dropped))
    vector[_TRAINED] = split64(sum64(hashes_N))
    vector[_DROPPED] = split64(sum64(window.hash_N[gone]))
    for kind in dropped.values():
        vector[_KINDS.start + (KINDS.index(kind) if kind in KINDS else len(KINDS) - 1)] += 1
    longest = window.length_N[trained].max(initial=0.0)
    columns = (
        np.ones(len(trained)),
        window.seconds_N[trained],
        window.tokens_N[trained],
        window.length_N[trained],
        np.full(len(trained), longest),
    )
    for column, values in enumerate(columns):
        table[:, column] = np.bincount(window.source_N[trained], weights=values, minlength=sources)
    table[:, 5] = np.bincount(window.source_N[gone], minlength=sources)
    if cut_s_N is not None:
        for column, values in ((6, cut_s_N > 0), (7, cut_s_N)):
            table[:, column] = np.bincount(window.source_N[trained], weights=values, minlength=sources)
    if turns_dropped_N is not None:
        table[:, 8] = np.bincount(window.source_N[trained], weights=turns_dropped_N, minlength=sources)
    return vector


class AccountsRecord(TypedDict):
    """What a checkpoint holds of `Accounts`; multisets are 64-bit sums in hexadecimal.

    Attributes:
        sources: what each source has given, by `COLUMNS`.
        multiset, quarantined_multiset: sums of the hashes of all visits, and of those dropped.
        kinds: dropped samples by kind of damage.
        passed_over: samples left out by rewinding.
    """

    sources: list[dict[str, float]]
    multiset: str
    quarantined_multiset: str
    kinds: dict[str, int]
    passed_over: int


class Accounts:
    """What a run has trained so far, of each source, and whether that is what the plan says.

    Attributes:
        table: rows are sources, columns `COLUMNS`; of all checked steps.
        multiset, quarantined_multiset: sums modulo 2^64 of the visit hashes, planned and dropped.
        kinds: dropped samples by class of damage.
        passed_over: samples of steps that a run left out to get past data that harmed it.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.table = np.zeros((len(names), len(COLUMNS)))
        self.multiset = 0
        self.quarantined_multiset = 0
        self.kinds = dict.fromkeys(KINDS, 0)
        self.passed_over = 0
        self._planned_samples = 0
        self._planned = 0

    @property
    def seen(self) -> int:
        """Samples whose turn has come, those dropped or passed over included."""
        return int(self.table[:, 0].sum()) + self.quarantined + self.passed_over

    @property
    def planned(self) -> int:
        """Samples whose turn has come, those of steps included that were trained and not checked yet."""
        return self.seen + self._planned_samples

    @property
    def quarantined(self) -> int:
        """Samples that were dropped."""
        return int(self.table[:, 5].sum())

    def expect(self, window: Window, step: int) -> None:
        """Note that a planned step was trained."""
        indices = window.samples(step)
        self._planned_samples += len(indices)
        self._planned = (self._planned + sum64(window.hash_N[indices])) & _WRAP

    def check(self, vector: Sequence[float]) -> dict[str, float]:
        """Compare the summed vectors of all ranks since the last call with the plan, and book them.

        Returns:
            Metrics by their stable names.

        Raises:
            DataError: the samples trained are not those of the plan; the same on every rank.
        """
        numbers = np.asarray(vector, dtype=np.float64)
        table = numbers[_FIXED:].reshape(len(self.names), len(COLUMNS))
        dropped = join64(numbers[_DROPPED])
        found = int(table[:, 0].sum()) + int(table[:, 5].sum())
        if (join64(numbers[_TRAINED]) + dropped) & _WRAP != self._planned:
            raise DataError(
                f"the samples trained since the last report are not those of the plan: {found:,} of "
                f"{self._planned_samples:,} planned ones, or others in their place",
                where="data.train",
                fix="resume from the last checkpoint, and report this with the log of every rank",
            )
        self.table += table
        self.multiset = (self.multiset + self._planned) & _WRAP
        self.quarantined_multiset = (self.quarantined_multiset + dropped) & _WRAP
        for kind, count in zip(KINDS, numbers[_KINDS], strict=True):
            self.kinds[kind] += int(count)
        self._planned = self._planned_samples = 0
        return self._metrics(table)

    def _metrics(self, recent: NDArray[np.float64]) -> dict[str, float]:
        metrics = {"data/samples": float(self.seen), "data/quarantined": float(self.quarantined)}
        if self.passed_over:
            metrics["data/passed_over"] = float(self.passed_over)
        cut, cut_s = self.table[:, 6:8].sum(0).tolist()
        metrics |= {"data/cut": cut, "data/cut_s": cut_s}
        if dropped := float(self.table[:, 8].sum()):
            metrics["data/turns_dropped"] = dropped
        metrics |= {f"data/quarantined/{kind}": float(count) for kind, count in self.kinds.items() if count}
        for name, row, now in zip(self.names, self.table, recent, strict=True):
            for column in ("samples", "seconds", "tokens", "quarantined"):
                metrics[f"data/{name}/{column}"] = float(row[COLUMNS.index(column)])
            if row[6]:
                metrics |= {f"data/{name}/cut": float(row[6]), f"data/{name}/cut_s": float(row[7])}
            if now[4]:
                metrics[f"data/{name}/padding_share"] = float(1 - now[3] / now[4])
        return metrics

    def to_json(self) -> AccountsRecord:
        """Everything but unchecked steps; JSON types."""
        return {
            "sources": [dict(zip(COLUMNS, row, strict=True)) for row in self.table.tolist()],
            "multiset": f"{self.multiset:016x}",
            "quarantined_multiset": f"{self.quarantined_multiset:016x}",
            "kinds": {kind: count for kind, count in self.kinds.items() if count},
            "passed_over": self.passed_over,
        }

    def load(self, record: AccountsRecord) -> None:
        """Continue from what `to_json` gave for the same sources; a column that was not kept then begins at 0."""
        rows = [[row.get(column, 0.0) for column in COLUMNS] for row in record["sources"]]
        self.table = np.array(rows, dtype=np.float64)
        self.multiset = int(record["multiset"], 16)
        self.quarantined_multiset = int(record["quarantined_multiset"], 16)
        self.kinds |= record["kinds"]
        self.passed_over = record["passed_over"]


def sum64(hashes_N: NDArray[np.uint64]) -> int:
    """Sum modulo 2^64, whatever the order."""
    return int(np.add.reduce(hashes_N, dtype=np.uint64))


def split64(value: int) -> tuple[int, int, int]:
    """A 64-bit number as parts of 22 bits: float64 adds up 2^31 of them exactly."""
    return value & _MASK, (value >> _BITS) & _MASK, value >> 2 * _BITS


def join64(parts: Sequence[float] | NDArray[np.float64]) -> int:
    """The sum modulo 2^64 of numbers whose parts were added up."""
    low, middle, high = (int(part) for part in parts)
    return (low + (middle << _BITS) + (high << 2 * _BITS)) & _WRAP
