"""Trains a unit HiFi-GAN against its discriminators, in one process, under torchrun or in any other run context.

What is random is drawn from seed, step and micro-batch (`echox/vocoder/adversarial.py`), so a resumed run goes on as if
it had not stopped: bit for bit on as many ranks of a CPU.
"""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from echox.engine.attempt import start_data, tell_the_end, unwritable
from echox.engine.checkpoint.checkpointer import check_fits, find_checkpoint
from echox.engine.checkpoint.manifest import Choice, set_aside, sweep
from echox.engine.checkpoint.retention import Retention
from echox.engine.context import RunContext, device_of
from echox.engine.interfaces import NullTracker, Tracker, TrainResult
from echox.engine.monitor.event_log import EventLog
from echox.engine.monitor.metrics import peak_gib
from echox.engine.monitor.reporter import Reporter
from echox.engine.monitor.run_dir import RunDir
from echox.engine.monitor.step_timer import StepTimer
from echox.engine.start_check import check_start
from echox.engine.stop import StopListener, signals_stop
from echox.engine.world import World
from echox.errors import CheckpointError, EchoXError, TrainingError
from echox.stream.quarantine import merge as merge_ledgers
from echox.vocoder import state
from echox.vocoder.adversarial import LOSSES, Adversaries
from echox.vocoder.data import (
    VoiceBatch,
    VoiceCollate,
    held_out,
    open_voice,
    speakers_of_voice,
    units_of_voice,
    voice_reader,
)
from echox.vocoder.samples import Samples
from echox.vocoder.shape import write_vocoder

if TYPE_CHECKING:
    from echox.stream.reader import StreamReader
    from echox.units.identity import UnitSetIdentity
    from echox.vocoder.recipe import VoiceRecipe

VOCODER = "vocoder"
"""Folder of a run that holds the vocoder of its newest checkpoint."""


def train_voice(
    recipe: VoiceRecipe,
    context: RunContext,
    tracker: Tracker | None = None,
    *,
    accept_new_data: bool = False,
    allow: Sequence[str] = (),
) -> TrainResult:
    """Train a vocoder to its last step, resuming from the newest good checkpoint of the run's folder.

    Asked to stop (see `echox.engine.stop`), it finishes the step, saves and returns. Its newest state, as
    `load_vocoder` takes it, lies in the run's folder under `vocoder/`.

    Args:
        recipe: the run.
        context: the process's place in the world; torch.distributed is initialised.
        tracker: gets the metrics of rank 0; the caller finishes it.
        accept_new_data: go on where datasets, plan or seed are not those of the checkpoint, with a new epoch.
        allow: keys of the recipe that may differ from the checkpoint's, such as `lr`.

    Returns:
        The result, the same on every rank.

    Raises:
        RecipeError: the batch does not divide by the world.
        CheckpointError: no good checkpoint among those found, one that does not fit, or one that cannot be written.
        DataError: data that cannot be trained on, or damaged data beyond what the recipe allows.
        TrainingError: a loss is not a finite number.
    """
    world = World.of(context.rank, context.world_size, device_of(context))
    folder = RunDir(context.storage / recipe.name)
    listener = StopListener(folder.path if world.is_main else None, context.stop_requested)
    tracker = tracker or NullTracker()
    try:
        with signals_stop(listener):
            reporter, choice = _open(recipe, world, folder, tracker, allow, context.checkpoint_in)
            tags = {"host": socket.gethostname(), "world_size": str(world.size)}
            if choice.checkpoint is not None:
                tags["resumed_from"] = str(choice.checkpoint.path)

            def work() -> TrainResult:
                run = VoiceRun.build(recipe, context, world, reporter, choice, accept_new_data=accept_new_data)
                return run.to_the_end(listener)

            return tell_the_end(reporter, tags, work)
    finally:
        listener.close()


def train_in_job(
    recipe: VoiceRecipe, context: RunContext, build: object = None, tracker: Tracker | None = None, **options: Any
) -> TrainResult:
    """`train_voice` as the train function of a Ray job, which hands a stage's builder to any."""
    return train_voice(recipe, context, tracker, **options)


def _open(
    recipe: VoiceRecipe, world: World, folder: RunDir, tracker: Tracker, allow: Sequence[str], asked: Path | None
) -> tuple[Reporter, Choice]:
    """Count the attempt and choose the checkpoint on rank 0, and tell the others."""
    proof = check_start(
        folder,
        {},
        world,
        least_busbw=recipe.scaling.least_busbw,
        in_one_file=world.broadcast(tracker.in_one_file),
    )
    found: tuple[int, Choice | None, EchoXError | None] = (0, None, None)
    if world.is_main:
        try:
            attempt = folder.next_attempt()
            choice = find_checkpoint(folder.path, asked)
            check_fits(choice, recipe, allow)
            found = (attempt, choice, None)
        except EchoXError as error:
            found = (0, None, error)
        except OSError as error:
            found = (0, None, unwritable(folder.path, error))
    attempt, chosen, problem = world.broadcast(found)
    if problem is not None or chosen is None:
        raise problem or CheckpointError("no checkpoint could be chosen", where=str(folder.path))
    try:
        log = EventLog(folder.path, rank=world.rank, attempt=attempt)
    except OSError as error:
        raise unwritable(folder.path, error) from error
    reporter = Reporter(recipe, folder, log, tracker, world.is_main, attempt)
    reporter.event("start_check", **asdict(proof))
    for path, why in chosen.rejected:
        reporter.event("checkpoint_rejected", path=path, why=why)
        if world.is_main:
            reporter.event("checkpoint_set_aside", path=set_aside(path))
    if chosen.checkpoint is not None:
        reporter.state.step = chosen.checkpoint.manifest["step"]
        reporter.state.checkpoint = chosen.checkpoint.path
        reporter.metrics.update(chosen.checkpoint.manifest["metrics"])
    return reporter, chosen


@dataclass(kw_only=True)
class VoiceRun:
    """Everything one rank trains with; `train` does the steps that are left."""

    recipe: VoiceRecipe
    context: RunContext
    world: World
    reporter: Reporter
    reader: StreamReader
    networks: Adversaries
    unit_set: UnitSetIdentity | None
    speakers: tuple[str, ...]
    samples: Samples | None

    @classmethod
    def build(
        cls,
        recipe: VoiceRecipe,
        context: RunContext,
        world: World,
        reporter: Reporter,
        choice: Choice,
        *,
        accept_new_data: bool,
    ) -> VoiceRun:
        """Make networks, optimizers and reader, where the checkpoint left them."""
        reporter.progress("starting")
        sources = open_voice(recipe.data.train)
        units, unit_set = units_of_voice(sources, recipe.generator.units)
        found, speakers = choice.checkpoint, tuple[str, ...]()
        if recipe.generator.speaker:
            # Those of the checkpoint keep their rows, also where the datasets of now lack one of them.
            known = () if found is None else state.recorded_speakers(found.path, found.manifest)
            speakers = speakers_of_voice(sources, known)
        shape = recipe.generator.shape(units, max(1, len(speakers)))
        collate = VoiceCollate(units, recipe.data.segment_frames, recipe.seed, shape.sample_rate, speakers)
        # Read by all ranks, so that all end where there are none.
        clips = [] if recipe.data.valid is None else held_out(recipe.data.valid, collate, recipe.samples)
        samples = Samples(reporter.folder.path, clips, shape.sample_rate, speakers) if clips and world.is_main else None
        reader = voice_reader(recipe, sources, collate, world.rank, world.size, pin=world.device.type == "cuda")
        networks = Adversaries(recipe, shape, world)
        if found is not None:
            state.restore(found.path, found.manifest["step"], networks.modules, networks.optimizers)
        elif world.is_main:
            reporter.folder.metrics_path.unlink(missing_ok=True)
        if world.is_main:
            sweep(reporter.folder.path)
            reporter.folder.forget_after(reporter.state.step)
        start_data(reader, found, world, reporter, accept_new_data=accept_new_data)
        run = cls(
            recipe=recipe,
            context=context,
            world=world,
            reporter=reporter,
            reader=reader,
            networks=networks,
            unit_set=unit_set,
            speakers=speakers,
            samples=samples,
        )
        run.announce()
        return run

    def to_the_end(self, listener: StopListener) -> TrainResult:
        """Train, and close what was opened."""
        reporter, began = self.reporter, self.reporter.state.step
        try:
            self.train(listener)
        finally:
            self.reader.close()
            if self.world.is_main:
                merge_ledgers(reporter.folder.path)
        ended = "stopped" if reporter.state.stopped else "finished"
        reporter.event(ended, run=self.recipe.name, why=reporter.state.stopped)
        reporter.progress(ended)
        return TrainResult(
            run_folder=reporter.folder.path,
            step=reporter.state.step,
            checkpoint=reporter.state.checkpoint,
            metrics=reporter.metrics,
            already_done=began >= self.recipe.optim.steps,
            stopped=reporter.state.stopped,
        )

    def announce(self) -> None:
        """Say what begins."""
        weights = {
            f"{part}_weights": sum(value.numel() for _, value in state.trained(module))
            for part, module in self.networks.modules.items()
        }
        self.reporter.event(
            "start",
            run=self.recipe.name,
            host=socket.gethostname(),
            pid=os.getpid(),
            stage=self.recipe.stage,
            world_size=self.world.size,
            device=self.world.device,
            **({"speakers": len(self.speakers)} if self.speakers else {}),
            **weights,
        )
        if self.world.is_main:
            self.reporter.tracker.log_params(self.recipe.model_dump(mode="json"))

    def train(self, listener: StopListener) -> None:
        """Train to the last step, or until a rank is asked to stop; what was trained is saved when this returns."""
        reporter, plan, where = self.reporter, self.recipe, self.reporter.state
        first, timer = where.step, StepTimer()
        where.saved_step = where.step
        if where.step >= plan.optim.steps:
            self.export()  # The run may have ended between its last checkpoint and this.
            return
        while where.step < plan.optim.steps and not where.stopped:
            with timer.waiting_for_data():
                batches = self.reader.step(where.step)
            losses_L, data = self.step(batches, listener.why)
            where.step += 1
            last = where.step == plan.optim.steps or bool(where.stopped)
            saves, speaks = last or self._due(plan.checkpoint_every), last or self._due(plan.sample_every)
            if where.step == first + 1 or saves or speaks or self._due(plan.log_every):
                self.report(losses_L, data, timer)
            if speaks:
                self.speak()
            if saves:
                self.save()
            if speaks or saves:
                timer.restart()
            reporter.progress("stopping" if where.stopped else "training")

    def step(self, batches: Sequence[VoiceBatch], stop: str | None) -> tuple[Tensor, dict[str, float]]:
        """One optimizer step of both networks.

        Args:
            batches: this rank's micro-batches.
            stop: why this rank was asked to stop after it, if it was.

        Returns:
            The weighted losses of this rank's clips as in `LOSSES`, each its part of the mean over the global batch,
            and metrics of the data.
        """
        where, device = self.reporter.state, self.world.device
        self.networks.set_learning_rate(self.recipe.optim.lr * self.recipe.optim.decay ** int(self.reader.passes()))
        account = sum(batch.account for batch in batches if batch.account is not None)
        counts = [sum(float(b.weight_B.sum()) for b in batches), sum(float(b.mask_BU.sum()) for b in batches)]
        mine = [*counts, float(stop is not None)]
        batches = [batch.to(device) for batch in batches]
        sums = self.world.all_reduce(torch.tensor([*mine, *np.asarray(account)], dtype=torch.float64, device=device))
        clips, units, stops, *counted = sums.tolist()  # host sync
        if stops:
            # The same words on all ranks: what starts a job decides by them whether it goes on.
            where.stopped = next(why for why in self.world.all_gather(stop) if why)
        losses_L = self.networks.learn(batches, max(clips, 1.0), max(units, 1.0))
        self.reader.commit()
        return losses_L, self.reader.check_accounts(counted)

    def report(self, losses_L: Tensor, data: Mapping[str, float], timer: StepTimer) -> None:
        """Metrics of the present step; collective, and a host sync."""
        values = self.world.all_reduce(losses_L.clone()).tolist()
        metrics = {f"loss/{name}": value for name, value in zip(LOSSES, values, strict=True)}
        metrics["loss/total"] = sum(values[1:])
        metrics["loss/mel_l1"] = metrics["loss/mel"] / self.recipe.loss.mel
        _, step_s, waited = timer.read()
        timer.restart()
        metrics["lr/generator"] = self.networks.learning_rate
        metrics |= {"perf/step_ms": 1000 * step_s, "perf/data_wait_share": waited, **data}
        metrics["perf/samples_per_s"] = self.recipe.data.global_batch / step_s
        metrics["perf/peak_gib"] = peak_gib(self.world.device)
        self.reporter.record("step", metrics)
        bad = [name for name, value in metrics.items() if name.startswith("loss/") and not math.isfinite(value)]
        if bad:
            raise TrainingError(
                f"{', '.join(bad)} is not a finite number at step {self.reporter.state.step}",
                where=str(self.reporter.folder.path),
                fix="start again from the last checkpoint with a lower optim.lr (--allow lr), or look at the data",
            )

    def speak(self) -> None:
        """Speak held-out clips on rank 0; that they cannot be written does not end a run."""
        reporter, networks = self.reporter, self.networks
        if self.samples is None:
            return
        try:
            metrics, files = self.samples.speak(reporter.state.step, networks.generator, networks.log_mel)
        except OSError as error:
            reporter.event("samples_lost", error=str(error))
            return
        reporter.record("valid", metrics)
        for path, folder in files:
            reporter.tracker.artifact(path, folder)

    def save(self) -> None:
        """Publish a checkpoint of the present step, and its vocoder; the ranks wait for it."""
        reporter, where = self.reporter, self.reporter.state
        reporter.progress("saving")
        found: tuple[Path | None, EchoXError | None] = (None, None)
        if self.world.is_main:
            try:
                reporter.folder.check_attempt(reporter.attempt)
                path = state.save(
                    reporter.folder.path,
                    self.recipe,
                    state.capture(self.networks.modules, self.networks.optimizers),
                    step=where.step,
                    attempt=reporter.attempt,
                    world_size=self.world.size,
                    stream=dict(self.reader.record()),
                    metrics=reporter.metrics,
                    speakers=self.speakers,
                )
                Retention(last=self.recipe.keep).apply(reporter.folder.path)
                found = (path, None)
            except EchoXError as error:
                found = (None, error)
            except OSError as error:
                said = f"the checkpoint of step {where.step} could not be written: {error}"
                found = (
                    None,
                    CheckpointError(said, where=str(reporter.folder.path), fix="make room or restore access"),
                )
        where.checkpoint, problem = self.world.broadcast(found)
        if problem is not None:
            raise problem
        where.saved_step = where.step
        reporter.event("checkpoint", path=where.checkpoint)
        reporter.tag(**{"checkpoint.step": where.step, "checkpoint.path": where.checkpoint})
        self.export()
        self.context.report(reporter.metrics, where.checkpoint)

    def export(self) -> None:
        """Write the vocoder of the present weights on rank 0."""
        if self.world.is_main:
            generator, folder = self.networks.generator, self.reporter.folder.path / VOCODER
            write_vocoder(folder, generator.shape, generator.folded(), self.unit_set, self.speakers)

    def _due(self, every: int) -> bool:
        return every > 0 and self.reporter.state.step % every == 0
