"""Starts worker scripts of the engine tests in one process or several, and runs a plan's scenarios in them.

Most of a process's start is the import of torch and DeepSpeed, so a server imports them once and every rank is a fork
of it: a process of its own that may be killed like any other.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from echox.engine.context import LocalContext, TorchrunContext

Context = LocalContext | TorchrunContext
Scenario = dict[str, Any]
LIMIT_S = 240
HERE = Path(__file__).resolve().parent


def prepare(folder: Path) -> Path:
    """Put a frozen model and a ZeRO-3 JSON where `launch` expects them."""
    (folder / "frozen").mkdir()
    (folder / "frozen" / "model.safetensors").write_bytes(b"frozen weights")
    zero = {"stage": 3, "overlap_comm": False, "stage3_param_persistence_threshold": 0}
    (folder / "ds.json").write_text(json.dumps({"zero_optimization": zero}))
    return folder


@dataclass
class Ranks:
    """The processes of one world.

    Attributes:
        processes: by rank.
        logs: what each wrote to stdout and stderr.
    """

    processes: list[BaseProcess]
    logs: list[Path]

    def wait(self, limit_s: float = LIMIT_S) -> list[int | None]:
        """Wait until all have ended, or one has failed: then the others are ended as a launcher would; exit codes."""
        deadline = time.monotonic() + limit_s
        while any(process.is_alive() for process in self.processes) and time.monotonic() < deadline:
            if any(process.exitcode for process in self.processes):
                break
            time.sleep(0.02)
        self.kill()
        return [process.exitcode for process in self.processes]

    def kill(self) -> None:
        """End what still runs, without a word of warning."""
        for process in self.processes:
            process.kill()
            process.join()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to every rank."""
        for process in self.processes:
            assert process.pid is not None
            os.kill(process.pid, number)

    def said_by(self, rank: int) -> str:
        """All that a rank wrote."""
        return self.logs[rank].read_text() if self.logs[rank].exists() else ""

    def said(self) -> str:
        """The end of what every rank wrote."""
        return "\n".join(f"--- {log.name}\n{log.read_text()[-4000:]}" for log in self.logs if log.exists())


def start(folder: Path, worker: Path, processes: int, scenarios: list[Scenario], **env: str) -> Ranks:
    """Start a worker script on a plan of scenarios; rank 0 leaves what came out in `out.json`."""
    paths = {"deepspeed": "ds.json", "frozen": "frozen", "storage": "runs", "out": "out.json"}
    plan = {key: str(folder / name) for key, name in paths.items()}
    (folder / "plan.json").write_text(json.dumps({**plan, "scenarios": scenarios}))
    (folder / "out.json").unlink(missing_ok=True)
    environment = {"ECHOX_CACHE": str(folder / "cache"), **env}
    if processes > 1:
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(processes)}
    logs = [folder / f"rank-{rank}.out" for rank in range(processes)]
    started = []
    for rank, log in enumerate(logs):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
        arguments = (str(worker), str(folder / "plan.json"), {**environment, **place}, str(log))
        started.append(_server().Process(target=_rank, args=arguments, daemon=True))
        started[-1].start()
    return Ranks(started, logs)


def launch(folder: Path, worker: Path, processes: int, scenarios: list[Scenario]) -> dict[str, Any]:
    """Run scenarios one after the other; returns what rank 0 says of each."""
    ranks = start(folder, worker, processes, scenarios)
    codes = ranks.wait()
    assert codes == [0] * processes, f"{codes}\n{ranks.said()}"
    outcomes: dict[str, Any] = json.loads((folder / "out.json").read_text())
    return outcomes


def work(run: Callable[[dict[str, Any], Context, Scenario], Any]) -> None:
    """The main function of a worker script, which is called with the file of its plan."""
    plan = json.loads(Path(sys.argv[1]).read_text())
    kind = TorchrunContext if TorchrunContext.detected() else LocalContext
    outcomes = {}
    with kind(plan["storage"]) as context:
        for scenario in plan["scenarios"]:
            outcomes[scenario.get("label", scenario["name"])] = run(plan, context, scenario)
    if context.rank == 0:
        Path(plan["out"]).write_text(json.dumps(outcomes))


@functools.cache
def _server() -> Any:
    """The server, started with one thread: what it does not start, a fork of it cannot miss."""
    context = multiprocessing.get_context("forkserver")
    here = Path(__file__).resolve().parent
    paths = os.pathsep.join([str(here), str(here.parents[1])])  # it finds modules to preload by PYTHONPATH alone
    single = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": paths}
    before = {name: os.environ.get(name) for name in single}
    os.environ.update(single)
    try:
        context.set_forkserver_preload(["warm"])
        forkserver.ensure_running()
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
    return context


def _rank(worker: str, plan: str, environment: Mapping[str, str], log: str) -> None:
    """The whole life of one rank."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    os.environ.update(environment)
    sys.argv = [worker, plan]
    sys.path[:0] = [str(Path(worker).parent), str(HERE), str(HERE.parents[1])]
    spec = importlib.util.spec_from_file_location("__main__", worker)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["__main__"] = module
    spec.loader.exec_module(module)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
