"""Trains a unit HiFi-GAN against its discriminators, in one process, under torchrun or in any other run context.

Two networks take turns, each with its own optimizer, for which DeepSpeed's engine has no place. They are small, and
whole on every rank: a step adds up the gradients of all ranks, in one all-reduce for each network. A rank trains its
share of the micro-batches of a step, whose losses are parts of means over the global batch, so the gradient does not
depend on the number of ranks. What is random is drawn from seed, step and micro-batch, so a resumed run goes on as if
it had not stopped: bit for bit on as many ranks of a CPU.
"""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from echox.engine import rng_state
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
from echox.stream.sampling.keyed_rng import key64
from echox.vocoder import state
from echox.vocoder.data import VoiceBatch, VoiceCollate, held_out, open_voice, units_of_voice, voice_reader
from echox.vocoder.discriminators import Discriminators, halves
from echox.vocoder.generator import Generator, Spoken
from echox.vocoder.losses import (
    LogMel,
    adversarial_loss,
    discriminator_loss,
    duration_loss,
    feature_loss,
    mel_loss,
)
from echox.vocoder.shape import HifiGanShape, write_vocoder

if TYPE_CHECKING:
    from echox.stream.reader import StreamReader
    from echox.units.identity import UnitSetIdentity
    from echox.vocoder.data import Clip
    from echox.vocoder.recipe import VoiceRecipe

VOCODER = "vocoder"
"""Folder of a run that holds the vocoder of its newest checkpoint."""
SAMPLES = "samples"
"""Folder of a run that holds waveforms of held-out clips, by step."""
LOSSES = ("discriminators", "adversarial", "features", "mel", "duration")


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
    modules: Mapping[str, nn.Module]
    optimizers: Mapping[str, torch.optim.AdamW]
    log_mel: LogMel
    shape: HifiGanShape
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
        rng_state.seed_all(recipe.seed)  # New weights are the same on all ranks.
        modules = {
            "generator": Generator(shape).to(world.device),
            "discriminators": Discriminators(recipe.discriminators.channels).to(world.device),
        }
        plan = recipe.optim
        optimizers = {
            part: torch.optim.AdamW(
                [value for _, value in state.trained(module)],
                lr=plan.lr,
                betas=plan.betas,
                weight_decay=plan.weight_decay,
            )
            for part, module in modules.items()
        }
        found = choice.checkpoint
        if found is not None:
            state.restore(found.path, found.manifest["step"], modules, optimizers)
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
            modules=modules,
            optimizers=optimizers,
            log_mel=LogMel(shape.sample_rate).to(world.device),
            shape=shape,
            unit_set=unit_set,
            clips=clips,
        )
        run.announce()
        return run

    def announce(self) -> None:
        """Say what begins."""
        counts = {part: sum(value.numel() for _, value in state.trained(self.modules[part])) for part in state.PARTS}
        self.reporter.event(
            "start",
            run=self.recipe.name,
            host=socket.gethostname(),
            pid=os.getpid(),
            stage=self.recipe.stage,
            world_size=self.world.size,
            device=self.world.device,
            **{f"{part}_weights": count for part, count in counts.items()},
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
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = self.recipe.optim.lr * self.recipe.optim.decay ** int(self.reader.passes())
        account = np.sum([batch.account for batch in batches], axis=0)
        counts = [sum(float(b.weight_B.sum()) for b in batches), sum(float(b.mask_BU.sum()) for b in batches)]
        mine = [*counts, float(stop is not None)]
        batches = [batch.to(device) for batch in batches]
        sums = self.world.all_reduce(torch.tensor([*mine, *account], dtype=torch.float64, device=device))
        clips, units, stops, *counted = sums.tolist()  # host sync
        if stops:
            where.stopped = stop or "another rank was asked to"
        losses_L = self._learn(batches, max(clips, 1.0), max(units, 1.0))
        self.reader.commit()
        return losses_L, self.reader.check_accounts(counted)

    def _learn(self, batches: Sequence[VoiceBatch], clips: float, units: float) -> Tensor:
        """Discriminators first, then the generator against them; both see the same made waveforms."""
        generator, judges = self.modules["generator"], self.modules["discriminators"]
        losses_L = torch.zeros(len(LOSSES), dtype=torch.float64, device=self.world.device)
        # Of more micro-batches than one, the graphs would add up: their waveforms are made twice.
        kept = [self._made(batch, 0) for batch in batches] if len(batches) == 1 else None
        self.optimizers["discriminators"].zero_grad(set_to_none=True)
        for place, batch in enumerate(batches):
            judges.train(place == 0)  # Spectral norm moves once a step, however many forwards a rank has.
            with torch.no_grad():
                made_BN = kept[place].wave_BN if kept else generator.speak(batch.frames_BT)  # type: ignore[operator]
            real, made = halves(judges(torch.cat([batch.wave_BN, made_BN.detach()])), len(made_BN))
            loss = (discriminator_loss(real, made) * batch.weight_B).sum() / clips
            loss.backward()  # type: ignore[no-untyped-call]
            losses_L[0] += loss.detach()
        self._update("discriminators")
        judges.requires_grad_(False).eval()
        self.optimizers["generator"].zero_grad(set_to_none=True)
        for place, batch in enumerate(batches):
            spoken = kept[place] if kept else self._made(batch, place)
            parts = self._generator_losses(batch, spoken, clips, units)
            torch.stack(parts).sum().backward()  # type: ignore[no-untyped-call]
            losses_L[1:] += torch.stack(parts).detach()
        self._update("generator")
        judges.requires_grad_(True)
        return losses_L

    def _made(self, batch: VoiceBatch, place: int) -> Spoken:
        """The generator's forward of one micro-batch; its dropout is the same on any rank."""
        slot = self.world.rank + place * self.world.size
        torch.manual_seed(key64(self.recipe.seed, "dropout", batch.step, slot) >> 1)
        spoken: Spoken = self.modules["generator"](batch.frames_BT, batch.units_BU, batch.mask_BU)
        return spoken

    def _generator_losses(self, batch: VoiceBatch, spoken: Spoken, clips: float, units: float) -> list[Tensor]:
        judges, weights = self.modules["discriminators"], self.recipe.loss
        with torch.no_grad():
            real = judges(batch.wave_BN)
            real_BMT = self.log_mel(batch.wave_BN)
        made = judges(spoken.wave_BN)
        per_clip = (
            adversarial_loss(made),
            weights.features * feature_loss(real, made),
            weights.mel * mel_loss(real_BMT, self.log_mel(spoken.wave_BN)),
        )
        duration_B = weights.duration * duration_loss(spoken.logs_BU, batch.durations_BU, batch.mask_BU)
        return [*((loss_B * batch.weight_B).sum() / clips for loss_B in per_clip), duration_B.sum() / units]

    def _update(self, part: str) -> None:
        """Add the gradients up over the ranks, and let the optimizer step."""
        if self.world.size > 1:
            all_reduce_gradients((value for _, value in state.trained(self.modules[part])), self.world)
        self.optimizers[part].step()

    def report(self, losses_L: Tensor, data: Mapping[str, float], timer: StepTimer) -> None:
        """Metrics of the present step; collective, and a host sync."""
        values = self.world.all_reduce(losses_L.clone()).tolist()
        metrics = {f"loss/{name}": value for name, value in zip(LOSSES, values, strict=True)}
        metrics["loss/total"] = sum(values[1:])
        metrics["loss/mel_l1"] = metrics["loss/mel"] / self.recipe.loss.mel
        _, step_s, waited = timer.read()
        timer.restart()
        metrics["lr/generator"] = self.optimizers["generator"].param_groups[0]["lr"]
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

        net, device = self.modules["generator"], self.world.device
        place = self.reporter.folder.path / SAMPLES / f"step-{self.reporter.state.step:08d}"
        place.mkdir(parents=True, exist_ok=True)
        errors, misses, units = list[float](), 0.0, 0
        net.eval()
        for number, clip in enumerate(self.clips):
            frames_1T, units_1U = (torch.from_numpy(each)[None].to(device) for each in (clip.frames, clip.units))
            spoken: Spoken = net(frames_1T, units_1U, torch.ones_like(units_1U, dtype=torch.bool))
            wave_1N = torch.from_numpy(clip.wave)[None].to(device)
            errors.append(float(mel_loss(self.log_mel(wave_1N), self.log_mel(spoken.wave_BN))))
            durations_1U = torch.from_numpy(clip.durations)[None].to(device)
            misses += float(duration_loss(spoken.logs_BU, durations_1U, torch.ones_like(units_1U)))
            units += len(clip.units)
            for name, wave in (("spoken", spoken.wave_BN[0].cpu().numpy()), ("real", clip.wave)):
                path = place / f"{number:02d}-{name}.wav"
                write_audio(path, wave, self.shape.sample_rate)
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
                    state.capture(self.modules, self.optimizers),
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
        generator = self.modules["generator"]
        if self.world.is_main and isinstance(generator, Generator):
            write_vocoder(self.reporter.folder.path / VOCODER, self.shape, generator.folded(), self.unit_set)

    def _due(self, every: int) -> bool:
        return every > 0 and self.reporter.state.step % every == 0


def all_reduce_gradients(values: Iterable[nn.Parameter], world: World) -> None:
    """Add the gradients of the ranks up, as one vector; a tensor without one counts as zero."""
    values = list(values)
    for value in values:
        if value.grad is None:
            value.grad = torch.zeros_like(value)
    whole = world.all_reduce(torch.cat([value.grad.flatten() for value in values if value.grad is not None]))
    for value, part in zip(values, whole.split([value.numel() for value in values]), strict=True):
        value.grad = part.view_as(value)
