"""Five thousand runs: a listing opens and asks for what it shows, however many there are. Counted, not timed."""

from __future__ import annotations

import builtins
import io
import json
import os
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from echox import cli
from echox.tracking.cli import LIMIT

RUNS = 5_000


@pytest.fixture(scope="module")
def crowd(tmp_path_factory: pytest.TempPathFactory, template: bytes) -> Path:
    """Run folders and their runs in one SQLite store, filled by SQL; `run-04999` is the newest."""
    storage = tmp_path_factory.mktemp("crowd")
    (storage / "mlflow.db").write_bytes(template)
    uri = f"sqlite:///{storage}/mlflow.db"
    experiment = MlflowClient(uri).create_experiment("crowd", artifact_location=f"file://{storage}/artifacts")
    runs, tags, metrics = [], [], []
    for number in range(RUNS):
        name, run_id, begun = f"run-{number:05d}", f"{number:032x}", 1_700_000_000_000 + 1000 * number
        folder = storage / name
        folder.mkdir()
        state = {"name": name, "uri": uri, "run_id": run_id, "status": "FINISHED", "closed": True, "tags": {}}
        (folder / "mlflow.json").write_text(json.dumps({**state, "started": begun / 1000}))
        (folder / "progress.json").write_text('{"step": 5, "steps": 5, "state": "finished"}')
        for file in folder.iterdir():
            os.utime(file, (begun / 1000, begun / 1000))
        more = (0, "", "active", f"file://{storage}/artifacts/{run_id}/artifacts", experiment)
        who = ("LOCAL", "", "", "me", "FINISHED", begun)
        runs.append((run_id, name, *who, begun + 500, *more))
        for key, value in (("stage", "s2t"), ("scale", "x"), ("run_folder", str(folder)), ("mlflow.runName", name)):
            tags.append((key, value, run_id))
        for attempt in range(2):
            child = f"{attempt + 1:01x}{number:031x}"
            runs.append((child, f"{name}-attempt", *who, begun, *more))
            tags += [("stage", "s2t", child), ("role", "attempt", child), ("attempt", str(attempt + 1), child)]
        metrics.append(("loss/total", 1.5, begun, 5, run_id))
    columns = "run_uuid,name,source_type,source_name,entry_point_name,user_id,status,start_time,end_time,deleted_time,"
    columns += "source_version,lifecycle_stage,artifact_uri,experiment_id"
    with closing(sqlite3.connect(storage / "mlflow.db")) as database, database:
        database.executemany(f"INSERT INTO runs ({columns}) VALUES ({','.join('?' * 14)})", runs)
        database.executemany("INSERT INTO tags (key, value, run_uuid) VALUES (?, ?, ?)", tags)
        database.executemany(
            "INSERT INTO latest_metrics (key, value, timestamp, is_nan, step, run_uuid) VALUES (?, ?, ?, 0, ?, ?)",
            metrics,
        )
    return storage


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch, storage: Path) -> Iterator[Counter[str]]:
    """Files of run folders that are opened, requests to the store, and runs that it answers with."""
    seen: Counter[str] = Counter()

    def watch(opener: Callable[..., Any]) -> Callable[..., Any]:
        def opened(path: Any, *args: Any, **options: Any) -> Any:
            if isinstance(path, str | os.PathLike) and f"{storage}/run-" in os.fspath(path):
                seen["opened"] += 1
            return opener(path, *args, **options)

        return opened

    def ask(name: str) -> Callable[..., Any]:
        asked = getattr(MlflowClient, name)

        def request(*args: Any, **options: Any) -> Any:
            answer = asked(*args, **options)
            seen["requests"] += 1
            seen["runs"] += len(answer) if name == "search_runs" else 1
            return answer

        return request

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", watch(os.open))
        patch.setattr(io, "open", watch(io.open))
        patch.setattr(builtins, "open", watch(builtins.open))
        for name in ("search_runs", "get_run", "search_experiments", "get_metric_history"):
            patch.setattr(MlflowClient, name, ask(name))
        yield seen


def listed(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[list[dict[str, Any]], str]:
    capsys.readouterr()
    assert cli.main(["runs", "list", *words, "--json"]) == 0
    said = capsys.readouterr()
    return json.loads(said.out), said.err


NEWEST = [f"run-{number:05d}" for number in range(RUNS - LIMIT, RUNS)]


def test_a_listing_of_folders_opens_those_it_shows(
    crowd: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with counted(monkeypatch, crowd) as seen:
        rows, said = listed(capsys, "--storage", str(crowd))
    assert [row["name"] for row in rows] == NEWEST and rows[-1]["loss"] == 1.5
    assert said == f"{RUNS - LIMIT:,} older runs are left out; --limit 0 shows all\n"
    # The record twice, to see whether its process is gone and to show it; its progress; its attempts.
    assert seen["opened"] <= 4 * LIMIT
    assert seen["requests"] == 2 and seen["runs"] <= LIMIT + 2
    rows, said = listed(capsys, "--storage", str(crowd), "--limit", "3")
    assert [row["name"] for row in rows] == NEWEST[-3:] and "4,997 older" in said


def test_a_listing_of_a_server_reads_one_page(
    crowd: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with counted(monkeypatch, crowd) as seen:
        rows, said = listed(capsys, "--uri", f"sqlite:///{crowd}/mlflow.db")
    assert [row["name"] for row in rows] == NEWEST
    assert said == "older runs are left out; --limit 0 shows all\n"
    assert seen["requests"] == 2 and seen["runs"] <= 4 * LIMIT + 3
    assert seen["opened"] <= 5 * LIMIT


def test_more_runs_take_no_request_each(
    crowd: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with counted(monkeypatch, crowd) as seen:
        rows, said = listed(capsys, "--storage", str(crowd), "--limit", "600")
    assert len(rows) == 600 and "4,400 older" in said and all(row["loss"] == 1.5 for row in rows)
    assert seen["requests"] == 1 + 600 // 200


def test_a_comparison_reads_the_runs_it_compares(
    crowd: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    page = str(tmp_path / "page.html")
    for where in (["--storage", str(crowd)], ["--uri", f"sqlite:///{crowd}/mlflow.db"]):
        with counted(monkeypatch, crowd) as seen:
            assert cli.main(["runs", "compare", "run-00007", f"{4321:032x}", *where, "--out", page, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["runs"] == ["run-00007", "run-04321"]
        assert seen["opened"] <= LIMIT + 10 and seen["requests"] <= 20 and seen["runs"] <= 30
    assert cli.main(["runs", "compare", "run-00007", "run-0432x", "--storage", str(crowd)]) == 2
    assert "did you mean" in capsys.readouterr().err
