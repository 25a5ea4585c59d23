"""Trains a stage with the same function in one process, under torchrun and in a Ray Train worker."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from echox.config.paths import model_place, resolve_file
from echox.config.schema import batch_sentence
from echox.engine import rng_state, run_files
from echox.engine.attempt import start_data, tell_the_end, unwritable
from echox.engine.checkpoint.checkpointer import Checkpointer, check_fits, find_checkpoint
from echox.engine.checkpoint.manifest import Checkpoint, Choice, set_aside, sweep
from echox.engine.checkpoint.recipe_diff import changes
from echox.engine.checkpoint.retention import Retention
from echox.engine.compiler import check_compiler
from echox.engine.context import RunContext, device_of
from echox.engine.deepspeed_engine import Engine, prepare_deepspeed
from echox.engine.determinism import compute_deterministically
from echox.engine.frozen import FrozenModel, compare_identities, identify, replicate_as_buffers
from echox.engine.interfaces import BuildSetup, NullTracker, StageSetup, Tracker, TrainResult
from echox.engine.loop import Loop
from echox.engine.loss_guard import LossGuard
from echox.engine.monitor.event_log import EventLog
from echox.engine.monitor.metrics import peak_gib
from echox.engine.monitor.reporter import Reporter
from echox.engine.monitor.run_dir import RunDir
from echox.engine.monitor.startup_timer import StartupTimer
from echox.engine.monitor.update_check import UpdateCheck, UpdateReport
from echox.engine.monitor.watchdog import Watchdog
from echox.engine.object_store.checkpoints import Entry, PublishedCheckpoints
from echox.engine.object_store.mirror import StoredStop
from echox.engine.object_store.run_store import RunStore
from echox.engine.placement import place_frozen
from echox.engine.precision import Resolved, dtype_census, resolve_precision, torch_dtype
from echox.engine.run_files import RunFileEntry
from echox.engine.start_check import check_start
from echox.engine.stop import StopListener, signals_stop
from echox.engine.world import World
from echox.errors import CheckpointError, DataError, EchoXError
from echox.stream.quarantine import merge as merge_ledgers
from echox.stream.sampling.plan import check_divides

if TYPE_CHECKING:
    from pathlib import Path

    from echox.config.schema import Recipe


def train(
    recipe: Recipe,
    context: RunContext,
    build: BuildSetup,
    tracker: Tracker | None = None,
    *,
    accept_new_data: bool = False,
    allow: Sequence[str] = (),
) -> TrainResult:
    """Train one stage to its last step, resuming from the newest good checkpoint of the run's folder.

    Asked to stop (see `echox.engine.stop`), it finishes the step, saves and returns.

    Args:
        recipe: the run.
        context: the process's place in the world; torch.distributed is initialised.
        build: makes the stage and the loaders of one rank.
        tracker: gets the metrics of rank 0; the caller finishes it.
        accept_new_data: go on where datasets, plan or seed are not those of the checkpoint, with a new epoch.
        allow: keys of the recipe that may differ from the checkpoint's, such as `lr`.

    Returns:
        The result, the same on every rank.

    Raises:
        RecipeError: the batch does not divide by the world, the frozen weights have no place in it, or a node has no
            compiler for a run that is to be compiled.
        CheckpointError: no good checkpoint among those found, one that does not fit, or one that cannot be written.
        DataError: damaged data beyond what the recipe allows, or other samples than planned.
        AlteredModelError: a frozen model is not the one the checkpoint was trained beside.
        TrainingError: the loss is not a finite number or spikes, beyond what the recipe's `health` allows.
    """
    startup = StartupTimer()
    device = device_of(context)
    compute_deterministically(recipe.engine.deterministic, device)
    world = World.of(context.rank, context.world_size, device)
    store = RunStore.of(recipe.storage, recipe.name)
    folder = RunDir(context.storage / recipe.name, store)
    listener = StopListener(
        folder.path if world.is_main and store is None else None,
        context.stop_requested,
        *((StoredStop(store),) if world.is_main and store is not None else ()),
    )
    try:
        with signals_stop(listener):
            run = _Attempt.open(recipe, context, world, folder, tracker or NullTracker(), startup, allow=allow)
            return run.run(build, listener, accept_new_data=accept_new_data)
    finally:
        listener.close()


@dataclass
class _Attempt:
    """One attempt at a run."""

    recipe: Recipe
    context: RunContext
    world: World
    reporter: Reporter
    choice: Choice
    published: PublishedCheckpoints | None
    startup: StartupTimer

    @classmethod
    def open(
        cls,
        recipe: Recipe,
        context: RunContext,
        world: World,
        folder: RunDir,
        tracker: Tracker,
        startup: StartupTimer,
        *,
        allow: Sequence[str],
    ) -> _Attempt:
        """Count the attempt and choose the checkpoint on rank 0, and tell the others."""
        sized = recipe.model_copy(update={"data": recipe.data.on(world.size)})
        batch, recipe = batch_sentence(recipe, world.size), sized
        check_compiler(recipe.engine.compile, world)
        prepare_deepspeed(world.device)
        proof = check_start(
            folder,
            _models(recipe),
            world,
            least_busbw=recipe.scaling.least_busbw,
            in_one_file=world.broadcast(tracker.in_one_file),
        )
        published = None if folder.store is None else PublishedCheckpoints(folder.store)
        found: tuple[int, Choice | None, Entry | None, EchoXError | None] = (0, None, None, None)
        if world.is_main:
            attempt, entry = 0, None
            try:
                attempt = folder.next_attempt()
                if published is None:
                    choice = find_checkpoint(folder.path, context.checkpoint_in)
                else:
                    published.begin_attempt(attempt)
                    choice, entry = published.choose(folder.path)
                check_fits(choice, recipe, allow)
                found = (attempt, choice, entry, None)
            except EchoXError as error:
                found = (attempt, None, None, error)
            except OSError as error:
                found = (attempt, None, None, unwritable(folder.path, error))
        attempt, chosen, entry, problem = world.broadcast(found)
        if published is not None and chosen is not None:
            chosen = published.on_every_node(chosen, entry, folder.path, world, brings=context.local_rank == 0)
        try:
            log = EventLog(folder.path, rank=world.rank, attempt=attempt)
        except OSError as error:
            raise problem or unwritable(folder.path, error) from error
        reporter = Reporter(recipe, folder, log, tracker, world.is_main, attempt)
        reporter.event("start_check", **asdict(proof))
        if batch is not None:
            reporter.event("batch", what=batch)
        if problem is not None or chosen is None:
            reporter.event("failed", error=str(problem))
            raise problem or CheckpointError("no checkpoint could be chosen", where=str(folder.path))
        if chosen.checkpoint is not None:
            reporter.state.step = chosen.checkpoint.manifest["step"]
            reporter.state.checkpoint = chosen.checkpoint.path
        for path, why in chosen.rejected:
            reporter.event("checkpoint_rejected", path=path, why=why)
            if world.is_main and published is None:
                reporter.event("checkpoint_set_aside", path=set_aside(path))
        if world.is_main and published is not None and chosen.rejected:
            published.set_damaged({path.name: why for path, why in chosen.rejected})
        startup.lap("run")
        return cls(recipe, context, world, reporter, chosen, published, startup)

    def run(self, build: BuildSetup, listener: StopListener, *, accept_new_data: bool) -> TrainResult:
        """Train, and say how the attempt ended in every case."""
        reporter = self.reporter
        tags = {"host": socket.gethostname(), "world_size": str(self.world.size)}
        if self.choice.checkpoint is not None:
            tags["resumed_from"] = str(self.choice.checkpoint.path)
        return tell_the_end(
            reporter,
            tags,
            lambda: self.already_done() or self.train(build, listener, accept_new_data=accept_new_data),
        )

    def already_done(self) -> TrainResult | None:
        """The result of a run that has reached its last step, or None."""
        reporter, checkpoint = self.reporter, self.choice.checkpoint
        if checkpoint is None or reporter.state.step < self.recipe.optim.steps:
            return None
        reporter.event("already_done", run=self.recipe.name, checkpoint=checkpoint.path)
        reporter.progress("finished")
        return TrainResult(
            run_folder=reporter.folder.path,
            step=reporter.state.step,
            checkpoint=checkpoint.path,
            metrics=checkpoint.manifest["metrics"],
            already_done=True,
        )

    def train(self, build: BuildSetup, listener: StopListener, *, accept_new_data: bool) -> TrainResult:
        """Build everything, resume, loop, and check what moved."""
        recipe, world, reporter = self.recipe, self.world, self.reporter
        reporter.progress("starting")
        precision: Resolved = (
            "fp32" if "fp32" in world.all_gather(resolve_precision(recipe.engine.precision)) else "bf16"
        )
        ds_config = self._deepspeed_config(precision)
        rng_state.seed_all(recipe.seed)  # The same on all ranks: buffers with random contents must agree.
        setup = build(recipe, world.rank, world.size)
        self.startup.lap("models")
        frozen = self._identify(setup)
        files = self._keep_files(setup)
        start_data(setup.train_loader, self.choice.checkpoint, world, reporter, accept_new_data=accept_new_data)
        self.startup.lap("data")
        buffers = frozenset[str]()
        placement = place_frozen(recipe.engine.frozen_placement, setup.module, torch_dtype(precision), world, ds_config)
        if placement == "replicate":
            buffers = replicate_as_buffers(setup.module, world.device, torch_dtype(precision))
        engine = Engine(recipe, setup.module, device=world.device, precision=precision, config=ds_config)
        self.startup.lap("engine")
        rng_state.seed_all(recipe.seed + 1000 * (world.rank + 1))  # Dropout differs between ranks.
        census = dtype_census(engine.stage, buffers)
        checkpointer = Checkpointer(
            engine=engine,
            world=world,
            folder=reporter.folder,
            attempt=reporter.attempt,
            retention=Retention(last=recipe.engine.keep, every=recipe.engine.keep_every, best=recipe.engine.keep_best),
            contents={
                "run": recipe.name,
                "stage": recipe.stage,
                "recipe": recipe.model_dump(mode="json"),
                "frozen": frozen,
                "run_files": files,
                "dtypes": census,
                "precision": precision,
            },
            published=self.published,
        )
        self._announce(precision, placement, census, ds_config, setup)
        health = LossGuard(recipe.health, world.device)
        if self.choice.checkpoint is not None:
            self._resume(self.choice.checkpoint, checkpointer, health)
        elif world.is_main:
            reporter.folder.metrics_path.unlink(missing_ok=True)
        if world.is_main:
            sweep(reporter.folder.path)
            reporter.folder.forget_after(reporter.state.step)
        check = UpdateCheck(engine, buffers, world)
        loop = Loop(
            recipe=recipe,
            context=self.context,
            world=world,
            engine=engine,
            setup=setup,
            checkpointer=checkpointer,
            reporter=reporter,
            health=health,
            listener=listener,
            watchdog=self._watchdog(),
            state=reporter.state,
        )
        began = reporter.state.step
        try:
            loop.run()
        finally:
            loop.watchdog.close()
            setup.train_loader.close()
            if world.is_main:
                merge_ledgers(reporter.folder.path)
        movement = (
            check.compare() if reporter.state.step > began else UpdateReport(unmoved_trainable=(), moved_frozen=())
        )
        self._finish(movement, reporter.state.stopped)
        engine.close()
        return TrainResult(
            run_folder=reporter.folder.path,
            step=reporter.state.step,
            checkpoint=reporter.state.checkpoint,
            metrics=reporter.metrics,
            unmoved_trainable=movement.unmoved_trainable,
            moved_frozen=movement.moved_frozen,
            stopped=reporter.state.stopped,
        )

    def _resume(self, checkpoint: Checkpoint, checkpointer: Checkpointer, health: LossGuard) -> None:
        """Bring everything but the data to the chosen checkpoint, and say what is not as it was."""
        manifest, reporter = checkpoint.manifest, self.reporter
        checkpointer.load(checkpoint, self.recipe.seed)
        health.load(manifest["cursor"]["health"])
        reporter.event(
            "resuming",
            run=self.recipe.name,
            checkpoint=checkpoint.path,
            world_size=self.world.size,
            saved_world_size=manifest["world_size"],
        )
        for key, old, new in changes(manifest["recipe"], self.recipe.model_dump(mode="json")):
            reporter.event("recipe_changed", key=key, was=old, now=new)
            reporter.tag(**{f"attempt.{reporter.attempt}.{key}": new})

    def _watchdog(self) -> Watchdog:
        reporter, health = self.reporter, self.recipe.health

        def report(waited: float, stacks: Path) -> None:
            reporter.event("hang", waited_s=round(waited, 1), stacks=stacks)
            reporter.progress("failed")

        return Watchdog(
            reporter.folder.path / "hangs",
            name=f"attempt-{reporter.attempt}",
            rank=self.world.rank,
            factor=health.hang_factor,
            least_s=health.hang_least_s,
            report=report,
        )

    def _finish(self, movement: UpdateReport, stopped: str) -> None:
        reporter = self.reporter
        names = {"unmoved_trainable": movement.unmoved_trainable, "moved_frozen": movement.moved_frozen}
        reporter.record("moved", {f"check/{key}": float(len(found)) for key, found in names.items()})
        for key, found in names.items():
            if found:
                reporter.event(f"warning_{key}", tensors=list(found))
        if stopped:
            reporter.event("stopped", run=self.recipe.name, why=stopped, folder=reporter.folder.path)
            reporter.progress("stopped")
        else:
            reporter.event("finished", run=self.recipe.name, folder=reporter.folder.path)
            reporter.progress("finished")

    def _deepspeed_config(self, precision: Any) -> dict[str, Any]:
        from echox.config.deepspeed import load_deepspeed

        (step_batch, micro_batch), workers = self.recipe.data.nominal_batch, self.world.size
        if step_batch % (micro_batch * workers):
            check_divides(step_batch // micro_batch, workers)
        return load_deepspeed(
            resolve_file(self.recipe.engine.deepspeed),
            global_batch=step_batch,
            micro_batch=micro_batch,
            world_size=workers,
            clip=self.recipe.optim.clip,
            precision=precision,
        )

    def _identify(self, setup: StageSetup) -> dict[str, FrozenModel]:
        """Hash the frozen models on every node, and compare nodes with each other and with the checkpoint."""
        from echox.config.paths import cache_dir

        mine: dict[str, FrozenModel] | EchoXError | None = None
        if self.context.local_rank == 0:
            try:
                mine = identify(setup.frozen_models, cache_dir() / "sha256.json")
            except EchoXError as error:
                mine = error
        found = [identity for identity in self.world.all_gather(mine) if identity is not None]
        for identity in found:
            if isinstance(identity, EchoXError):
                raise identity
            compare_identities(_checked(found[0]), identity)
        identities = _checked(found[0])
        if self.choice.checkpoint is not None:
            compare_identities(self.choice.checkpoint.manifest["frozen"], identities)
        return identities

    def _keep_files(self, setup: StageSetup) -> dict[str, RunFileEntry]:
        """Compare the run's files between ranks and with the checkpoint, and copy them into the run's folder."""
        folder, mine = self.reporter.folder.path, run_files.describe(setup.files)
        found = self.world.all_gather(json.dumps(mine, sort_keys=True))
        for rank, entries in enumerate(found):
            if entries != found[0]:
                raise DataError(
                    f"rank {rank} has other contents than rank 0 in {', '.join(mine)}",
                    where=", ".join(str(file.path) for file in setup.files.values()),
                    fix="give every node the same files, best in a folder that all of them share",
                )
        if self.choice.checkpoint is not None:
            saved = self.choice.checkpoint.manifest.get("run_files")
            if saved is None and mine and self.world.is_main:
                self.reporter.event("warning_run_files", not_in_the_checkpoint=list(mine))
            run_files.compare(saved or {}, setup.files, folder)
        if self.world.is_main:
            try:
                run_files.store(setup.files, folder)
            except OSError as error:
                raise unwritable(folder, error) from error
        return mine

    def _announce(
        self,
        precision: str,
        placement: str,
        census: Mapping[str, Any],
        ds_config: Mapping[str, Any],
        setup: StageSetup,
    ) -> None:
        self.reporter.event(
            "start",
            run=self.recipe.name,
            host=socket.gethostname(),
            pid=os.getpid(),
            stage=self.recipe.stage,
            world_size=self.world.size,
            device=self.world.device,
            precision=precision,
            frozen_placement=placement,
            dtypes=json.dumps(census),
            **({"compiled": json.dumps(dict(setup.compiled))} if setup.compiled else {}),
            start_s=self.startup.seconds,
            peak_gib=peak_gib(self.world.device),
        )
        for event, note in setup.notes.items():
            self.reporter.event(event, what=note)
        if self.world.is_main:
            self.reporter.tracker.log_params(self.recipe.model_dump(mode="json"))
            for name, contents in (("recipe.json", self.recipe.model_dump(mode="json")), ("deepspeed.json", ds_config)):
                path = self.reporter.folder.path / name
                path.write_text(json.dumps(contents, indent=1))
                self.reporter.tracker.artifact(path)


def _models(recipe: Recipe) -> dict[str, Path]:
    """Where the pretrained models of a recipe are, by the name it has for them."""
    refs = [recipe.model.llm.path]
    if recipe.stage != "t2c" and recipe.model.speech_encoder is not None:
        refs.append(recipe.model.speech_encoder.path)
    return {} if recipe.model.random_init else {ref: model_place(ref) for ref in refs}


def _checked(identity: dict[str, FrozenModel] | EchoXError) -> dict[str, FrozenModel]:
    if isinstance(identity, EchoXError):
        raise identity
    return identity
