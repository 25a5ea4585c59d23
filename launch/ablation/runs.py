"""Trains the runs of an ablation, each a recipe of its scale with overrides, in processes of this machine.

`echox train` does the work, under torchrun where a recipe has several workers. What is done is left alone, and what was
interrupted goes on.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from echox.config.load import load_recipe
from echox.device import usable_gpus
from echox.errors import LaunchError
from echox.tracking.names import tracking_uri
from launch import run_state
from launch.ablation.answers import annotated_sources
from launch.ablation.arms import BASE, Arm
from launch.paths import make_absolute

if TYPE_CHECKING:
    from echox.config.schema import Recipe

STAGES = ("s2t", "t2c", "echo")
STOP_S = 60.0
"""What a training gets to save and end when the ablation is interrupted."""
GENERATED = "generated"

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """The runs of one scale.

    Attributes:
        scale: its recipes are `<scale>/{s2t,t2c,echo}`.
        storage: folder of the scale's runs, absolute; the arms' runs lie in `ablation/` below it.
        corpus: folder of the scale's corpus.
        overrides: `key=value` for all stages, or `STAGE.key=value` for one.
        say: called with one line for people.
    """

    scale: str
    storage: Path
    corpus: Path
    overrides: tuple[str, ...] = ()
    say: Say = print

    @property
    def folder(self) -> Path:
        """Folder of the arms' runs."""
        return self.storage / "ablation"

    @property
    def parent_run(self) -> str:
        """The MLflow run that the arms' runs are children of."""
        return f"ablation-{self.scale}"

    def seeds(self, count: int) -> list[int]:
        """The recipe's own seed and those after it."""
        first = load_recipe(f"{self.scale}/echo", self._own("echo")).seed
        return [first + number for number in range(count)]

    def shared(self, stage: str) -> list[str]:
        """Overrides of a stage that the arms have in common, Stage I always and Stage II mostly."""
        return [*self._own(stage), f"storage={self.storage}"]

    def decoder(self, arm: Arm, seed: int) -> list[str]:
        """Overrides of Stage II for an arm that has a T2C decoder of its own."""
        return [*self._own("t2c"), *arm.decoder, *self._of_arm("t2c", f"{arm.name}-t2c-s{seed}", seed)]

    def echo(self, arm: Arm, seed: int) -> list[str]:
        """Overrides of Stage III for an arm."""
        s2t = self._shared_folder("s2t")
        t2c = self.folder / f"{arm.name}-t2c-s{seed}" if arm.decoder else self._shared_folder("t2c")
        init = [f"init.s2t={s2t}", f"init.t2c={t2c}"]
        own = self._own("echo")
        if not arm.aligned:
            base = load_recipe(f"{self.scale}/echo", [*own, *init])
            own.append(f"optim.steps={base.optim.steps - base.model.echo.denoising.align_steps}")
        return [*own, *arm.overrides, *init, *self._of_arm("echo", f"{arm.name}-s{seed}", seed)]

    def check(self, arms: Sequence[Arm]) -> None:
        """Load every recipe, so that a mistake in the last is not found after the first was trained.

        Raises:
            RecipeError: one cannot be run.
        """
        for stage in ("s2t", "t2c"):
            load_recipe(f"{self.scale}/{stage}", self.shared(stage))
        for arm in arms:
            load_recipe(f"{self.scale}/echo", self.echo(arm, 0))
            load_recipe(f"{self.scale}/t2c", self.decoder(arm, 0))

    def run(self, arm: Arm, seed: int) -> Path:
        """Train an arm to its end with one seed, with all that it starts from; returns its folder.

        Raises:
            LaunchError: a training failed or was stopped, or a run it starts from was made by another recipe.
            EchoXError: the arm needs data or models that are not there.
        """
        self._ensure("s2t", self.shared("s2t"), replace=False)
        if arm.decoder:
            self._ensure("t2c", self.decoder(arm, seed))
        else:
            self._ensure("t2c", self.shared("t2c"), replace=False)
        if arm.name == BASE and (own := self._own_run(seed)) is not None:
            return own
        overrides = self.echo(arm, seed)
        if arm.annotated:
            recipe = load_recipe(f"{self.scale}/echo", overrides)
            overrides += annotated_sources(recipe, self.corpus / "units", self.folder / "data", self.say)
        return self._ensure("echo", overrides)

    def _own_run(self, seed: int) -> Path | None:
        """The scale's own run of Stage III, if it has this seed and is done: it is what the base arm would be."""
        init = [f"init.{stage}={self._shared_folder(stage)}" for stage in ("s2t", "t2c")]
        recipe = make_absolute(load_recipe(f"{self.scale}/echo", [*self.shared("echo"), *init]), Path.cwd())
        if recipe.seed != seed or run_state.run_state(recipe)[0] != "done":
            return None
        self.say(f"{recipe.name}: done, reused as the base")
        return Path(recipe.storage) / recipe.name

    def _ensure(self, stage: str, overrides: Sequence[str], *, replace: bool = True) -> Path:
        """Train a run unless it is done; one of another recipe or older inputs is set aside, or refused."""
        named = f"{self.scale}/{stage}"
        recipe = make_absolute(load_recipe(named, overrides), Path.cwd())
        folder = Path(recipe.storage) / recipe.name
        state, why = run_state.run_state(recipe)
        if state == "done":
            self.say(f"{recipe.name}: done, reused")
            return folder
        if state == "stale" and not replace:
            raise LaunchError(
                f"the arms start from run {recipe.name}, but {why}",
                where=str(folder),
                fix="train it again, or name another folder of runs by --storage",
            )
        if state == "stale":
            self.say(f"{recipe.name}: {why}; the earlier run is kept in {run_state.set_aside(recipe)}")
        count = workers(recipe)
        words = [named, *overrides, f"scaling.workers={count}"]
        if stage == "echo" and recipe.model.echo.pseudo_text == GENERATED:
            self.say(f"{recipe.name}: answers to its questions")
            run_echox(["respond", *words], count)
        self.say(f"{recipe.name}: {why if state == 'partial' else 'training'}")
        run_echox(["train", *words], count)
        if run_state.run_state(recipe)[0] != "done":
            raise LaunchError(f"run {recipe.name} ended before its last step", fix="run the same command to continue")
        return folder

    def _own(self, stage: str) -> list[str]:
        """What the user overrides of one stage."""
        found: list[str] = []
        for words in self.overrides:
            first, _, rest = words.partition(".")
            if first == stage:
                found.append(rest)
            elif first not in STAGES:
                found.append(words)
        return found

    def _of_arm(self, stage: str, name: str, seed: int) -> list[str]:
        uri = tracking_uri(load_recipe(f"{self.scale}/{stage}", self._own(stage)).tracking.uri, self.storage)
        tracking = [f"tracking.parent_run={self.parent_run}", f"tracking.uri={uri}"]
        return [f"storage={self.folder}", f"name={name}", f"seed={seed}", *tracking]

    def _shared_folder(self, stage: str) -> Path:
        return self.storage / load_recipe(f"{self.scale}/{stage}", self.shared(stage)).name


def workers(recipe: Recipe) -> int:
    """Processes of a training here: the recipe's least number, or as many below it as there are GPUs for."""
    data, least = recipe.data, recipe.scaling.bounds[0]
    portions = data.global_batch // data.micro_batch if data.budget is None else data.budget.micro_batches
    room = min(least, usable_gpus() or least)
    return max(count for count in range(1, room + 1) if portions % count == 0)


def run_echox(words: Sequence[str], processes: int) -> None:
    """Run one command of the program to its end; an interrupt lets it save and end first.

    Raises:
        LaunchError: it failed; its own words are on standard error.
    """
    start = [sys.executable, "-m"]
    environment = dict(os.environ)
    if processes > 1:
        start += ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
        environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // processes)))
    # A session of its own: Ctrl-C reaches us alone. Its result is no part of ours, so it goes to standard error.
    running = subprocess.Popen([*start, "echox", *words], env=environment, stdout=2, start_new_session=True)
    try:
        code = running.wait()
    except BaseException:
        running.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            running.wait(STOP_S)
        _kill_rest(running)
        raise
    if code:
        raise LaunchError(
            f"`echox {' '.join(words[:2])}` ended with exit code {code}",
            fix="what it says above; the same command goes on from here",
        )


def _kill_rest(running: subprocess.Popen[bytes]) -> None:
    kill = partial(os.killpg, running.pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        kill()
    running.wait()
