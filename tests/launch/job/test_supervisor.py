"""The job's entry process with real children and real signals; a small program stands in for the driver."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

DRIVER = """
    import os, sys, time
    from pathlib import Path
    from launch.events import JobLog
    from launch.job.signals import StopSignals, die_with
    from launch.job.command_line import arguments
    args = arguments("stand-in").parse_intermixed_args()
    die_with(args.parent)
    signals = StopSignals()
    signals.listen()
    folder = Path(args.overrides[0].partition("=")[2])
    with (folder / "starts").open("a") as file:
        file.write(f"{args.restart} {os.getpid()}\\n")
    plan = (folder / "plan").read_text().split()
    code = plan[args.restart] if args.restart < len(plan) else "wait"
    while code == "wait":
        time.sleep(0.02)
        if signals.abort_requested:
            os._exit(130)
        if signals.asked:
            (folder / "asked").touch()
            if not (folder / "slow").exists():
                (folder / "saved").write_text(signals.why)
                os._exit(0)
    if code.isdigit() and code != "70":
        JobLog(folder)("failed", error=code)
    os._exit(int(code.strip("!")))
"""
SUPERVISOR = """
    import sys
    from pathlib import Path
    from launch.events import JobLog
    from launch.job.supervisor import Supervisor
    folder = sys.argv[1]
    sys.exit(Supervisor(["demo/s2t", f"f={folder}"], JobLog(Path(folder)), budget=1, module="stand_in_driver").run())
"""


class Job:
    def __init__(self, folder: Path, plan: str) -> None:
        self.folder = folder
        (folder / "plan").write_text(plan)
        (folder / "stand_in_driver.py").write_text(textwrap.dedent(DRIVER))
        environment = {**os.environ, "PYTHONPATH": str(folder)}
        self.process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(SUPERVISOR), str(folder)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def drivers(self, count: int) -> list[int]:
        """Pids of all drivers so far, once there are `count`."""
        self.until(lambda: len(self._starts()) >= count)
        return [int(line.split()[1]) for line in self._starts()]

    def _starts(self) -> list[str]:
        file = self.folder / "starts"
        return file.read_text().splitlines() if file.exists() else []

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def end(self) -> int:
        return self.process.wait(timeout=60)

    def events(self) -> list[str]:
        lines = (self.folder / "log" / "driver.jsonl").read_text().splitlines()
        return [json.loads(line)["error"] for line in lines]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[str], Job]]:
    jobs: list[Job] = []

    def begin(plan: str) -> Job:
        jobs.append(Job(tmp_path, plan))
        return jobs[-1]

    yield begin
    for job in jobs:
        if job.process.poll() is None:
            os.killpg(job.process.pid, signal.SIGKILL)
            job.process.wait()


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_killed_driver_is_started_again_within_the_budget(start: Callable[[str], Job]) -> None:
    job = start("wait wait")
    for count in (1, 2):
        os.kill(job.drivers(count)[-1], signal.SIGKILL)
    assert job.end() == 1
    assert len(job.drivers(2)) == 2 and job.events() == ["the driver was killed by SIGKILL"] * 2
    assert job.process.stderr is not None
    assert "error: the driver was killed by SIGKILL, and scaling.max_failures=1" in job.process.stderr.read()


@pytest.mark.parametrize(
    ("plan", "code", "starts"),
    [
        ("0", 0, 1),
        ("4", 4, 1),
        ("7", 7, 1),
        ("1", 1, 1),
        ("70 0", 0, 2),
        ("70 70", 1, 2),
        ("75 75 75 70 0", 0, 5),
        ("2! 0", 0, 2),
    ],
)
def test_user_errors_that_are_said_are_final_crashes_cost_the_budget_and_lost_nodes_do_not(
    start: Callable[[str], Job], plan: str, code: int, starts: int
) -> None:
    job = start(plan)
    assert job.end() == code
    assert len(job.drivers(starts)) == starts


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("whom", ["supervisor", "both"])
def test_a_signal_lets_the_driver_save_and_is_not_taken_for_two(
    start: Callable[[str], Job], number: signal.Signals, whom: str
) -> None:
    job = start("wait wait")
    job.drivers(1)
    if whom == "both":
        os.killpg(job.process.pid, number)
    else:
        job.process.send_signal(number)
    assert job.end() == 0
    assert (job.folder / "saved").exists() and len(job.drivers(1)) == 1


def test_a_second_signal_aborts(start: Callable[[str], Job]) -> None:
    job = start("wait wait")
    (job.folder / "slow").touch()
    driver = job.drivers(1)[0]
    job.process.send_signal(signal.SIGTERM)
    job.until((job.folder / "asked").exists)  # two signals at once are one
    assert job.process.poll() is None and not gone(driver)
    job.process.send_signal(signal.SIGTERM)
    assert job.end() == 130 and gone(driver)


def test_no_driver_outlives_its_supervisor(start: Callable[[str], Job]) -> None:
    job = start("wait")
    driver = job.drivers(1)[0]
    job.process.kill()
    job.until(lambda: gone(driver))


def test_the_supervisor_loads_neither_ray_nor_torch() -> None:
    code = "import sys, launch.train; sys.exit(bool({'ray', 'torch', 'mlflow'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
