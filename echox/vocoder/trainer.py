"""Trains a unit HiFi-GAN against its discriminators, in one process, under torchrun or in any other run context.

What is random is drawn from seed, step and micro-batch (`echox/vocoder/adversarial.py`), so a resumed run goes on as if
it had not stopped: bit for bit on as many ranks of a CPU.
"""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

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
from echox.engine.stop import StopListener, signals_stop
from echox.engine.world import World
from echox.errors import CheckpointError, EchoXError, TrainingError
from echox.stream.quarantine import merge as merge_ledgers
from echox.vocoder import state
from echox.vocoder.adversarial import LOSSES, Adversaries
from echox.vocoder.data import VoiceBatch, VoiceCollate, held_out, open_voice, units_of_voice, voice_reader
from echox.vocoder.losses import duration_loss, mel_loss
from echox.vocoder.shape import write_vocoder

if TYPE_CHECKING:
    from echox.stream.reader import StreamReader
    from echox.units.identity import UnitSetIdentity
    from echox.vocoder.data import Clip
    from echox.vocoder.recipe import VoiceRecipe

VOCODER = "vocoder"
"""Folder of a run that holds the vocoder of its newest checkpoint."""
SAMPLES = "samples"
"""Folder of a run that holds waveforms of held-out clips, by step."""


def train_voice(
    recipe: VoiceRecipe, context: RunContext, tracker: Tracker | None = None, *, allow: Sequence[str] = ()
) -> TrainResult:
    """Train a vocoder to its last step, resuming from the newest good checkpoint of the run's folder.

    Asked to stop (see `echox.engine.stop`), it finishes the step, saves and returns. Its newest state, as
    `load_vocoder` takes it, lies in the run's folder under `vocoder/`.

    Args:
        recipe: the run.
        context: the process's place in the world; torch.distributed is initialised.
        tracker: gets the metrics of rank 0; the caller finishes it.
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
            return _attempt(recipe, context, world, reporter, choice, listener)
    finally:
        listener.close()


def _open(
    recipe: VoiceRecipe, world: World, folder: RunDir, tracker: Tracker, allow: Sequence[str], asked: Path | None
) -> tuple[Reporter, Choice]:
    """Count the attempt and choose the checkpoint on rank 0, and tell the others."""
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
            said = f"the run's folder cannot be written: {error}"
            fix = "make room, or give storage= a folder that every node may write to"
            found = (0, None, CheckpointError(said, where=str(folder.path), fix=fix))
    attempt, chosen, problem = world.broadcast(found)
    if problem is not None or chosen is None:
        raise problem or CheckpointError("no checkpoint could be chosen", where=str(folder.path))
    log = EventLog(folder.path, rank=world.rank, attempt=attempt)
    reporter = Reporter(recipe, folder, log, tracker, world.is_main, attempt)
    for path, why in chosen.rejected:
        reporter.event("checkpoint_rejected", path=path, why=why)
        if world.is_main:
            reporter.event("checkpoint_set_aside", path=set_aside(path))
    if chosen.checkpoint is not None:
        reporter.state.step = chosen.checkpoint.manifest["step"]
        reporter.state.checkpoint = chosen.checkpoint.path
        reporter.metrics.update(chosen.checkpoint.manifest["metrics"])
    return reporter, chosen


def _attempt(
    recipe: VoiceRecipe,
    context: RunContext,
    world: World,
    reporter: Reporter,
    choice: Choice,
    listener: StopListener,
) -> TrainResult:
    """Train, and say how the attempt ended in every case."""
    tags = {"host": socket.gethostname(), "world_size": str(world.size)}
    reporter.tracker.begin_attempt(reporter.attempt, reporter.state.step, tags)
    began = reporter.state.step
    try:
        reporter.progress("starting")
        run = VoiceRun.build(recipe, context, world, reporter, choice)
        try:
            run.train(listener)
        finally:
            run.reader.close()
            if world.is_main:
                merge_ledgers(reporter.folder.path)
        stopped = reporter.state.stopped
        reporter.event("stopped" if stopped else "finished", why=stopped)
        reporter.progress("stopped" if stopped else "finished")
    except BaseException as error:
        said = f"{type(error).__name__}: {error}"
        reporter.event("failed", error=said)
        reporter.progress("failed")
        killed = isinstance(error, KeyboardInterrupt)
        reporter.tracker.end_attempt("KILLED" if killed else "FAILED", {"ended": said[:500]})
        raise
    reporter.tracker.end_attempt("KILLED" if stopped else "FINISHED", {"ended": stopped or "finished"})
    return TrainResult(
        run_folder=reporter.folder.path,
        step=reporter.state.step,
        checkpoint=reporter.state.checkpoint,
        metrics=reporter.metrics,
        already_done=began >= recipe.optim.steps,
        stopped=stopped,
    )


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
    clips: list[Clip]

    @classmethod
    def build(
        cls, recipe: VoiceRecipe, context: RunContext, world: World, reporter: Reporter, choice: Choice
    ) -> VoiceRun:
        """Make networks, optimizers and reader, where the checkpoint left them."""
        sources = open_voice(recipe.data.train)
        units, unit_set = units_of_voice(sources, recipe.generator.units)
        shape = recipe.generator.shape(units)
        collate = VoiceCollate(units, recipe.data.segment_frames, recipe.seed)
        speaks = world.is_main and recipe.data.valid is not None
        clips = held_out(recipe.data.valid or "", collate, recipe.samples) if speaks else []
        reader = voice_reader(recipe, sources, collate, world.rank, world.size, pin=world.device.type == "cuda")
        networks = Adversaries(recipe, shape, world)
        found = choice.checkpoint
        if found is not None:
            state.restore(found.path, found.manifest["step"], networks.modules, networks.optimizers)
        elif world.is_main:
            reporter.folder.metrics_path.unlink(missing_ok=True)
        if world.is_main:
            sweep(reporter.folder.path)
            reporter.folder.forget_after(reporter.state.step)
        reader.start(
            step=reporter.state.step,
            run_folder=reporter.folder.path,
            saved=None if found is None else found.manifest["cursor"]["stream"],
        )
        run = cls(
            recipe=recipe,
            context=context,
            world=world,
            reporter=reporter,
            reader=reader,
            networks=networks,
            unit_set=unit_set,
            clips=clips,
        )
        run.announce()
        return run

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
            if where.step == first + 1 or saves or self._due(plan.log_every):
                self.report(losses_L, data, timer)
            if speaks and self.clips:
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
            where.stopped = stop or "another rank was asked to"
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

    @torch.no_grad()
    def speak(self) -> None:
        """Say held-out clips with their own durations on rank 0: WAV files, and how far their log-mel is off."""
        from echox.audio.io import write_audio

        net, log_mel, device = self.networks.generator, self.networks.log_mel, self.world.device
        place = self.reporter.folder.path / SAMPLES / f"step-{self.reporter.state.step:08d}"
        place.mkdir(parents=True, exist_ok=True)
        errors, misses, units = list[float](), 0.0, 0
        net.eval()
        for number, clip in enumerate(self.clips):
            frames_1T, units_1U = (torch.from_numpy(each)[None].to(device) for each in (clip.frames, clip.units))
            spoken = net(frames_1T, units_1U, torch.ones_like(units_1U, dtype=torch.bool))
            wave_1N = torch.from_numpy(clip.wave)[None].to(device)
            errors.append(float(mel_loss(log_mel(wave_1N), log_mel(spoken.wave_BN))))
            durations_1U = torch.from_numpy(clip.durations)[None].to(device)
            misses += float(duration_loss(spoken.logs_BU, durations_1U, torch.ones_like(units_1U)))
            units += len(clip.units)
            for name, wave in (("spoken", spoken.wave_BN[0].cpu().numpy()), ("real", clip.wave)):
                path = place / f"{number:02d}-{name}.wav"
                write_audio(path, wave, net.shape.sample_rate)
                self.reporter.tracker.artifact(path, f"{SAMPLES}/{place.name}")
        net.train()
        metrics = {"valid/loss/mel_l1": float(np.mean(errors)), "valid/loss/duration": misses / units}
        self.reporter.record("valid", metrics)

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
            generator = self.networks.generator
            write_vocoder(self.reporter.folder.path / VOCODER, generator.shape, generator.folded(), self.unit_set)

    def _due(self, every: int) -> bool:
        return every > 0 and self.reporter.state.step % every == 0
