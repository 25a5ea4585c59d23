"""Sweeps: what is tried, which trials are ended early, and how a cluster's jobs are followed and found again."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from echox.errors import LaunchError, RecipeError
from launch.sweep import runner
from launch.sweep.cli import ranked, table
from launch.sweep.runner import Sweep, curve, problem
from launch.sweep.stopping import MedianRule
from launch.sweep.trials import space


def test_a_grid_has_every_combination_once_and_each_its_own_run() -> None:
    found = space(["optim.lr.llm=1e-4,2e-4", "seed=1,2,2", "optim.steps=10", "data.train=[a,b]"]).trials("r", None, 0)
    assert [trial.values for trial in found] == [
        {"optim.lr.llm": "1e-4", "seed": "1"},
        {"optim.lr.llm": "1e-4", "seed": "2"},
        {"optim.lr.llm": "2e-4", "seed": "1"},
        {"optim.lr.llm": "2e-4", "seed": "2"},
    ]
    assert len({trial.name for trial in found}) == 4 and all(trial.name.startswith("r-") for trial in found)
    for trial in found:
        assert {"optim.steps=10", "data.train=[a,b]", f"name={trial.name}", "tracking.parent_run=r-sweep"} <= set(
            trial.overrides
        )


def test_a_setting_keeps_its_run_when_others_are_added() -> None:
    few = {trial.name for trial in space(["a=1,2", "c=5"]).trials("r", None, 0)}
    more = {trial.name for trial in space(["c=5", "a=3,2,1"]).trials("r", None, 0)}
    other = {trial.name for trial in space(["a=1,2", "c=6"]).trials("r", None, 0)}
    assert few < more and not few & other


def test_draws_lie_in_their_ranges_and_come_again_with_the_seed() -> None:
    words = ["a=loguniform(1e-5,1e-1)", "b=uniform(2,3)", "c=choice(x,[1,2])"]
    found = space(words).trials("r", 400, 7)
    assert found == space(words).trials("r", 400, 7) != space(words).trials("r", 400, 8)
    small = [float(trial.values["a"]) for trial in found]
    assert all(1e-5 <= value <= 1e-1 for value in small) and 3e-4 < statistics.median(small) < 3e-3
    assert all(2 <= float(trial.values["b"]) <= 3 for trial in found)
    assert {trial.values["c"] for trial in found} == {"x", "[1,2]"}


@pytest.mark.parametrize(
    ("words", "samples", "says"),
    [
        (["a=1"], None, "nothing is swept"),
        (["a=uniform(1,2)"], None, "--samples goes with ranges"),
        (["a=1,2"], 3, "--samples goes with ranges"),
        (["a=uniform(2,1)"], 3, "is empty"),
        (["a=loguniform(0,1)"], 3, "is empty"),
        (["a=uniform(x,1)"], 3, "has no two numbers"),
        (["a"], None, "is no key=value"),
    ],
)
def test_what_cannot_be_swept_is_said(words: list[str], samples: int | None, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        space(words).trials("r", samples, 0)


def test_the_median_rule_against_its_definition() -> None:
    """Best value so far against the median of the others' running means at the same step."""
    curves = {
        "a": [(10, 4.0), (20, 2.0)],
        "b": [(10, 4.0), (20, 3.0), (30, 0.1)],
        "c": [(10, 6.0), (20, 5.0)],
        "short": [(10, 0.1)],
        "good": [(10, 9.0), (20, 3.4)],
        "bad": [(10, 9.0), (20, 3.6)],
    }
    means = [statistics.fmean(value for step, value in curves[name] if step <= 20) for name in ("a", "b", "c")]
    assert statistics.median(means) == 3.5
    three = {name: curves[name] for name in ("a", "b", "c", "short")}
    rule = MedianRule(grace=20)
    assert not rule.ends("good", {**three, "good": curves["good"]})
    assert rule.ends("bad", {**three, "bad": curves["bad"]})
    assert not MedianRule(grace=21).ends("bad", {**three, "bad": curves["bad"]})
    assert not rule.ends("bad", {"a": curves["a"], "b": curves["b"], "bad": curves["bad"]}), "two others say little"
    turned = {
        name: [(step, -value) for step, value in points] for name, points in {**three, "bad": curves["bad"]}.items()
    }
    assert MedianRule(grace=20, maximize=True).ends("bad", turned)
    assert not MedianRule(grace=20, maximize=True).ends("bad", {**turned, "bad": [(10, -9.0), (20, -3.4)]})


def test_a_loss_that_is_no_number_is_the_worst() -> None:
    rows = [{"step": 2.0, "m": 1.0}, {"step": 1.0, "m": 5.0}, {"step": 2.0, "m": float("nan")}, {"step": 3.0, "x": 1.0}]
    assert curve(rows, "m") == [(1, 5.0), (2, float("inf"))]


class Cluster:
    """Jobs whose runs do a step whenever somebody looks; `losses` says with what loss."""

    def __init__(self, storage: Path, losses: Callable[[str], float], steps: int = 5) -> None:
        self.storage, self.losses, self.steps = storage, losses, steps
        self.jobs: dict[str, dict[str, Any]] = {}
        self.submitted: list[str] = []
        self.most = 0
        self.refuses: set[str] = set()
        self.fails: set[str] = set()

    def submit(self, recipe: str, overrides: Any = ()) -> str:
        name = next(word.removeprefix("name=") for word in overrides if word.startswith("name="))
        if name in self.refuses:
            raise LaunchError("no room")
        job = f"{name}-a{1 + sum(each['run'] == name for each in self.jobs.values())}"
        self.jobs[job] = {"id": job, "run": name, "status": "PENDING", "folder": "", "step": 0}
        self.submitted.append(name)
        return job

    def list(self, run: str | None = None) -> Any:
        alive = [job for job in self.jobs.values() if job["status"] in ("PENDING", "RUNNING")]
        self.most = max(self.most, len(alive))
        for job in alive:
            job["status"], job["step"] = "RUNNING", job["step"] + 1
            folder = self.storage / job["run"]
            folder.mkdir(exist_ok=True)
            with (folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"step": job["step"], "m": self.losses(job["run"])}) + "\n")
            if job["run"] in self.fails:
                job["status"] = "FAILED"
            elif job["step"] == self.steps:
                job["status"] = "SUCCEEDED"
                progress = {"stage": "s2t", "step": 1, "steps": 1, "state": "finished", "time": 1.0}
                (folder / "progress.json").write_text(json.dumps(progress))
        return list(self.jobs.values())

    def stop(self, job: str) -> str:
        self.jobs[job]["status"] = "STOPPED"
        return "STOPPED"

    def failure(self, job: str) -> str:
        return "out of memory"


def sweep(cluster: Cluster, count: int, rule: MedianRule | None = None, parallel: int = 2) -> Sweep:
    trials = space([f"a={','.join(map(str, range(count)))}"]).trials("r", None, 0)
    return Sweep(
        recipe="x",
        trials=trials,
        queue=cluster,
        storage=cluster.storage,
        record=cluster.storage / "r-sweep.json",
        metric="m",
        rule=rule,
        parallel=parallel,
        say=lambda line: None,
    )


def value_of(names: dict[str, str]) -> Callable[[str], float]:
    return lambda name: float(names[name])


@pytest.fixture
def names() -> dict[str, str]:
    """The value of `a` of each run."""
    return {trial.name: trial.values["a"] for trial in space(["a=0,1,2,3,4,5"]).trials("r", None, 0)}


def test_all_trials_are_trained_a_few_at_a_time(tmp_path: Path, names: dict[str, str]) -> None:
    cluster = Cluster(tmp_path, value_of(names))
    outcomes = sweep(cluster, 6).run(poll_s=0)
    assert [outcome.state for outcome in outcomes] == [runner.DONE] * 6
    assert len(cluster.submitted) == 6 and cluster.most == 2
    best = ranked(outcomes, MedianRule(1))
    assert [outcome.trial.values["a"] for outcome in best] == list("012345")
    lines = table(best, "m", MedianRule(1)).splitlines()
    assert lines[0] == "| run | a | state | steps | m, best | last |" and lines[2].endswith("| 0 | done | 5 | 0 | 0 |")
    assert problem(outcomes) is None


def test_what_falls_behind_is_ended_and_not_begun_again(tmp_path: Path, names: dict[str, str]) -> None:
    cluster = Cluster(tmp_path, value_of(names))
    outcomes = sweep(cluster, 6, MedianRule(grace=2)).run(poll_s=0)
    ended = {outcome.trial.values["a"] for outcome in outcomes if outcome.state == runner.ENDED}
    assert ended == {"2", "3", "4", "5"}, "the first two had no three others"
    steps = {outcome.trial.values["a"]: outcome.curve[-1][0] for outcome in outcomes}
    assert steps == {"0": 5, "1": 5, "2": 2, "3": 2, "4": 2, "5": 2}
    again = Cluster(tmp_path, value_of(names))
    assert [each.state for each in sweep(again, 6, MedianRule(grace=2)).run(poll_s=0)] == [o.state for o in outcomes]
    assert again.submitted == []


def test_a_sweep_that_was_left_finds_its_jobs(tmp_path: Path, names: dict[str, str]) -> None:
    cluster = Cluster(tmp_path, value_of(names), steps=4)
    first = sweep(cluster, 4)
    first._look()
    first._submit()
    assert len(cluster.submitted) == 2
    outcomes = sweep(cluster, 4).run(poll_s=0)
    assert [outcome.state for outcome in outcomes] == [runner.DONE] * 4
    assert sorted(cluster.submitted) == sorted(list(names)[:4]), "each once"


def test_failed_trials_are_named_and_tried_again_by_the_next_call(tmp_path: Path, names: dict[str, str]) -> None:
    cluster = Cluster(tmp_path, value_of(names))
    first, second, *_ = names
    cluster.fails, cluster.refuses = {first}, {second}
    outcomes = sweep(cluster, 4).run(poll_s=0)
    assert [outcome.state for outcome in outcomes] == [runner.FAILED, runner.FAILED, runner.DONE, runner.DONE]
    error = problem(outcomes)
    assert error is not None and error.what == f"2 of 4 trials failed; the first, {first}: out of memory"
    cluster.fails, cluster.refuses = set(), set()
    assert [outcome.state for outcome in sweep(cluster, 4).run(poll_s=0)] == [runner.DONE] * 4
    assert cluster.submitted.count(first) == 2 and cluster.submitted.count(second) == 1
