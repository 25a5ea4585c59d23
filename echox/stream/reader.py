"""Reads and decodes the micro-batches of one rank ahead in threads; the plan alone decides what comes when."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from echox.errors import CorruptSampleError
from echox.stream import cursor
from echox.stream.accounting import Accounts, micro_batch_account
from echox.stream.quarantine import Allowance, Entry, Ledger
from echox.stream.sampling.plan import Plan, StepAddress, Window, check_divides, visit_hash

if TYPE_CHECKING:
    from echox.stream.collate import Collate
    from echox.stream.sampling.batching import SampleIndices
    from echox.stream.storage.store import ShardStore


@dataclass(frozen=True)
class _Read:
    """A micro-batch and what of it was damaged."""

    batch: Any
    dropped: list[Entry]


@dataclass
class _Step:
    """A step on its way: its address, the next one's, and its micro-batches of this rank."""

    address: StepAddress
    following: StepAddress
    window: Window
    reads: list[Future[_Read]]
    dropped: list[Entry] = field(default_factory=list)


class StreamReader:
    """The rank's training data from an address in the stream on.

    `step` delivers, `commit` says that the optimizer has stepped: only then does the cursor move and the quarantine
    ledger grow, so what was read ahead and never trained leaves no trace.

    Args:
        plan: of the stream, the same on all ranks.
        stores: where each source's samples are read.
        collate: samples to a batch.
        rank, world_size: of this process.
        threads: that read and decode.
        prefetch: micro-batches read ahead.
        allowance: how much the run may drop.
        pin: leave batches where a GPU copies them from by itself; the reading threads do it.

    Raises:
        RecipeError: the world size does not divide the micro-batches of a step.
    """

    def __init__(
        self,
        plan: Plan,
        stores: Sequence[ShardStore],
        collate: Collate[Any, Any],
        *,
        rank: int,
        world_size: int,
        threads: int,
        prefetch: int,
        allowance: Allowance,
        pin: bool = False,
    ) -> None:
        check_divides(plan.budget.micro_batches, world_size)
        self.plan = plan
        self.accounts = Accounts([source.name for source in plan.sources])
        self._stores = stores
        self._collate = collate
        self._rank = rank
        self._world_size = world_size
        self._allowance = allowance
        self._pin = pin
        self._steps_ahead = max(1, -(-prefetch * world_size // plan.budget.micro_batches))
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="reader")
        self._planner = ThreadPoolExecutor(1, thread_name_prefix="planner")
        self._windows: dict[StepAddress, Future[Window]] = {}
        self._ahead: deque[_Step] = deque()
        self._delivered: _Step | None = None
        self._next = self._committed = StepAddress()
        self._number = 0
        self._run_folder = Path()
        self._ledger: Ledger | None = None

    def identity(self) -> dict[str, Any]:
        """What must be the same on all ranks; JSON types."""
        return {"seed": self.plan.seed, "plan": self.plan.parameters(), "data": self.plan.data()}

    def start(
        self, *, step: int, run_folder: Path, saved: Mapping[str, Any] | None, accept_new_data: bool = False
    ) -> list[str]:
        """Begin at optimizer step `step` (from 0), where the saved record stands, or at the beginning.

        Returns:
            What is not as it was and was accepted, a clause each.

        Raises:
            CheckpointError: data, plan or seed have changed; the same on all ranks.
        """
        new: list[str] = []
        if saved is not None:
            self._committed, new = cursor.resume(
                self.plan, saved, self.accounts, accept_new_data=accept_new_data, where=str(run_folder)
            )
        self._next, self._number = self._committed, step
        self._run_folder, self._ledger = run_folder, Ledger(run_folder, self._rank)
        self._stage(self._window(self._next))
        return new

    def step(self, step: int) -> list[Any]:
        """The rank's micro-batches of optimizer step `step`: G / world size of them, one after the other every step.

        Raises:
            TransientReadError: storage failed again and again.
            DataError: a shard is gone.
            ValueError: it is not the turn of that step.
        """
        while len(self._ahead) <= self._steps_ahead:
            self._ahead.append(self._submit())
        turn = self._number - len(self._ahead)
        if step != turn:
            raise ValueError(f"step {step} was asked for when {turn} was due")
        due = self._ahead.popleft()
        reads = [read.result() for read in due.reads]
        due.dropped = [entry for read in reads for entry in read.dropped]
        if self._delivered is None or self._delivered.window is not due.window:
            self._planner.submit(self._stage_after, due.window)  # nothing reads the window before it any more
        self._delivered = due
        return [read.batch for read in reads]

    def commit(self) -> None:
        """Note that the step delivered last was trained."""
        done = self._delivered
        assert done is not None and self._ledger is not None
        self.accounts.expect(done.window, done.address.step)
        self._ledger.append(done.dropped)
        self._committed = done.following

    def check_accounts(self, account: Sequence[float]) -> dict[str, float]:
        """Compare what all ranks have trained since the last call with the plan; metrics by their stable names.

        Args:
            account: sum of the batches' vectors over ranks, micro-batches and steps.

        Raises:
            DataError: it is not what was planned, or more was dropped than allowed; the same on all ranks.
        """
        metrics = self.accounts.check(account)
        metrics["data/epoch"] = self.accounts.seen / self.plan.samples_per_epoch
        self._allowance.check(self.accounts.quarantined, self.accounts.seen, self._run_folder)
        return metrics

    def passes(self) -> float:
        """Epochs trained so far, those of a blend counted by its samples; the same on all ranks."""
        return self.accounts.planned / self.plan.samples_per_epoch

    def record(self) -> cursor.StreamRecord:
        """Where the stream stands after the committed and checked steps; the same on all ranks; JSON types."""
        return cursor.record(self.plan, self._committed, self.accounts)

    def rewind(self, *, step: int, saved: Mapping[str, Any] | None, pass_over: int) -> None:
        """Go back to a saved record (None: the beginning), and on behind the next `pass_over` steps.

        Their samples are counted as passed over. The next step asked for is optimizer step `step`.
        """
        for ahead in self._ahead:
            for read in ahead.reads:
                read.cancel()
        self._ahead.clear()
        self._delivered = None
        self.accounts = Accounts([source.name for source in self.plan.sources])
        address = StepAddress()
        if saved is not None:
            address, _ = cursor.resume(
                self.plan, saved, self.accounts, accept_new_data=False, where=str(self._run_folder)
            )
        for _ in range(pass_over):
            window = self._window(address)
            self.accounts.passed_over += len(window.samples(address.step))
            address = self.plan.following(address, len(window.steps))
        self._next, self._number = address, step
        self._committed = address
        self._stage(self._window(address))

    def close(self) -> None:
        """Drop what was read ahead, and let go of the shards."""
        for pool in (self._planner, self._pool):
            pool.shutdown(cancel_futures=True)
        for store in self._stores:
            store.close()

    def _submit(self) -> _Step:
        window, address = self._window(self._next), self._next
        following = self.plan.following(address, len(window.steps))
        slots = window.slots(address.step, self._rank, self._world_size)
        reads = [self._pool.submit(self._read, window, indices, self._number) for indices in slots]
        self._next, self._number = following, self._number + 1
        return _Step(address, following, window, reads)

    def _window(self, address: StepAddress) -> Window:
        """The window of an address; the one after it is planned in the background."""
        wanted = address._replace(step=0)
        after = self.plan.next_window(wanted)
        for known in (wanted, after):
            if known not in self._windows:
                self._windows[known] = self._planner.submit(self.plan.window, known.epoch, known.window)
        self._windows = {known: self._windows[known] for known in (wanted, after)}
        return self._windows[wanted].result()

    def _stage_after(self, window: Window) -> None:
        after = self.plan.next_window(window.address)
        planned = self._windows.get(after)
        self._stage(self.plan.window(after.epoch, after.window) if planned is None else planned.result())

    def _stage(self, window: Window) -> None:
        for index, (source, store) in enumerate(zip(self.plan.sources, self._stores, strict=True)):
            numbers = window.number_N[window.source_N == index]
            store.stage(np.unique(source.catalogue.records["shard"][numbers]).tolist())

    def _read(self, window: Window, indices: SampleIndices, step: int) -> _Read:
        from echox.stream.collate import Item

        rows, trained, numbers = [], [], []
        damaged: dict[int, CorruptSampleError] = {}
        for index in indices.tolist():
            source = int(window.source_N[index])
            try:
                sample = self._stores[source].read(int(window.number_N[index]), self._collate.members)
                of = self.plan.sources[source]
                rows.append(self._collate.decode(Item(sample, of.task, source=of.key)))
            except CorruptSampleError as error:
                damaged[index] = error
                continue
            trained.append(index)
            numbers.append(sample.number)
        batch = self._collate.join(rows, step) if rows else self._collate.blank(step)
        kept = np.array(trained, dtype=np.int64)
        keys = np.array([source.key for source in self.plan.sources], dtype=np.uint64)[window.source_N[kept]]
        hashes = visit_hash(keys, window.epoch_N[kept], window.turn_N[kept], np.array(numbers, dtype=np.int64))
        kinds = {index: error.kind for index, error in damaged.items()}
        cut_s = np.array([getattr(row, "cut_s", 0.0) for row in rows])
        dropped = np.array([getattr(row, "turns_dropped", 0) for row in rows], dtype=np.float64)
        batch.account = micro_batch_account(window, kept, hashes, kinds, len(self.plan.sources), cut_s, dropped)
        batch = batch.pinned() if self._pin else batch
        return _Read(batch, [self._entry(window, index, error, step) for index, error in damaged.items()])

    def _entry(self, window: Window, index: int, error: CorruptSampleError, step: int) -> Entry:
        source, number = self.plan.sources[int(window.source_N[index])], int(window.number_N[index])
        record = source.catalogue.records[number]
        return Entry(
            sample=source.catalogue.key(number),
            source=source.path,
            shard=source.catalogue.shard_names[int(record["shard"])],
            offset=int(record["offset"]),
            kind=error.kind,
            what=error.what,
            epoch=int(window.epoch_N[index]),
            turn=int(window.turn_N[index]),
            step=step + 1,
        )
