"""`echox bench recovery`: kills a worker, the driver and a node of a run on this machine, and times its next new step.

A real head with further raylets, the real job, driver, engine and checkpoints, on synthetic units. `echox bench` itself
is the core's, which knows no cluster; this kind of it is added here.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from echox.bench import cli as bench
from echox.errors import LaunchError
from launch.events import JobEvent, read_events

EVERY = 5
"""Steps between saves."""
STEPS_BETWEEN = 8
PATIENCE_S = 400.0
AIM_S = 60.0


@dataclass(frozen=True)
class Recovery:
    """What one loss cost.

    Attributes:
        lost: worker, driver or node.
        seconds: from SIGKILL to the end of the first step that had not been done before.
        parts: of these seconds: `notice` until the job says what failed, then those of the start (see `echox status`),
            then `again`, the steps that were done again.
        steps_again: how many.
    """

    lost: str
    seconds: float
    parts: Mapping[str, float]
    steps_again: int


def add_parser(subparsers: Any) -> None:
    """Register `echox bench` with `recovery` among its kinds."""
    kinds = bench.add_parser(subparsers)
    text = "seconds from the loss of a worker, the driver or a node to the next new step"
    kind = kinds.add_parser(
        "recovery", help=text, description=f"{text}.", epilog="example: echox bench recovery --lose worker"
    )
    kind.add_argument("--lose", action="append", choices=list(_LOSSES), help="what is killed; default: each in turn")
    kind.add_argument("--json", action="store_true", help="print JSON")
    kind.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure and print one table."""
    found = measure(args.lose or list(_LOSSES))
    print(json.dumps([asdict(each) for each in found]) if args.json else table(found))
    return 0


def table(found: list[Recovery]) -> str:
    """One line a loss."""
    lines = []
    for each in found:
        parts = ", ".join(f"{name} {value:.1f}" for name, value in each.parts.items())
        lines.append(f"{each.lost:8} {each.seconds:6.1f} s (aim {AIM_S:.0f})  {each.steps_again} steps again: {parts}")
    return "\n".join(lines)


def measure(losses: list[str]) -> list[Recovery]:
    """Start a head, a node and a run, lose one after the other, and end it all.

    Raises:
        LaunchError: the run does not come to its next step.
    """
    from launch.client import local_head
    from launch.client.jobs import Jobs
    from launch.client.local_node import LocalNode

    with tempfile.TemporaryDirectory(prefix="echox-recovery-") as place:
        folder = Path(place)
        head = local_head.start_head(cpus=1, registry=folder / "head.json")
        before = dict(os.environ)
        os.environ.update(head.environment())
        nodes = [LocalNode(head)]
        try:
            jobs = Jobs(head.address)
            job = jobs.submit("demo/t2c", _overrides(folder))
            scene = _Scene(folder / "runs" / "recovery", lambda: _ended(jobs, job), nodes, lambda: LocalNode(head))
            return [scene.lose(loss) for loss in losses]
        finally:
            for node in nodes:
                node.kill()
            local_head.stop_head(head)
            os.environ.clear()
            os.environ.update(before)


@dataclass(frozen=True)
class _Scene:
    """A run that goes on, and what it runs on."""

    run: Path
    ended: Callable[[], str]
    nodes: list[Any]
    another: Callable[[], Any]

    def lose(self, loss: str) -> Recovery:
        """Wait for steps to be done, kill, and wait for a step that had not been done."""
        begun = _last_step(read_events(self.run))
        self._wait(lambda: _last_step(read_events(self.run)) >= begun + STEPS_BETWEEN)
        kill = _LOSSES[loss](self)
        done = _last_step(read_events(self.run))
        killed = time.time()
        kill()
        self._wait(lambda: any(_is_new(event, killed, done) for event in read_events(self.run)))
        return recovery(loss, read_events(self.run), killed, done)

    def _wait(self, there: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not there():
            ended = self.ended()
            if ended or time.monotonic() > deadline:
                raise LaunchError(
                    f"the run that is measured does not go on: {ended or 'no new step'}", where=str(self.run)
                )
            time.sleep(0.1)


def recovery(loss: str, events: list[JobEvent], killed: float, done: int) -> Recovery:
    """What a loss cost, from the events of the run.

    Args:
        loss: what was killed.
        events: of the run, by time.
        killed: Unix time.
        done: last step before.
    """
    from launch.client.startup_report import DRIVER, start_up

    after = [event for event in events if event["time"] >= killed]
    new = next(event for event in after if _is_new(event, killed, done))
    noticed = next((event["time"] for event in after if event["event"] in ("job_failure", "job_driver_lost")), killed)
    between = [event for event in after if event["time"] <= new["time"]]
    started = [event for event in between if event["event"] == "start" and event["rank"] == 0]
    parts = {"notice": noticed - killed, **start_up(between)}
    ready = next((event["time"] for event in between if event["event"] == DRIVER), None)
    if ready is not None:
        parts["driver"] = ready - noticed
    parts["again"] = new["time"] - killed - sum(parts.values())
    return Recovery(
        lost=loss,
        seconds=round(new["time"] - killed, 1),
        parts={name: round(value, 1) for name, value in parts.items()},
        steps_again=done - started[-1]["step"] if started else 0,
    )


def _is_new(event: JobEvent, killed: float, done: int) -> bool:
    return event["event"] == "step" and event["rank"] == 0 and event["time"] > killed and event["step"] > done


def _last_step(events: list[JobEvent]) -> int:
    return max((event["step"] for event in events if event["event"] == "step" and event["rank"] == 0), default=0)


def _worker(scene: _Scene) -> Callable[[], None]:
    return _killing(scene.run, "start", 1)


def _driver(scene: _Scene) -> Callable[[], None]:
    return _killing(scene.run, "job_start", "driver")


def _node(scene: _Scene) -> Callable[[], None]:
    """Another node is there before one is lost: what a cluster with a spare one has."""
    scene.nodes.append(scene.another())
    time.sleep(15)
    return scene.nodes.pop(0).kill  # type: ignore[no-any-return]


_LOSSES: dict[str, Callable[[_Scene], Callable[[], None]]] = {"worker": _worker, "driver": _driver, "node": _node}


def _killing(run: Path, event: str, rank: int | str) -> Callable[[], None]:
    """Kill the process that has last written an event."""
    found: Mapping[str, Any] = [each for each in read_events(run) if (each["event"], each["rank"]) == (event, rank)][-1]

    def kill() -> None:
        os.kill(found["pid"], signal.SIGKILL)

    return kill


def _ended(jobs: Any, job: str) -> str:
    status = str(jobs.status(job))
    return "" if status in ("PENDING", "RUNNING") else f"{status}: {jobs.failure(job)}"


def _overrides(folder: Path) -> list[str]:
    """The demo's Stage II with random weights, on synthetic units, without end."""
    import numpy as np

    from echox.stream.format.writer import write_shards
    from echox.units.language import UnitLanguage

    rng = np.random.default_rng(0)
    units = [rng.integers(0, 50, 40) for _ in range(200)]
    UnitLanguage.fit(units, 50, vocab_size=60).save(folder / "language.json")
    samples = (
        {
            "__key__": f"s{number:03d}",
            "answer.units": np.asarray(row, dtype="<u2").tobytes(),
            "json": {"id": f"s{number}", "task": "tts", "answer_text": f"sentence {number}", "answer_s": 2.0},
        }
        for number, row in enumerate(units)
    )
    write_shards(folder / "shards", samples, per_shard=50)
    changed = {
        "name": "recovery",
        "storage": folder / "runs",
        "model.random_init": "true",
        "model.t2c.unit_language": folder / "language.json",
        "data.train": json.dumps([{"path": str(folder / "shards"), "task": "tts"}]),
        "data.valid": "[]",
        "optim.steps": 1_000_000,
        "engine.validate_every": 0,
        "engine.checkpoint_every": EVERY,
        "engine.log_every": 1,
        "scaling.max_failures": 20,
        "tracking.system_metrics": "false",
    }
    return [f"{key}={value}" for key, value in changed.items()]
