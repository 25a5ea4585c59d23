from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from echox import cli
from echox.tracking.run import attach, open_run, record
from tests.tracking.parts import on_sqlite, recipe


@pytest.fixture
def two_runs(storage: Path) -> dict[str, str]:
    """A run of two attempts that did steps 3 and 4 twice, and a shorter one; names to MLflow ids."""
    made = {}
    for name, attempts in (("tiny-s2t", [range(1, 5), range(3, 7)]), ("big-s2t", [range(1, 4)])):
        tracker = open_run(recipe(name), {"optim": {"steps": 6, "lr": len(name)}, "seed": 1}, storage=storage)
        for number, steps in enumerate(attempts, 1):
            worker = attach(tracker.handle, "rank0")
            worker.begin_attempt(number, steps.start - 1, {})
            for step in steps:
                values = {"loss/total": 10.0 * number + step, "loss/s2t": 1.0 * step, "perf/step_ms": 1000.0}
                worker.log_metrics({**values, "perf/tokens_per_s_per_gpu": 10.0}, step)
            worker.finish()
        (tracker.handle.run_folder / "attempt").write_text(f"{len(attempts)}\n")
        tracker.finish("FINISHED")
        made[name] = tracker.handle.run_id or ""
    record(storage / "tiny-s2t", metrics={"eval/quiz/s2t_acc": 0.75, "eval/quiz/n": 4}, artifacts={}, step=6)
    return made


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    capsys.readouterr()
    assert cli.main(["runs", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_runs_are_listed_from_folders_from_a_server_and_without_one(
    storage: Path, two_runs: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = {row["name"]: row for row in shown(capsys, "list", "--storage", str(storage))}
    assert set(rows) == set(two_runs)
    tiny = rows["tiny-s2t"]
    wanted = {"scale": "tiny", "stage": "s2t", "status": "FINISHED", "attempts": 2, "step": 6, "steps": 6}
    assert wanted.items() <= tiny.items()
    assert tiny["loss"] == 26.0 and tiny["eval"] == {"quiz/s2t_acc": 0.75, "quiz/n": 4.0}
    assert tiny["run_id"] == two_runs["tiny-s2t"] and 0 < tiny["duration_s"] < 600
    again = {row["name"]: row for row in shown(capsys, "list", "--uri", f"sqlite:///{storage}/mlflow.db")}
    assert again == rows
    assert cli.main(["runs", "list", "--storage", str(storage)]) == 0
    assert "quiz S2T 75.0" in capsys.readouterr().out

    state = storage / "tiny-s2t" / "mlflow.json"
    state.write_text(state.read_text().replace("sqlite:///", "http://127.0.0.1:9/"))
    (storage / "tiny-s2t" / "progress.json").write_text('{"step": 5, "steps": 6, "loss": 1.25}')
    capsys.readouterr()
    assert cli.main(["runs", "list", "--storage", str(storage), "--json"]) == 0
    said = capsys.readouterr()
    away = {row["name"]: row for row in json.loads(said.out)}["tiny-s2t"]
    assert {"status": "FINISHED", "step": 5, "loss": 1.25, "attempts": 2}.items() <= away.items()
    assert "does not answer" in said.err


def test_the_list_ends_a_run_whose_process_is_gone(
    storage: Path, two_runs: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    state = storage / "big-s2t" / "mlflow.json"
    known = json.loads(state.read_text())
    known |= {"closed": False, "status": "RUNNING", "ended": None, "owner": {**known["owner"], "start": 1}}
    state.write_text(json.dumps(known))
    on_sqlite(storage).update_run(two_runs["big-s2t"], status="RUNNING")
    for file in (storage / "big-s2t").iterdir():
        os.utime(file, (1, 1))
    rows = {row["name"]: row["status"] for row in shown(capsys, "list", "--storage", str(storage))}
    assert rows == {"tiny-s2t": "FINISHED", "big-s2t": "FAILED"}


def test_runs_are_compared_by_name_folder_or_id_on_one_page(
    storage: Path, two_runs: dict[str, str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    page = tmp_path / "out" / "page.html"
    where = ("--storage", str(storage), "--out", str(page))
    found = shown(capsys, "compare", "tiny-s2t", two_runs["big-s2t"], *where)
    assert found["runs"] == ["tiny-s2t", "big-s2t"]
    assert found["differences"] == {"optim": {"optim.lr": ["8", "7"]}}
    # Steps 3 and 4 of the first attempt were lost with it, so the best is that of step 1.
    assert found["metrics"]["loss/total"]["best"] == [11.0, 11.0]
    assert found["metrics"]["loss/total"]["final"] == [(12 + 23 + 24 + 25 + 26) / 5, (11 + 12 + 13) / 3]
    assert found["metrics"]["optimizer steps"]["in all"] == [6.0, 3.0]
    assert found["metrics"]["million tokens"]["in all"] == pytest.approx([6e-5, 3e-5])
    text = page.read_text()
    assert "http" not in text.replace("http-equiv", "") and text.count("data:image/png;base64,") == 3
    assert "optim.lr" in text and "seed" not in text
    assert shown(capsys, "compare", str(storage / "tiny-s2t"), "big-s2t", *where)["metrics"] == found["metrics"]


def test_a_wrong_name_is_answered_with_the_one_that_was_meant(
    storage: Path, two_runs: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    where = ("--storage", str(storage))
    assert cli.main(["runs", "compare", "tiny-s2t", "big-s2", *where]) == 2
    said = capsys.readouterr().err
    assert "there is no run big-s2 in" in said and 'did you mean "big-s2t"?' in said and said.count("\n") == 1
    assert cli.main(["runs", "compare", "tiny-s2t", "tiny-s2t", *where]) == 2
    assert "takes two different runs" in capsys.readouterr().err
    assert cli.main(["runs", "list", "--storage", str(storage / "nowhere")]) == 2
    assert "is no folder" in capsys.readouterr().err
