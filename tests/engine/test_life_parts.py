"""The parts of a run's life without an engine: votes, retention, changes of a recipe, health, stop and watchdog."""

from __future__ import annotations

import copy
import errno
import json
import math
import os
import random
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from echox.config.load import load_recipe, resolved
from echox.config.schema import HealthConfig
from echox.engine import stop, trainer
from echox.engine.checkpoint import manifest
from echox.engine.checkpoint.recipe_diff import changes, refused_changes
from echox.engine.checkpoint.retention import Retention
from echox.engine.loss_guard import LossGuard
from echox.engine.monitor import watchdog as watchdog_module
from echox.engine.monitor.run_dir import RunDir
from echox.engine.monitor.watchdog import Watchdog
from echox.engine.rank_status import RankStatus, Vote
from echox.engine.stop import StopListener, clear_stop, read_stop, request_stop, signals_stop
from echox.engine.world import World
from echox.errors import CheckpointError, TrainingError

ALONE = World(0, 1, torch.device("cpu"))


def test_a_vote_is_collected_one_step_later() -> None:
    rank_status = RankStatus(ALONE)
    assert rank_status.exchange(Vote(stop=True, save=1)) == Vote()
    assert rank_status.exchange(Vote(written=True, save=2)) == Vote(stop=True, save=1)
    assert rank_status.exchange_now(Vote(failed=True, save=3)) == Vote(failed=True, save=3)
    assert rank_status.collect() == Vote()


def test_retention_against_a_written_out_rule() -> None:
    chance = random.Random(3)
    for _ in range(300):
        steps = sorted(chance.sample(range(1, 60), chance.randrange(1, 15)))
        metrics = {step: {"loss": chance.choice([0.5, 1.0, math.nan, chance.random()])} for step in steps}
        rule = Retention(last=chance.randrange(1, 4), every=chance.choice([0, 5]), best=chance.choice([None, "loss"]))
        doomed = rule.doomed(metrics)
        for step in steps:
            newest = sum(other > step for other in steps) < rule.last
            kept_for_good = bool(rule.every) and step % rule.every == 0
            mine = metrics[step]["loss"]
            others = [metrics[other]["loss"] for other in steps if other < step]
            later = [metrics[other]["loss"] for other in steps if other > step]
            best = (
                rule.best is not None
                and math.isfinite(mine)
                and not any(loss <= mine for loss in others)
                and not any(loss < mine for loss in later)
            )
            assert (step in doomed) == (not (newest or kept_for_good or best))


def test_changes_that_make_another_training_are_refused_unless_named() -> None:
    before = {
        "storage": "a",
        "optim": {"lr": {"lora": 1.0, "echo": 2.0}, "steps": 5},
        "engine": {"keep": 2, "precision": "fp32"},
        "data": {"train": [1], "micro_batch": 4, "asr_instruction": "x"},
    }
    now = {
        "storage": "b",
        "optim": {"lr": {"lora": 3.0, "echo": 2.0}, "steps": 6},
        "engine": {"keep": 3, "precision": "bf16"},
        "data": {"train": [2], "micro_batch": 8, "asr_instruction": "y"},
        "new": 1,
    }
    assert len(changes(before, now)) == 9
    refused = [key for key, _, _ in refused_changes(before, now)]
    assert refused == ["data.asr_instruction", "engine.precision", "new", "optim.lr.lora", "optim.steps"]
    assert refused_changes(before, now, ["lr", "steps"]) == [
        ("data.asr_instruction", "x", "y"),
        ("engine.precision", "fp32", "bf16"),
        ("new", None, 1),
    ]
    assert not refused_changes(before, now, ["optim", "engine.precision", "asr_instruction", "new"])
    assert refused_changes(before, now, ["ste", "lora"])[-1][0] == "optim.steps"


def test_a_checkpoint_of_an_older_version_lacks_keys_and_has_others() -> None:
    now = resolved(load_recipe("demo/s2t"))
    before = copy.deepcopy(now)
    del before["health"], before["data"]["micro_batch"], before["data"]["pool"], before["optim"]["hold_steps"]
    before["scaling"]["gone"] = before["engine"]["gone"] = before["data"]["train"][0]["gone"] = 1
    before["model"]["llm"]["path"] = "elsewhere"
    hold_steps = now["optim"]["hold_steps"]
    assert refused_changes(before, now) == [("engine.gone", 1, None), ("optim.hold_steps", None, hold_steps)]
    assert not refused_changes(before, now, ["gone", "optim.hold_steps", "no_such_key"])


def test_health_judges_against_good_steps_alone() -> None:
    health = LossGuard(HealthConfig(spike_sigma=3, spike_window=8), torch.device("cpu"))
    chance, good = random.Random(5), []
    for step in range(200):
        loss = chance.gauss(1.0, 0.1) + (step % 37 == 36) * 2.0
        if step % 41 == 40:
            loss = chance.choice([math.nan, math.inf, -math.inf])
        window = good[-8:]
        spiked = False
        if len(window) >= 4:
            mean = sum(window) / len(window)
            deviation = math.sqrt(sum((x - mean) ** 2 for x in window) / (len(window) - 1))
            spiked = loss > mean + 3 * deviation
        bad = spiked or not math.isfinite(loss)
        nan_if_bad = float(health.nan_if_bad(torch.tensor(loss, dtype=torch.float64)))
        assert math.isnan(nan_if_bad) == bad and (bad or nan_if_bad == 1)
        health.record(torch.tensor(loss), skipped=bad)
        if not bad:
            good.append(float(torch.tensor(loss)))
        if step == 100:  # what a checkpoint holds goes on the same
            state = json.loads(json.dumps(health.state()))
            health = LossGuard(HealthConfig(spike_sigma=3, spike_window=8), torch.device("cpu"))
            health.load(state)
    assert health.bad_steps == 200 - len(good) and health.bad_steps > 8


@pytest.mark.parametrize(
    ("policy", "row", "rewinds", "limit"),
    [("stop", 1, 0, "on_bad_step=stop"), ("skip", 3, 0, "max_bad_steps=2"), ("rewind", 1, 3, "max_rewinds=3")],
)
def test_patience_ends_with_the_policy_named(policy: Any, row: int, rewinds: int, limit: str) -> None:
    health = LossGuard(HealthConfig(on_bad_step=policy, max_bad_steps=2, max_rewinds=3), torch.device("cpu"))
    health.rewinds = rewinds
    for _ in range(row):
        health.record(None, skipped=True)
    with pytest.raises(TrainingError, match=limit) as error:
        health.check(7, {"loss/total": math.nan, "loss/s2t": 1.0}, "run")
    assert "loss/total is not a finite number at step 7" in str(error.value)
    if policy != "stop":
        health.in_a_row, health.rewinds = 1, 0
        health.check(7, {"loss/total": math.nan}, "run")


def test_a_request_to_stop_is_heard_once_and_withdrawn(tmp_path: Path) -> None:
    assert read_stop(tmp_path) is None
    request_stop(tmp_path, "maintenance")
    listener = StopListener(tmp_path)
    try:
        _until(lambda: listener.why == "maintenance")
    finally:
        listener.close()
    clear_stop(tmp_path)
    clear_stop(tmp_path)
    assert read_stop(tmp_path) is None
    (tmp_path / "stop.json").write_text("")
    assert read_stop(tmp_path) == "asked to stop"


@pytest.mark.parametrize(("number", "why"), [(errno.ESTALE, None), (errno.EIO, None), (errno.EACCES, "asked to stop")])
def test_a_storage_that_stutters_stops_no_run(
    number: int, why: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(path: Path, most: int) -> bytes:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(stop, "read_regular", read)
    assert read_stop(tmp_path) == why


def test_a_storage_that_stutters_while_the_best_is_looked_for_deletes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in range(4):
        (tmp_path / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)

    def read(path: Path, most: int) -> bytes:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(manifest, "read_regular", read)
    assert Retention(last=1, best="loss").apply(tmp_path) == []
    assert len(list((tmp_path / "checkpoints").iterdir())) == 4


def test_the_launchers_word_and_a_signal_are_requests_too() -> None:
    asked: list[str | None] = [None]
    listener = StopListener(None, lambda: asked[0])
    try:
        asked[0] = "node drained"
        _until(lambda: listener.why == "node drained")
    finally:
        listener.close()
    before = signal.getsignal(signal.SIGTERM)
    quiet = StopListener(None)
    try:
        with signals_stop(quiet):
            os.kill(os.getpid(), signal.SIGTERM)
            assert quiet.why == "SIGTERM"
            quiet.request("later")
            assert quiet.why == "SIGTERM"
    finally:
        quiet.close()
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_second_interrupt_ends_the_process_the_usual_way() -> None:
    listener = StopListener(None)
    try:
        with pytest.raises(KeyboardInterrupt), signals_stop(listener):
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
    finally:
        listener.close()


def test_the_watchdog_knows_how_long_steps_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left, told, now = threading.Event(), [], [0.0]
    monkeypatch.setattr(watchdog_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    dog = Watchdog(
        tmp_path,
        name="attempt-1",
        rank=3,
        factor=5,
        least_s=0.2,
        report=lambda waited, stacks: told.append((waited, stacks)),
        leave=left.set,
    )
    assert dog.limit_s() == pytest.approx(2.0)
    for step in range(10):
        dog.beat(step, timed=True)
        now[0] += 0.01
    assert dog.limit_s() == pytest.approx(0.2)
    dog.beat(10, timed=False)
    assert dog.limit_s() == pytest.approx(2.0), "a save or a validation has no usual length"
    dog.beat(11, timed=True)
    now[0] += 0.3
    _until(lambda: bool(told))
    assert told[0][0] == pytest.approx(0.3)
    assert told[0][1].name == "attempt-1-step-00000011-rank-00003.txt"
    assert "test_the_watchdog_knows" in told[0][1].read_text()
    dog.close()
    assert left.wait(10)


def test_a_newer_attempt_takes_the_right_to_save(tmp_path: Path) -> None:
    folder = RunDir(tmp_path)
    assert folder.last_attempt() == 0
    first = folder.next_attempt()
    folder.check_attempt(first)
    assert folder.next_attempt() == first + 1
    with pytest.raises(CheckpointError, match="attempt 2 of this run has begun, so attempt 1 may no longer save"):
        folder.check_attempt(first)


def _until(condition: Any) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_deepspeed_file_of_a_recipe_is_found_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    attempt: Any = SimpleNamespace(recipe=load_recipe("demo/t2c"), world=SimpleNamespace(size=2))
    found = trainer._Attempt._deepspeed_config(attempt, "fp32")
    assert found["zero_optimization"]["stage"] == 3 and found["train_batch_size"] == 16
