"""Runs the steps of a project that are left: those whose command, input, or step before them has changed."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from echox.config.load import load_recipe
from echox.config.schema import Recipe
from echox.errors import RecipeError
from echox.vocoder.recipe import VoiceRecipe, load_voice
from launch import run_state
from launch.ablation.runs import run_echox, workers
from launch.paths import make_absolute
from launch.project.ledger import Done, Row, alone, at_work, read_done, write_done
from launch.project.steps import Step

Say = Callable[[str], None]
Runner = Callable[[Sequence[str], int], None]
Watch = Callable[[Mapping[str, Done]], None]


def run(
    folder: Path,
    steps: Sequence[Step],
    say: Say,
    *,
    until: str | None = None,
    cluster: bool = False,
    runner: Runner = run_echox,
    watch: Watch = lambda done: None,
) -> int:
    """Do what is left to do, step by step; returns how many steps that were.

    A step counts as done when it has ended well with the same command, input, and steps before it, and its result is
    there. Steps can be killed: each goes on where it was.

    Args:
        folder: of the project.
        steps: in order.
        say: called with one line when a step begins, ends, or has nothing to do.
        until: the last step to do; None does all.
        cluster: train as jobs of the cluster that is named by $RAY_ADDRESS.
        runner: runs an `echox` command in so many processes; raises where it fails.
        watch: called with all that is done when a step has ended well.

    Raises:
        LaunchError: a step failed, or another process does the steps of this project.
        RecipeError: a recipe is gone, or wrong.
    """
    names = [step.name for step in steps]
    wanted = steps if until is None else steps[: names.index(until) + 1]
    began, count, keys = time.monotonic(), 0, dict[str, str]()
    with alone(folder) as worker:
        done = read_done(folder)
        for number, step in enumerate(wanted, 1):
            keys[step.name] = key = _key(step, keys)
            line = f"[{number}/{len(wanted)}] {step.name}"
            if _is_done(step, key, done):
                say(f"{line}: done")
                continue
            # What a change has begun to replace is no longer what any step behind it was done with.
            for name in _hanging_on(step.name, steps):
                done.pop(name, None)
            write_done(folder, done)
            worker.begins(step.name)
            say(f"{line}: running echox {' '.join(step.words)}")
            start = time.monotonic()
            try:
                runner(*_command(step, cluster, say))
            except BaseException:
                say(f"{line}: left, after {time.monotonic() - start:.0f} s")
                raise
            seconds, count = time.monotonic() - start, count + 1
            done[step.name] = Done(key, round(seconds, 1))
            write_done(folder, done)
            watch(done)
            say(f"{line}: done in {seconds:.0f} s, {time.monotonic() - began:.0f} s since the start")
    return count


def states(folder: Path, steps: Sequence[Step]) -> list[Row]:
    """How each step stands, without doing any."""
    done, busy, keys, rows = read_done(folder), at_work(folder), dict[str, str](), list[Row]()
    for step in steps:
        keys[step.name] = key = _key(step, keys)
        if busy is not None and busy[0] == step.name:
            rows.append(Row(step.name, "running", busy[1]))
        elif _is_done(step, key, done):
            rows.append(Row(step.name, "done", done[step.name].seconds))
        else:
            rows.append(Row(step.name, "left"))
    return rows


def _is_done(step: Step, key: str, done: Mapping[str, Done]) -> bool:
    earlier = done.get(step.name)
    return earlier is not None and earlier.key == key and (step.makes is None or step.makes.exists())


def _hanging_on(name: str, steps: Iterable[Step]) -> set[str]:
    """A step and all that use its result, or that of one that does."""
    found = {name}
    for step in steps:
        if found & set(step.after):
            found.add(step.name)
    return found


def _command(step: Step, cluster: bool, say: Say) -> tuple[Sequence[str], int]:
    """What to run; an earlier run that was made otherwise is set aside."""
    if step.words[0] == "respond" and cluster:
        return ["submit", step.words[1], "--respond", "--follow"], 1
    if step.trains is None:
        return step.words, 1
    if step.words[0] == "vocoder":
        _make_room(step, make_absolute(load_voice(step.trains), Path.cwd()), say)
        return (["submit", str(step.trains), "--follow"] if cluster else step.words), 1
    recipe = make_absolute(load_recipe(step.trains), Path.cwd())
    _make_room(step, recipe, say)
    if cluster:
        return ["submit", str(step.trains), "--follow", "--retries", "2"], 1
    count = workers(recipe)
    return [*step.words, f"scaling.workers={count}"], count


def _make_room(step: Step, recipe: Recipe | VoiceRecipe, say: Say) -> None:
    """Set an earlier run aside that was made by another recipe, or of other inputs."""
    state, why = run_state.run_state(recipe)
    if state == "stale":
        say(f"{step.name}: {why}; the earlier run is kept in {run_state.set_aside(recipe)}")


def _key(step: Step, before: Mapping[str, str]) -> str:
    parts = [list(step.words), [_state(path) for path in step.reads], [before[name] for name in step.after]]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _state(path: Path) -> list[list[object]]:
    """Files of a place, each with its size and time; of a recipe its content, which may be saved unchanged."""
    if path.suffix == ".yaml":
        if not path.is_file():
            fix = "put it back, or make the project again under another name"
            raise RecipeError("a recipe of the project is gone", where=str(path), fix=fix)
        return [[path.name, hashlib.sha256(path.read_bytes()).hexdigest()]]
    files = sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]
    return [[str(each), *_size_and_time(each)] for each in files]


def _size_and_time(path: Path) -> tuple[int, int]:
    """Of a file; of one that is not there, whose absence a build reports, nothing."""
    try:
        found = path.stat()
    except (OSError, ValueError):
        return (-1, 0)
    return found.st_size, found.st_mtime_ns
