from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from echox.engine.monitor.event_log import EventLog
from echox.engine.monitor.run_dir import RunDir
from launch.cli import add_parser
from launch.client.startup_report import start_up
from launch.client.status import error_report, report, run_status
from launch.events import JobLog, follow_events, read_events

PEER = "RuntimeError: [gloo/transport/tcp/pair.cc:547] Connection closed by peer"


def failed_run(folder: Path) -> None:
    """Two attempts: in the first, rank 1 failed and rank 0 noticed before rank 1 had written it down."""
    RunDir(folder).next_attempt()
    RunDir(folder).write_progress(stage="s2t", step=7, steps=20, state="training", attempt=1, loss=2.5, eta_s=61.0)
    EventLog(folder, rank=0, attempt=1)("failed", step=7, error=PEER)
    time.sleep(0.01)
    EventLog(folder, rank=1, attempt=1)("failed", step=7, error="ZeroDivisionError: division by zero")
    with (folder / "log" / "rank-00001.jsonl").open("a") as file:
        file.write('{"time": 1, "event": "cut sho')


def test_the_cause_comes_first_whoever_wrote_first(tmp_path: Path) -> None:
    failed_run(tmp_path)
    events = read_events(tmp_path)
    assert [event["rank"] for event in events] == [0, 1]
    lines = error_report(events)
    assert lines[0] == "attempt 1, cause: rank 1: ZeroDivisionError: division by zero"
    assert "rank=1" in lines[1] and "rank=0" in lines[2]
    JobLog(tmp_path)("failure", kind="lost", failed_rank=1, error="worker 1 was lost", decision="again, 0 left")
    assert error_report(read_events(tmp_path))[0] == "attempt 1, cause: rank 1: worker 1 was lost"


def test_status_tells_progress_checkpoint_and_last_failure(tmp_path: Path) -> None:
    failed_run(tmp_path)
    JobLog(tmp_path)("failure", kind="lost", failed_rank=1, error="worker 1 was lost", decision="again, 0 left")
    checkpoint = tmp_path / "checkpoints" / "step-00000005"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}")
    known = run_status(tmp_path)
    assert known["step"] == 7 and known["checkpoint"]["path"] == str(checkpoint)
    job = {"id": "tiny-a1", "status": "RUNNING", "start": 100.0, "end": 3765.0}
    said = report("tiny", job, known)
    for words in ("tiny-a1  RUNNING  1:01:05", "training, attempt 1", "7/20  loss 2.500", "ETA 1:01", "step-00000005"):
        assert words in said
    assert "attempt 1, step 7: worker 1 was lost (again, 0 left)" in said
    assert "cannot be seen" in report("tiny", job, None)


def test_a_folder_needs_no_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import argparse

    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:9")
    failed_run(tmp_path)

    def run(*words: str) -> str:
        parser = argparse.ArgumentParser()
        add_parser(parser.add_subparsers())
        args = parser.parse_args(words)
        assert args.run(args) == 0
        return capsys.readouterr().out

    assert "7/20" in run("status", str(tmp_path))
    merged = run("logs", str(tmp_path)).splitlines()
    assert len(merged) == 2 and "rank=0 step=7 attempt=1 failed" in merged[0]
    assert run("logs", str(tmp_path), "--errors").startswith("attempt 1, cause: rank 1: ZeroDivisionError")
    run("stop", str(tmp_path))
    assert json.loads((tmp_path / "stop.json").read_text())["why"] == "echox stop"


def test_following_events_gives_each_once_and_no_half_lines(tmp_path: Path) -> None:
    failed_run(tmp_path)
    rounds = iter([True, True, False])
    found: list[dict[str, Any]] = []
    for event in follow_events(tmp_path, lambda: next(rounds), poll_s=0):
        found.append(event)
        if len(found) == 2:
            with (tmp_path / "log" / "rank-00001.jsonl").open("a") as file:
                file.write('rt"}\n' + json.dumps({"time": 3.0, "event": "late"}) + "\n")
    assert [event["event"] for event in found] == ["failed", "failed", "cut short", "late"]


def test_a_start_is_split_into_its_parts_and_one_after_a_loss_begins_there(tmp_path: Path) -> None:
    own = {"imports": 20.0, "models": 5.0}
    first = [
        {"time": 105.0, "event": "job_begin", "rank": "driver"},
        {"time": 115.0, "event": "job_start", "rank": "driver"},
        {"time": 149.0, "event": "start", "rank": 1, "start_s": {"imports": 0.0}},
        {"time": 150.0, "event": "start", "rank": 0, "start_s": own},
    ]
    step = {"time": 153.0, "event": "step", "rank": 0}
    assert start_up(first, 100.0) == {}, "nothing has been trained yet"
    expected = {"ray": 5.0, "driver": 10.0, "workers": 10.0, **own, "step": 3.0}
    assert start_up([*first, step, {**step, "time": 160.0}], 100.0) == expected
    assert sum(expected.values()) == 53.0
    again = [
        {"time": 200.0, "event": "job_failure", "rank": "driver"},
        {"time": 240.0, "event": "start", "rank": 0, "start_s": own},
        {**step, "time": 242.0},
    ]
    assert start_up([*first, step, *again], 100.0) == {"workers": 15.0, **own, "step": 2.0}
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "rank-00000.jsonl").write_text("".join(json.dumps(event) + "\n" for event in [*first, step]))
    said = report("tiny", None, run_status(tmp_path, 100.0))
    assert "start       53 s: ray 5, driver 10, workers 10, imports 20, models 5, step 3" in said
