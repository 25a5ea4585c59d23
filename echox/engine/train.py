"""The train function: the same in one process, under torchrun and in a Ray Train worker."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echox.engine import rng
from echox.engine.checkpoint import Checkpointer, check_fits, find_checkpoint
from echox.engine.context import RunContext, device_of
from echox.engine.deepspeed_engine import Engine, use_accelerator_of
from echox.engine.frozen import compare_identities, identify, replicate_as_buffers
from echox.engine.gang import Gang
from echox.engine.interfaces import BuildSetup, NullTracker, StageSetup, Tracker, TrainLoader, TrainResult
from echox.engine.log import EventLog
from echox.engine.manifest import Choice, sweep
from echox.engine.metrics import peak_gib, step_metrics
from echox.engine.movement import Movement, MovementCheck
from echox.engine.precision import Resolved, dtype_census, resolve_precision, torch_dtype
from echox.engine.run_folder import RunFolder
from echox.engine.step import Stopwatch, train_step, validate
from echox.errors import CheckpointError, DataError, EchoXError
from echox.stream.plan import check_divides
from echox.stream.quarantine import merge as merge_ledgers

if TYPE_CHECKING:
    from torch import Tensor

    from echox.config.schema import Recipe


# Metrics in the line for people; the JSON line has them all.
_SHOWN = ("loss/", "valid/loss/", "lr/", "grad_norm", "perf/step_ms", "perf/samples_per_s", "check/")


def train(
    recipe: Recipe,
    context: RunContext,
    build: BuildSetup,
    tracker: Tracker | None = None,
    *,
    accept_new_data: bool = False,
) -> TrainResult:
    """Train one stage to its last step, resuming from the newest good checkpoint of the run's folder.

    Args:
        recipe: the run.
        context: the process's place in the world; torch.distributed is initialised.
        build: makes the stage and the loaders of one rank.
        tracker: gets the metrics of rank 0; the caller finishes it.
        accept_new_data: go on where datasets, plan or seed are not those of the checkpoint, with a new epoch.

    Returns:
        The result, the same on every rank.

    Raises:
        RecipeError: the batch does not divide by the world.
        CheckpointError: no good checkpoint among those found, one that does not fit, or one that cannot be written.
        DataError: damaged data beyond what the recipe allows, or other samples than planned.
        AlteredModelError: a frozen model is not the one the checkpoint was trained beside.
        EchoXError: the loss is not a finite number.
    """
    run = _Run.open(recipe, context, tracker or NullTracker(), accept_new_data=accept_new_data)
    try:
        return run.already_done() or run.train(build)
    except BaseException as error:
        run.log("failed", step=run.step, error=f"{type(error).__name__}: {error}")
        run.progress("failed")
        raise


@dataclass
class _Run:
    """One attempt at a run."""

    recipe: Recipe
    context: RunContext
    tracker: Tracker
    gang: Gang
    folder: RunFolder
    log: EventLog
    attempt: int
    choice: Choice
    accept_new_data: bool
    step: int = 0
    loss: float | None = None
    samples_per_s: float | None = None
    step_s: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)

    @classmethod
    def open(cls, recipe: Recipe, context: RunContext, tracker: Tracker, *, accept_new_data: bool) -> _Run:
        """Count the attempt and choose the checkpoint on rank 0, and tell the others."""
        gang = Gang(context.rank, context.world_size, device_of(context))
        use_accelerator_of(gang.device)
        folder = RunFolder(context.storage / recipe.name)
        found: tuple[int, Choice | None, EchoXError | None] = (0, None, None)
        if gang.leads:
            attempt = folder.next_attempt()
            try:
                choice = find_checkpoint(folder.path, context.checkpoint_in)
                check_fits(choice, recipe, gang.size)
                found = (attempt, choice, None)
            except EchoXError as error:
                found = (attempt, None, error)
        attempt, chosen, problem = gang.broadcast(found)
        log = EventLog(folder.path, rank=gang.rank, attempt=attempt)
        if problem is not None or chosen is None:
            raise problem or CheckpointError("no checkpoint could be chosen", where=str(folder.path))
        for path, why in chosen.rejected:
            log("checkpoint_rejected", step=0, path=path, why=why)
        return cls(recipe, context, tracker, gang, folder, log, attempt, chosen, accept_new_data)

    def already_done(self) -> TrainResult | None:
        """The result of a run that has reached its last step, or None."""
        done = int(self.choice.manifest.get("step", 0))
        if self.choice.checkpoint is None or done < self.recipe.optim.steps:
            return None
        self.step = done
        self.log("already_done", step=done, run=self.recipe.name, checkpoint=self.choice.checkpoint)
        self.progress("finished")
        return TrainResult(
            run_folder=self.folder.path,
            step=done,
            checkpoint=self.choice.checkpoint,
            metrics=self.choice.manifest["metrics"],
            already_done=True,
        )

    def train(self, build: BuildSetup) -> TrainResult:
        """Build everything, resume, loop, and check what moved."""
        recipe, gang = self.recipe, self.gang
        self.progress("starting")
        precision: Resolved = "fp32" if "fp32" in gang.gather(resolve_precision(recipe.engine.precision)) else "bf16"
        ds_config = self._deepspeed_config(precision)
        rng.seed_all(recipe.seed)  # The same on all ranks: buffers with random contents must agree.
        setup = build(recipe, gang.rank, gang.size)
        frozen = self._identify(setup)
        self._start_data(setup.train_loader)
        buffers = frozenset[str]()
        if recipe.engine.frozen_placement == "replicate":
            buffers = replicate_as_buffers(setup.module, gang.device, torch_dtype(precision))
        engine = Engine(recipe, setup.module, device=gang.device, precision=precision, config=ds_config)
        rng.seed_all(recipe.seed + 1000 * (gang.rank + 1))  # Dropout differs between ranks.
        census = dtype_census(engine.stage, buffers)
        checkpointer = Checkpointer(
            engine=engine,
            gang=gang,
            run_folder=self.folder.path,
            attempt=self.attempt,
            keep=recipe.engine.keep,
            contents={
                "run": recipe.name,
                "stage": recipe.stage,
                "recipe": recipe.model_dump(mode="json"),
                "frozen": frozen,
                "dtypes": census,
                "precision": precision,
            },
        )
        self._announce(precision, census, ds_config)
        if self.choice.checkpoint is not None:
            self.step = checkpointer.load(self.choice)
            self.log("resuming", step=self.step, run=recipe.name, checkpoint=self.choice.checkpoint)
        elif gang.leads:
            self.folder.metrics_path.unlink(missing_ok=True)
        if gang.leads:
            sweep(self.folder.path)
            self.folder.forget_after(self.step)
        check = MovementCheck(engine, buffers)
        try:
            checkpoint = self._loop(engine, setup, checkpointer)
        finally:
            setup.train_loader.close()
            if gang.leads:
                merge_ledgers(self.folder.path)
        movement = check.compare(gang)
        self._finish(movement)
        engine.close()
        return TrainResult(
            run_folder=self.folder.path,
            step=self.step,
            checkpoint=checkpoint,
            metrics=self.metrics,
            unmoved_trainable=movement.unmoved_trainable,
            moved_frozen=movement.moved_frozen,
        )

    def _loop(self, engine: Engine, setup: StageSetup, checkpointer: Checkpointer) -> Path | None:
        plan, steps, gang = self.recipe.engine, self.recipe.optim.steps, self.gang
        checkpoint, first = self.choice.checkpoint, self.step
        loader, watch = setup.train_loader, Stopwatch()
        account_A: Tensor | None = None  # of the steps since the last report; stays on the device
        engine.ds.train()
        for step in range(first, steps):
            rates = engine.set_learning_rates(step)
            sums = train_step(engine, watch.fetch(loader, step), step, gang)
            loader.commit()
            account_A = sums.account_A if account_A is None or sums.account_A is None else account_A + sums.account_A
            self.step = done = step + 1
            saves, validates = _due(plan.checkpoint_every, done, steps), _due(plan.validate_every, done, steps)
            if done == first + 1 or done % plan.log_every == 0 or saves or validates:
                metrics = step_metrics(engine, sums, rates, watch, gang)  # host sync
                settled = loader.settle([] if account_A is None else account_A.tolist())
                account_A = None
                self._log_step({**metrics, **settled})
                watch.restart()
            self.progress("training")
            if validates:
                self._validate(engine, setup)
                watch.restart()
            if saves:
                self.progress("saving")
                cursor = {"step": done, "stream": dict(loader.record())}
                checkpoint = checkpointer.save(done, cursor=cursor, metrics=self.metrics)
                if gang.leads:
                    merge_ledgers(self.folder.path)
                self.log("checkpoint", step=done, path=checkpoint)
                self.context.report(self.metrics, checkpoint)
                checkpointer.retain()
                watch.restart()
        return checkpoint

    def _log_step(self, metrics: dict[str, float]) -> None:
        self.loss = metrics["loss/total"]
        self.step_s = metrics["perf/step_ms"] / 1000
        self.samples_per_s = metrics["perf/samples_per_s"]
        self._record("step", metrics)
        wrong = sorted(name for name, value in metrics.items() if name.startswith("loss/") and not math.isfinite(value))
        if wrong:
            raise EchoXError(
                f"{', '.join(wrong)} is not a finite number at step {self.step}",
                where=str(self.folder.path),
                fix="lower the learning rate or look at the batch of that step; the last checkpoint is untouched",
            )

    def _validate(self, engine: Engine, setup: StageSetup) -> None:
        if not setup.valid_loaders:
            return
        self.progress("validating")
        metrics: dict[str, float] = {}
        pooled: dict[str, tuple[float, float]] = {}
        with rng.untouched():
            for name, batches in setup.valid_loaders.items():
                sums = validate(engine, batches, self.gang)
                if sums.sums_K2 is None:
                    continue
                for term, (total, count) in zip(sums.names, sums.sums_K2.tolist(), strict=True):  # host sync
                    if count:
                        metrics[f"valid/{name}/loss/{term}"] = total / count
                    so_far = pooled.get(term, (0.0, 0.0))
                    pooled[term] = (so_far[0] + total, so_far[1] + count)
        metrics.update({f"valid/loss/{term}": total / count for term, (total, count) in pooled.items() if count})
        self._record("validation", metrics)

    def _record(self, event: str, metrics: Mapping[str, float]) -> None:
        self.metrics.update(metrics)
        shown = {name: value for name, value in metrics.items() if name.startswith(_SHOWN)}
        self.log(event, step=self.step, aside={k: v for k, v in metrics.items() if k not in shown}, **shown)
        if self.gang.leads:
            self.folder.append_metrics(self.step, metrics)
            self.tracker.log_metrics(metrics, self.step)

    def _finish(self, movement: Movement) -> None:
        names = {"unmoved_trainable": movement.unmoved_trainable, "moved_frozen": movement.moved_frozen}
        self._record("moved", {f"check/{key}": float(len(found)) for key, found in names.items()})
        for key, found in names.items():
            if found:
                self.log(f"warning_{key}", step=self.step, tensors=list(found))
        self.log("finished", step=self.step, run=self.recipe.name, folder=self.folder.path)
        self.progress("finished")

    def _deepspeed_config(self, precision: Any) -> dict[str, Any]:
        from echox.config.deepspeed import load_deepspeed

        (step_batch, micro_batch), workers = self.recipe.data.nominal_batch, self.gang.size
        if step_batch % (micro_batch * workers):
            check_divides(step_batch // micro_batch, workers)
        return load_deepspeed(
            self.recipe.engine.deepspeed,
            global_batch=step_batch,
            micro_batch=micro_batch,
            world_size=workers,
            clip=self.recipe.optim.clip,
            precision=precision,
        )

    def _identify(self, setup: StageSetup) -> dict[str, dict[str, Any]]:
        """Hash the frozen models on every node, and compare nodes with each other and with the checkpoint."""
        from echox.config.paths import cache_dir

        mine: dict[str, dict[str, Any]] | EchoXError | None = None
        if self.context.local_rank == 0:
            try:
                mine = identify(setup.frozen_models, cache_dir() / "sha256.json")
            except EchoXError as error:
                mine = error
        found = [identity for identity in self.gang.gather(mine) if identity is not None]
        for identity in found:
            if isinstance(identity, EchoXError):
                raise identity
            compare_identities(_checked(found[0]), identity)
        identities = _checked(found[0])
        if self.choice.checkpoint is not None:
            compare_identities(self.choice.manifest["frozen"], identities)
        return identities

    def _start_data(self, loader: TrainLoader) -> None:
        """Bring the data to where the checkpoint stood, after all ranks were found to see the same."""
        identities = self.gang.gather(json.dumps(loader.identity(), sort_keys=True))
        for rank, identity in enumerate(identities):
            if identity != identities[0]:
                raise DataError(
                    f"rank {rank} sees other training data than rank 0",
                    where=str(self.folder.path),
                    fix="give every node the same datasets, best in a folder that all of them share",
                )
        resumes = self.choice.checkpoint is not None
        step, cursor = (self.choice.manifest["step"], self.choice.manifest["cursor"]) if resumes else (0, {})
        for clause in loader.start(
            step=step,
            run_folder=self.folder.path,
            saved=cursor.get("stream"),
            accept_new_data=self.accept_new_data,
        ):
            self.log("new_data", step=step, what=clause)

    def _announce(self, precision: str, census: Mapping[str, Any], ds_config: Mapping[str, Any]) -> None:
        self.log(
            "start",
            step=self.step,
            run=self.recipe.name,
            stage=self.recipe.stage,
            world_size=self.gang.size,
            device=self.gang.device,
            precision=precision,
            frozen_placement=self.recipe.engine.frozen_placement,
            dtypes=json.dumps(census),
            peak_gib=peak_gib(self.gang.device),
        )
        if self.gang.leads:
            self.tracker.log_params(self.recipe.model_dump(mode="json"))
            for name, contents in (("recipe.json", self.recipe.model_dump(mode="json")), ("deepspeed.json", ds_config)):
                path = self.folder.path / name
                path.write_text(json.dumps(contents, indent=1))
                self.tracker.artifact(path)

    def progress(self, state: str) -> None:
        """Write the progress file, on rank 0."""
        if not self.gang.leads:
            return
        left = self.recipe.optim.steps - self.step
        self.folder.write_progress(
            stage=self.recipe.stage,
            step=self.step,
            steps=self.recipe.optim.steps,
            state=state,
            attempt=self.attempt,
            loss=self.loss,
            samples_per_s=self.samples_per_s,
            eta_s=None if self.step_s is None else left * self.step_s,
        )


def _due(every: int, done: int, steps: int) -> bool:
    """Whether something that happens every so many steps, and at the end, happens after `done` steps."""
    return done == steps or (every > 0 and done % every == 0)


def _checked(identity: dict[str, dict[str, Any]] | EchoXError) -> dict[str, dict[str, Any]]:
    if isinstance(identity, EchoXError):
        raise identity
    return identity
