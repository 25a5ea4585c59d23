"""Runs the training loop: optimizer steps, and between them the saves, stops and rewinds that all ranks agree on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from echox.engine import rng_state
from echox.engine.checkpoint.checkpointer import Checkpointer, Published
from echox.engine.monitor.metrics import step_metrics
from echox.engine.monitor.step_timer import StepTimer
from echox.engine.rank_status import RankStatus, Vote
from echox.engine.step import StepSums, train_step, validate
from echox.errors import CheckpointError
from echox.stream.quarantine import merge as merge_ledgers

if TYPE_CHECKING:
    from torch import Tensor

    from echox.config.schema import Recipe
    from echox.engine.checkpoint.contents import Cursor
    from echox.engine.context import RunContext
    from echox.engine.deepspeed_engine import Engine
    from echox.engine.interfaces import BatchLike, StageSetup
    from echox.engine.loss_guard import LossGuard
    from echox.engine.monitor.reporter import Reporter
    from echox.engine.monitor.watchdog import Watchdog
    from echox.engine.stop import StopListener
    from echox.engine.train_state import TrainState
    from echox.engine.world import World


@dataclass(kw_only=True)
class Loop:
    """Everything one rank trains with; `run` does the steps that are left.

    Attributes:
        state: where the run stands; only the loop changes it.
    """

    recipe: Recipe
    context: RunContext
    world: World
    engine: Engine
    setup: StageSetup
    checkpointer: Checkpointer
    reporter: Reporter
    health: LossGuard
    listener: StopListener
    watchdog: Watchdog
    state: TrainState
    _rank_status: RankStatus = field(init=False)
    _timer: StepTimer = field(default_factory=StepTimer)
    _account_A: Tensor | None = None

    def __post_init__(self) -> None:
        self._rank_status = RankStatus(self.world)

    def run(self) -> None:
        """Train to the last step, or until the ranks agree to stop; what was trained is saved when this returns."""
        reporter, steps = self.reporter, self.recipe.optim.steps
        first = self.state.saved_step = self.state.step
        self._apply_votes(self._rank_status.exchange_now(self._vote()))
        self.engine.ds.train()
        if self.setup.refresh is not None:
            self.setup.refresh.resume(reporter.folder.path, self.state.step, self.world)
        while self.state.step < steps and not self.state.stopped:
            self._refresh()
            if self.state.stopped:
                self._save()
                break
            self._train(first)
            if self.state.bad_step and self._go_back():
                continue
            self._apply_votes(self._rank_status.exchange(self._vote()))
            due = self._due(self.recipe.engine.validate_every) and not self.state.stopped
            if due:
                self._validate()
            if self.state.stopped or self._due(self.recipe.engine.checkpoint_every):
                self._save()
            reporter.progress("stopping" if self.state.stopped else "training")
        self._finish_save(last=True)
        self._rank_status.collect()

    def _train(self, first: int) -> None:
        """One optimizer step, with its metrics where they are due."""
        plan, step = self.recipe.engine, self.state.step
        self.watchdog.beat(step, timed=True)
        rates = self.engine.set_learning_rates(step)
        batches = self._fetch_batches(step)
        sums = train_step(self.engine, batches, step, self.world, self.health)
        self.state.bad_step = self.engine.skipped_last_step
        self.health.record(sums.total, skipped=self.state.bad_step)
        self.setup.train_loader.commit()
        if sums.account_A is not None:
            self._account_A = sums.account_A if self._account_A is None else self._account_A + sums.account_A
        self.state.step = step + 1
        due = any(self._due(every) for every in (plan.checkpoint_every, plan.validate_every, plan.log_every))
        if self.state.step == first + 1 or due or self.state.bad_step:
            self._report_step(sums, rates)

    def _refresh(self) -> None:
        """Make again what is due before the next step; a stop that is asked for meanwhile leaves all as it was."""
        refresh = self.setup.refresh
        if refresh is None or not refresh.due():
            return
        self.reporter.progress("refreshing")
        with rng_state.untouched():
            metrics = refresh.run(self.engine, self.world, self.state.step, self._keep_going)
        if metrics is not None:
            self.reporter.record("refreshed", metrics)
        self._timer.restart()

    def _fetch_batches(self, step: int) -> Sequence[BatchLike]:
        """The micro-batches of a step, once the readers have them."""
        with self._timer.waiting_for_data():
            return self.setup.train_loader.step(step)

    def _report_step(self, sums: StepSums, rates: Mapping[str, float]) -> None:
        metrics = step_metrics(self.engine, sums, rates, self._timer, self.world)  # host sync
        bad_steps = {"health/bad_steps": float(self.health.bad_steps)}
        self.reporter.record("step", {**metrics, **self._check_accounts(), **bad_steps})
        if self.state.bad_step:
            losses = {name: value for name, value in metrics.items() if name.startswith("loss/")}
            self.reporter.event("bad_step", why=self.health.reason(losses), policy=self.recipe.health.on_bad_step)
            self._finish_save(last=False)  # what was good before it must not be lost with it
            self.health.check(self.state.step, losses, str(self.reporter.folder.path))
        self._timer.restart()

    def _check_accounts(self) -> Mapping[str, float]:
        """Hand the accounts of the steps since the last call to the loader."""
        account = [] if self._account_A is None else self._account_A.tolist()  # host sync
        self._account_A = None
        return self.setup.train_loader.check_accounts(account)

    def _due(self, every: int) -> bool:
        """Whether something that happens every so many steps, and at the end, happens now."""
        done = self.state.step
        return done == self.recipe.optim.steps or (every > 0 and done % every == 0)

    def _vote(self) -> Vote:
        return self.checkpointer.vote(stop=self.listener.why is not None)

    def _apply_votes(self, outcome: Vote) -> None:
        """Do what the ranks have voted."""
        if outcome.stop and not self.state.stopped:
            self.state.stopped = next(why for why in self.world.all_gather(self.listener.why) if why)
            self.reporter.event("stopping", why=self.state.stopped)
            self.reporter.progress("stopping")
        try:
            published = self.checkpointer.advance(outcome)
        except CheckpointError as error:
            self._tolerate_failed_save(error, last=False)
            return
        if published is not None:
            self._announce(published)

    def _validate(self) -> None:
        if not self.setup.valid_loaders:
            return
        self.reporter.progress("validating")
        metrics: dict[str, float] = {}
        pooled: dict[str, tuple[float, float]] = {}
        with rng_state.untouched():
            for name, batches in self.setup.valid_loaders.items():
                sums = validate(self.engine, batches, self.world, self._keep_going)
                if self.state.stopped:
                    return  # a part of a validation set says nothing
                if sums.sums_K2 is None:
                    continue
                for term, (total, count) in zip(sums.names, sums.sums_K2.tolist(), strict=True):  # host sync
                    if count:
                        metrics[f"valid/{name}/loss/{term}"] = total / count
                    so_far = pooled.get(term, (0.0, 0.0))
                    pooled[term] = (so_far[0] + total, so_far[1] + count)
        means = {term: total / count if count else math.nan for term, (total, count) in pooled.items()}
        metrics.update({f"valid/loss/{term}": mean for term, mean in means.items() if math.isfinite(mean)})
        metrics.update(self._weighted(means))
        self.reporter.record("validation", metrics)
        self._restart_clocks()

    def _restart_clocks(self) -> None:
        """Leave what was done beside training out of the next step's times; host sync where the stage times parts."""
        if hasattr(self.engine.stage, "part_seconds"):
            self.engine.stage.part_seconds()
        self._timer.restart()

    def _weighted(self, means: Mapping[str, float]) -> dict[str, float]:
        """`valid/loss/total`: the weighted sum of the validation's losses, where every one of them is known."""
        if not means or not all(math.isfinite(mean) for mean in means.values()):
            return {}
        tensors = {term: torch.tensor(mean) for term, mean in means.items()}
        weights = self.engine.stage.loss_weights(tensors, self.recipe.optim.steps)  # after every phase
        return {"valid/loss/total": sum(float(weights[term]) * mean for term, mean in means.items())}

    def _keep_going(self) -> bool:
        """Between batches of validation, and of what is refreshed: whether no stop was requested."""
        self.watchdog.beat(self.state.step, timed=False)
        self._apply_votes(self._rank_status.exchange(self._vote()))
        return not self.state.stopped

    def _save(self) -> None:
        """Begin a checkpoint of the present step; wait for it where nothing follows that could hide the writing."""
        reporter = self.reporter
        if self.state.step == self.state.saved_step:
            return
        self.watchdog.beat(self.state.step, timed=False)
        reporter.progress("saving")
        last = bool(self.state.stopped) or self.state.step == self.recipe.optim.steps
        self._finish_save(last=False)
        if self._account_A is not None:
            reporter.record("settled", self._check_accounts())
        cursor: Cursor = {
            "step": self.state.step,
            "stream": dict(self.setup.train_loader.record()),
            "health": self.health.state(),
        }
        self.checkpointer.begin(self.state.step, cursor=cursor, metrics=reporter.metrics)
        self.state.saved_step = self.state.step
        if last or not self.recipe.engine.async_save:
            self._finish_save(last=last)
        self._timer.restart()

    def _finish_save(self, *, last: bool) -> None:
        try:
            published = self.checkpointer.finish(self._rank_status, stop=self.listener.why is not None)
        except CheckpointError as error:
            self._tolerate_failed_save(error, last=last)
            return
        if published is not None:
            self._announce(published)

    def _announce(self, published: Published) -> None:
        """A checkpoint is published: tell the log, the tracker and the launcher."""
        reporter = self.reporter
        self.state.checkpoint = published.path
        if self.world.is_main:
            merge_ledgers(reporter.folder.path)
        reporter.event("checkpoint", path=published.path, saved_step=published.step)
        blocked = {"perf/save_blocked_ms": 1000 * published.blocked_s, "perf/save_s": published.seconds}
        reporter.record("saved", blocked)
        reporter.tag(**{"checkpoint.step": published.step, "checkpoint.path": published.path})
        self.context.report(reporter.metrics, published.path)

    def _tolerate_failed_save(self, error: CheckpointError, *, last: bool) -> None:
        """Go on without a checkpoint that could not be written, if there will be another."""
        if not self.checkpointer.tolerates_failure(last=last):
            raise error
        self.state.saved_step = -1
        self.reporter.event("checkpoint_failed", why=error.what)

    def _go_back(self) -> bool:
        """After a bad step, where the recipe says so: back to the last checkpoint, and on behind the step's data."""
        reporter = self.reporter
        if self.recipe.health.on_bad_step != "rewind":
            return False
        self._finish_save(last=False)
        choice = self.checkpointer.find(brings=self.context.local_rank == 0)
        if choice.checkpoint is None:
            return False  # nothing to go back to: the step is passed over
        bad_step, cursor = self.state.step, choice.checkpoint.manifest["cursor"]
        step = self.checkpointer.load(choice.checkpoint, self.recipe.seed)
        self.state.step = self.state.saved_step = step
        self.health.load(cursor["health"])
        self.health.rewinds += 1
        passed_over = bad_step - step
        self.setup.train_loader.rewind(step=step, saved=cursor["stream"], pass_over=passed_over)
        if self.setup.refresh is not None:
            self.setup.refresh.resume(reporter.folder.path, step, self.world)
        if self.world.is_main:
            reporter.folder.forget_after(step)
        path = choice.checkpoint.path
        reporter.event("rewind", bad_step=bad_step, checkpoint=path, steps_passed_over=passed_over)
        return True
