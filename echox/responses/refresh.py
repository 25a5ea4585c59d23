"""Answers the training questions again in the midst of a run, with its present weights, on all ranks in lock step.

Under ZeRO-3 a rank can compute only what all ranks compute with it. So every rank has the same number of batches, some
of them blank, and the ranks agree every few tokens whether all answers have ended. The answers of step N lie in
`<run>/responses/step-N/`. A run that resumes at step s reads the newest ones with N <= s, as it did when it had come
there, and later ones are deleted. None before is: the checkpoint that needs it may still be there.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from echox.responses.attach import Lookup
from echox.responses.decoding import Decoder
from echox.responses.reading import longest_first, read_batch
from echox.responses.table import FOLDER, PARTS, Answer, ResponseTable, complete, write_part
from echox.stream.storage.store import ShardStore

if TYPE_CHECKING:
    from torch import Tensor

    from echox.engine.deepspeed_engine import Engine
    from echox.engine.world import World
    from echox.stream.batch import SpeechBatch
    from echox.stream.collate import SpeechCollate
    from echox.stream.sampling.source import Source

ASK_EVERY = 8
"""Tokens between two questions to all ranks whether their answers have ended."""
_STEP = re.compile(r"step-(\d{8})")


class Refresher:
    """The answers of a run, made again every so many epochs; part of a `StageSetup`.

    Args:
        lookup: that the batches of the run get their answers from; its tables are replaced.
        sources: of the training data.
        collate: samples to batches.
        decoder: makes and judges answers.
        batch: questions answered at once, on one rank.
        every: epochs.
        passes: epochs of the stream that were trained so far, the same on all ranks.
    """

    def __init__(
        self,
        *,
        lookup: Lookup,
        sources: Sequence[Source],
        collate: SpeechCollate,
        decoder: Decoder,
        batch: int,
        every: int,
        passes: Callable[[], float],
    ) -> None:
        self._lookup, self._sources, self._collate, self._decoder = lookup, sources, collate, decoder
        self._batch, self._every, self._passes = batch, every, passes
        self._first = dict(lookup.tables)
        self._folder = Path()
        self._done = 0

    def resume(self, run_folder: Path, step: int, world: World) -> None:
        """Take the newest answers of `step` or before, or the first ones; delete what was made after it."""
        self._folder = run_folder / FOLDER
        newest = None
        if world.is_main:
            for number, folder in sorted(_made(self._folder).items()):
                if number > step or not self._complete(folder):
                    shutil.rmtree(folder)
                else:
                    newest = folder
        self._use(world.broadcast(newest))

    def due(self) -> bool:
        """Whether a whole number of periods has passed since the last answers."""
        return self._periods() > self._done

    def run(self, engine: Engine, world: World, step: int, keep_going: Callable[[], bool]) -> dict[str, float] | None:
        """Answer every training question with the weights after `step` optimizer steps, and use these answers next.

        Args:
            engine: of the run, whose stage has an S2T model.
            world: its processes.
            step: optimizer steps done.
            keep_going: asked before each batch, with the same answer on all ranks; after a no, nothing changes.

        Returns:
            Metrics, or None where it was not to go on.
        """
        folder, periods = self._folder / f"step-{step:08d}", self._periods()
        if world.is_main:
            shutil.rmtree(folder, ignore_errors=True)
            for source in self._sources:
                (folder / _name(source) / PARTS).mkdir(parents=True)
        world.barrier()
        for source in self._sources:
            if not self._answer(source, folder / _name(source), engine, world, keep_going):
                return None
        world.barrier()
        if world.is_main:
            for source in self._sources:
                identity = {
                    **self._first[source.key].record["identity"],
                    "step": step,
                    "periods": periods,
                }
                complete(folder / _name(source), identity, source.catalogue.samples)
        world.barrier()
        self._use(folder)
        tables = [self._lookup.tables[source.key] for source in self._sources]
        rejected = sum(sum(table.rejected.values()) for table in tables)
        return {
            "responses/refreshes": float(self._done),
            "responses/rejected_share": rejected / max(1, sum(table.samples for table in tables)),
        }

    def _answer(
        self, source: Source, folder: Path, engine: Engine, world: World, keep_going: Callable[[], bool]
    ) -> bool:
        """This rank's share of one dataset; whether it was to go on to the end."""
        numbers = longest_first(source)
        batches = [numbers[start : start + self._batch] for start in range(0, len(numbers), self._batch)]
        batches += [[]] * (-len(batches) % world.size)
        store = ShardStore(source.catalogue)
        answers: list[Answer] = []
        try:
            for mine in batches[world.rank :: world.size]:
                if not keep_going():
                    return False
                batch, damaged = read_batch(source, store, self._collate, mine)
                rows = self._generate(engine, world, self._collate.blank(-1) if batch is None else batch)
                answers += [*damaged, *([] if batch is None else self._decoder.judged(batch, rows))]
        finally:
            store.close()
        if answers:
            write_part(folder, answers)
        return True

    def _generate(self, engine: Engine, world: World, batch: SpeechBatch) -> list[list[int]]:
        asked = 0

        def all_ended(ended_B: Tensor) -> bool:
            nonlocal asked
            asked += 1
            return asked % ASK_EVERY == 0 and not any(world.any_of([not bool(ended_B.all())]))

        def job(on_device: SpeechBatch) -> list[list[int]]:
            return self._decoder.generate(engine.stage.s2t, on_device, all_ended)

        with engine.evaluating("answers"):
            rows: list[list[int]] = engine.ds(batch.to(world.device), job)
        return rows

    def _periods(self) -> int:
        return int(self._passes() // self._every)

    def _complete(self, folder: Path) -> bool:
        """Whether a folder has answers to all of the questions of this run."""
        tables = {source.key: ResponseTable.find(folder / _name(source)) for source in self._sources}
        return all(
            table is not None
            and table.record["identity"]["questions"] == self._first[key].record["identity"]["questions"]
            for key, table in tables.items()
        )

    def _use(self, folder: Path | None) -> None:
        self._lookup.tables.update(self._first)
        self._done = 0
        if folder is None:
            return
        for source in self._sources:
            table = ResponseTable.find(folder / _name(source))
            assert table is not None
            self._lookup.tables[source.key] = table
            self._done = int(table.record["identity"]["periods"])


def _made(folder: Path) -> dict[int, Path]:
    """Folders of answers by step."""
    found = folder.iterdir() if folder.is_dir() else iter(())
    return {int(match[1]): path for path in found if (match := _STEP.fullmatch(path.name))}


def _name(source: Source) -> str:
    return f"{source.name}-{source.catalogue.fingerprint[:12]}"
