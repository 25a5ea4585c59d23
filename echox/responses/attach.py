"""Puts the model's own answers on the batches of a stage when they are fetched, by looking them up in tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from echox.engine.interfaces import TrainLoader
from echox.responses.table import ResponseTable
from echox.stream.batch import SpeechBatch
from echox.stream.collate import pad_rows


class Lookup:
    """Answers by the address of a sample.

    Args:
        tables: of each source, by its key.
    """

    def __init__(self, tables: Mapping[int, ResponseTable]) -> None:
        self.tables = dict(tables)

    def attach(self, batch: SpeechBatch) -> SpeechBatch:
        """Set `own_BR` and `own_mask_BR`; a row without a sample, or with a rejected answer, has no token."""
        rows = [self.tables[source].tokens(number).tolist() for source, number in batch.addresses]
        rows += [[]] * (len(batch.weight_B) - len(rows))
        batch.own_BR, batch.own_mask_BR = pad_rows(rows)
        return batch


class AnsweredLoader:
    """A train loader whose batches have the model's own answers when they are fetched, not when they are read ahead.

    Args:
        loader: delivers `SpeechBatch`es.
        lookup: of their answers; its tables may change between steps.
    """

    def __init__(self, loader: TrainLoader, lookup: Lookup) -> None:
        self._loader = loader
        self._lookup = lookup

    def identity(self) -> Mapping[str, Any]:
        """Of the data and their order."""
        return self._loader.identity()

    def start(
        self, *, step: int, run_folder: Path, saved: Mapping[str, Any] | None, accept_new_data: bool = False
    ) -> list[str]:
        """Begin at a step."""
        return self._loader.start(step=step, run_folder=run_folder, saved=saved, accept_new_data=accept_new_data)

    def step(self, step: int) -> Sequence[Any]:
        """The micro-batches of a step, with the answers of the tables of this moment."""
        return [self._lookup.attach(batch) for batch in self._loader.step(step)]  # type: ignore[arg-type]

    def commit(self) -> None:
        """Note that the step delivered last was trained."""
        self._loader.commit()

    def check_accounts(self, account: Sequence[float]) -> Mapping[str, float]:
        """Metrics of the data trained since the last call."""
        return self._loader.check_accounts(account)

    def record(self) -> Mapping[str, Any]:
        """Where the data stand."""
        return self._loader.record()

    def rewind(self, *, step: int, saved: Mapping[str, Any] | None, pass_over: int) -> None:
        """Go back to a saved record."""
        self._loader.rewind(step=step, saved=saved, pass_over=pass_over)

    def close(self) -> None:
        """Stop reading."""
        self._loader.close()


class AnsweredBatches:
    """Validation batches with the model's own answers.

    Args:
        batches: `SpeechBatch`es, iterated anew in every pass.
        lookup: of their answers.
    """

    def __init__(self, batches: Iterable[SpeechBatch], lookup: Lookup) -> None:
        self._batches = batches
        self._lookup = lookup

    def __iter__(self) -> Iterator[SpeechBatch]:
        """One pass."""
        return (self._lookup.attach(batch) for batch in self._batches)
