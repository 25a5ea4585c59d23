"""Runs the steps of a project that are left: those whose command, input, or step before them has changed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from echox.config.load import load_recipe
from echox.files import read_record, write_atomically
from launch.ablation.runs import run_echox, workers
from launch.demo import run_state
from launch.paths import make_absolute
from launch.project.steps import Step

STATE = ".steps.json"
"""Of a project: what each step was last done with."""

Say = Callable[[str], None]
Runner = Callable[[Sequence[str], int], None]


def run(folder: Path, steps: Sequence[Step], say: Say, *, cluster: bool = False, runner: Runner = run_echox) -> int:
    """Do what is left to do, step by step; returns how many steps that were.

    A step counts as done when it has ended well with the same command, input, and steps before it. Steps can be killed:
    each goes on where it was.

    Args:
        folder: of the project.
        steps: in order.
        say: called with one line a step.
        cluster: train as jobs of the cluster that is named by $RAY_ADDRESS.
        runner: runs an `echox` command in so many processes; raises where it fails.
    """
    done = {str(name): str(key) for name, key in read_record(folder, STATE).items()}
    keys: dict[str, str] = {}
    count = 0
    for number, step in enumerate(steps, 1):
        keys[step.name] = key = _key(step, keys)
        if done.get(step.name) == key:
            say(f"[{number}/{len(steps)}] {step.name}: done")
            continue
        say(f"[{number}/{len(steps)}] {step.name}: echox {' '.join(step.words)}")
        words, processes = _command(step, cluster)
        runner(words, processes)
        done[step.name] = key
        count += 1
        write_atomically(folder / STATE, json.dumps(done, indent=1) + "\n")
    return count


def _command(step: Step, cluster: bool) -> tuple[Sequence[str], int]:
    """What to run; an earlier run that was made otherwise is set aside."""
    if step.words[0] == "respond" and cluster:
        return ["submit", step.words[1], "--respond", "--follow"], 1
    if step.trains is None:
        return step.words, 1
    if step.words[0] == "vocoder":
        return (["submit", str(step.trains), "--follow"] if cluster else step.words), 1
    recipe = make_absolute(load_recipe(step.trains), Path.cwd())
    if run_state.run_state(recipe)[0] == "stale":
        run_state.set_aside(recipe)
    if cluster:
        return ["submit", str(step.trains), "--follow", "--retries", "2"], 1
    count = workers(recipe)
    return [*step.words, f"scaling.workers={count}"], count


def _key(step: Step, before: dict[str, str]) -> str:
    parts = [list(step.words), [_state(path) for path in step.reads], [before[name] for name in step.after]]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _state(path: Path) -> list[list[object]]:
    """Files of a place, each with its size and time; of a recipe its content, which may be saved unchanged."""
    if path.suffix == ".yaml":
        return [[path.name, hashlib.sha256(path.read_bytes()).hexdigest()]]
    files = sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]
    found = [(each, each.stat()) for each in files]
    return [[str(each), state.st_size, state.st_mtime_ns] for each, state in found]
