"""Benchmarks by the processes of a cluster: what is refused before anything starts, and what a job is given."""

from __future__ import annotations

from typing import Any

import pytest
import ray

from launch import evaluate
from launch.evaluate import check_room


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--cpus", "0", "--benchmark", "a"], "--cpus 0 is not above 0"),
        (["--cpus", "nan", "--benchmark", "a"], "--cpus nan is not above 0"),
        (["--gpus", "-1", "--benchmark=a"], "--gpus -1 is below 0"),
        (["--limit", "3"], "--benchmark is missing"),
        (["--benchmark", "a", "--shard=0/2"], "--shard is what --workers decides"),
        (["--shard", "0/2"], "--benchmark is missing; --shard is what --workers decides"),
    ],
)
def test_a_wrong_command_is_refused_before_a_cluster_is_joined(
    words: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ray, "init", lambda *_, **__: pytest.fail("nothing is to be joined"))
    assert evaluate.main(["runs/echo", *words]) == 7
    assert f"error: {said}. Fix: " in capsys.readouterr().err


def test_another_cluster_gets_a_job(submitted: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    words = ["/shared/runs/echo", "--workers", "8", "--benchmark", "a", "--judge", "x"]
    assert evaluate.main([*words, "--address", "http://head:8265"]) == 0
    assert submitted == ["http://head:8265", ["launch.evaluate", *words]]
    assert "submitted evaluate-" in capsys.readouterr().out


def test_a_cluster_that_could_hold_no_process_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ECHOX_AUTOSCALED", raising=False)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0})
    check_room(4.0, 0.0)
    with pytest.raises(evaluate.LaunchError, match=r"8 CPU \(4\), 1 GPU \(0\)"):
        check_room(8.0, 1.0)
    monkeypatch.setenv("ECHOX_AUTOSCALED", "1")
    check_room(8.0, 1.0)


def test_an_address_for_jobs_is_no_cluster_to_join(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://head:8265")
    assert evaluate.main(["runs/echo", "--benchmark", "a"]) == 7
    assert "give --address http://head:8265" in capsys.readouterr().err
