from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, cast

import pytest
from rich.console import Console

from echox.errors import LaunchError
from launch.client.follow import describe, follow, read_progress
from launch.client.jobs import Jobs
from launch.demo.phases import MemoryWatch, Phases


class FakeJobs:
    """A job that writes one progress record a poll."""

    def __init__(self, folder: Path, status: str) -> None:
        self.folder, self.final = folder, status

    def wait(self, job: str, *, poll_s: float, on_poll: Any) -> str:
        for step in (1, 2):
            record = {"stage": "s2t", "step": step, "steps": 2, "state": "training", "loss": 3.0 / step}
            record |= {"samples_per_s": 8.0, "eta_s": 61.0, "time": time.time()}
            (self.folder / "progress.json").write_text(json.dumps(record))
            on_poll()
        return self.final

    def failure(self, job: str) -> str:
        return "the shard is cut short. Fix: build it again"


@pytest.mark.parametrize("terminal", [True, False])
def test_following_shows_step_loss_and_rate(tmp_path: Path, terminal: bool) -> None:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=100)
    follow(cast(Jobs, FakeJobs(tmp_path, "SUCCEEDED")), "j", tmp_path, title="s2t", console=console, poll_s=0)
    said = cast(io.StringIO, console.file).getvalue()
    assert "2/2" in said and "loss 1.500" in said and "8.0 samples/s" in said
    assert ("s2t 2/2" in said) == terminal  # the bar itself, which only a terminal gets


def test_a_failed_job_speaks_in_its_own_words(tmp_path: Path) -> None:
    console = Console(file=io.StringIO())
    with pytest.raises(LaunchError, match="job j failed: the shard is cut short"):
        follow(cast(Jobs, FakeJobs(tmp_path, "FAILED")), "j", tmp_path, title="s2t", console=console, poll_s=0)
    with pytest.raises(LaunchError, match="job j was stopped"):
        follow(cast(Jobs, FakeJobs(tmp_path, "STOPPED")), "j", tmp_path, title="s2t", console=console, poll_s=0)


def test_progress_is_words_even_when_half_known(tmp_path: Path) -> None:
    assert read_progress(tmp_path) == {}
    (tmp_path / "progress.json").write_text('{"step": 1')
    assert read_progress(tmp_path) == {}
    assert describe({"step": 0, "steps": 9, "state": "starting", "loss": None, "eta_s": None}) == "0/9  starting"
    assert describe({"step": 1, "steps": 9, "state": "training", "eta_s": 125}) == "1/9  ETA 2:05"


def test_phases_are_timed_and_reuse_is_said() -> None:
    console = Console(file=io.StringIO(), width=100)
    phases = Phases(console)
    with phases.phase("assets", "models"):
        phases.reuse("assets", "all there")
    with pytest.raises(ValueError), phases.phase("corpus", "speech"):
        time.sleep(0.05)
        raise ValueError
    assert phases.seconds["corpus"] >= 0.05 and phases.reused == ["assets"]
    said = cast(io.StringIO, console.file).getvalue()
    assert "reused: all there" in said and re.search(r"done in \d+\.\d s \(reused\)", said)


def test_memory_of_children_counts() -> None:
    hog = "import time; block = bytearray(300_000_000); print('up', flush=True); time.sleep(60)"
    watch = MemoryWatch(interval_s=0.05)
    before = watch.sample()
    child = subprocess.Popen([sys.executable, "-c", hog], stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None
        child.stdout.readline()
        assert watch.sample() - before > 290_000_000
        deadline = time.monotonic() + 60
        while watch.peak_bytes - before <= 290_000_000 and time.monotonic() < deadline:
            time.sleep(0.02)
    finally:
        child.kill()
        child.wait()
    watch.close()
    assert watch.peak_bytes - before > 290_000_000
    assert watch.sample() < watch.peak_bytes
