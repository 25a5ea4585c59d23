"""`echox ablate` with stand-ins for training and judging, and a real MLflow on SQLite."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from echox import cli
from echox.config.load import load_recipe
from echox.tracking.run import open_run
from launch.ablation import runs, scoring
from launch.ablation.tracked import log

NAME = "sqa-heldout-phrasing"
RIGHT = {"echo": (8, 9), "reference": (4, 5)}
"""Items right of ten, by arm, in the first and the second seed."""


def fake_run_echox(words: Sequence[str], processes: int) -> None:
    """A training that leaves an MLflow run, and a checkpoint."""
    from tests.launch.ablation.test_runs import save

    command, name, *overrides = words
    if command != "train":
        return
    recipe = load_recipe(name, overrides)
    if recipe.stage == "echo":
        tracker = open_run(recipe, {"seed": recipe.seed}, storage=Path(recipe.storage))
        tracker.finish("FINISHED")
    save(name, overrides, age_s=60)


class FakeExaminer:
    judged: list[str] = []

    def __init__(self, scale: str, limit: int | None, progress: Any) -> None:
        self.limit = limit

    def scores(self, run: Path) -> Any:
        self.judged.append(run.name)
        arm, _, seed = run.name.rpartition("-s")
        right = RIGHT[arm][int(seed) - 17]
        items = [
            {
                **{"id": f"q{number}", "text": "a b", "heard": "a b", "cascade_heard": "a b"},
                **{
                    "text_right_strict": True,
                    "speech_right_strict": number < right,
                    "cascade_right_strict": number < 9,
                },
            }
            for number in range(10)
        ]
        return {NAME: {"n": 10, "s2s_strict_acc": right / 10, "copy_acc": None, "role": "test", "items": items}}


@pytest.fixture
def stand_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ECHOX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(runs, "run_echox", fake_run_echox)
    monkeypatch.setattr(scoring, "Examiner", FakeExaminer)
    monkeypatch.setattr(FakeExaminer, "judged", [])


@pytest.mark.usefixtures("stand_ins")
def test_arms_are_trained_scored_compared_logged_and_printed(
    storage: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["ablate", "demo", "--arms", "reference,cascade", "--seeds", "2", "--storage", str(storage)]
    assert cli.main(words) == 0
    printed, said = capsys.readouterr()
    assert FakeExaminer.judged == ["echo-s17", "reference-s17", "echo-s18", "reference-s18"], "seed by seed"
    assert "warning" not in said

    folder = storage / "ablation"
    assert (folder / "ablation.md").read_text() == printed
    result = json.loads((folder / "ablation.json").read_text())
    assert (result["scale"], result["limit"]) == ("demo", None)
    assert [arm["name"] for arm in result["arms"]] == ["echo", "cascade", "reference"]
    rows = {row["arm"]: row for row in result["rows"]}
    assert (rows["echo"]["s2s_strict_acc"], rows["echo"]["over_seeds"]) == (0.85, [0.8, 0.9])
    assert rows["reference"]["difference"] == pytest.approx(-0.4) and rows["reference"]["here"] == "-"

    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    (experiment,) = [found for found in client.search_experiments() if found.name == "echox"]
    found = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    parent = found["ablation-demo"]
    assert found["reference-s18"].data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert found["reference-s18"].data.metrics == {f"eval/{NAME}/n": 10.0, f"eval/{NAME}/s2s_strict_acc": 0.5}
    numbers = parent.data.metrics
    assert numbers[f"{NAME}/echo/s2s_strict_acc"] == 0.85 and numbers[f"{NAME}/echo/over_seeds_high"] == 0.9
    assert numbers[f"{NAME}/reference/difference"] == pytest.approx(-0.4)
    assert numbers[f"{NAME}/reference/difference_95_high"] < 0 and f"{NAME}/echo/difference" not in numbers
    assert numbers[f"{NAME}/cascade/s2s_strict_acc"] == 0.9
    assert {file.path for file in client.list_artifacts(parent.info.run_id)} == {"ablation.md", "ablation.json"}
    assert {run.info.status for run in found.values()} == {"FINISHED"}

    monkeypatch.setitem(RIGHT, "reference", (7, 7))
    assert cli.main([*words, "--json"]) == 0
    printed, said = capsys.readouterr()
    again = {row["arm"]: row["s2s_strict_acc"] for row in json.loads(printed)["rows"]}
    assert again == {"echo": 0.85, "cascade": 0.9, "reference": 0.7}
    assert said.count("done, reused") == 4 * 3, "nothing is trained again"
    for run_id, name, value in (
        (parent.info.run_id, f"{NAME}/reference/s2s_strict_acc", 0.7),
        (found["reference-s18"].info.run_id, f"eval/{NAME}/s2s_strict_acc", 0.7),
    ):
        assert client.get_run(run_id).data.metrics[name] == value, "of scores made again, the last count"


def test_a_run_that_cannot_be_tracked_is_a_warning(tmp_path: Path) -> None:
    assert "has no MLflow run" in log(tmp_path, "run_id", {}, [])
    (tmp_path / "mlflow.json").write_text(json.dumps({"run_id": "a", "uri": "http://127.0.0.1:9"}))
    assert "could not be added to MLflow at http://127.0.0.1:9" in log(tmp_path, "run_id", {"n": 1.0}, [])


@pytest.mark.usefixtures("stand_ins")
def test_being_told_to_end_is_an_interrupt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(words: Sequence[str], processes: int) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("went on")

    monkeypatch.setattr(runs, "run_echox", killed)
    before = signal.getsignal(signal.SIGTERM)
    assert cli.main(["ablate", "demo", "--storage", str(tmp_path)]) == cli.INTERRUPTED
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("words", [["3b"], ["demo", "--seeds", "0"], ["demo", "--limit", "x"]])
def test_words_that_mean_nothing_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["ablate", *words])
    assert caught.value.code == 2 and "error: argument" in capsys.readouterr().err


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("mistake", ["t2c.optim.stepps=3", "echo.optim.warmup_steps=300", "s2t.seed=x"])
def test_a_mistake_in_any_recipe_is_found_before_anything_is_trained(
    mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runs, "run_echox", lambda words, processes: pytest.fail("trained"))
    assert cli.main(["ablate", "demo", mistake, "--storage", str(tmp_path)]) == 2
    key = mistake.partition(".")[2].partition("=")[0]
    assert key in capsys.readouterr().err
