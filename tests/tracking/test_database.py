"""The default database: whole or absent, however many processes meet it first, and whoever is killed meanwhile."""

from __future__ import annotations

import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from echox.tracking import database
from echox.tracking.database import SQLITE, ensure_database

pytestmark = pytest.mark.timeout(600)

START = """
import sys
from echox.tracking.lifecycle import make_client
client = make_client(sys.argv[1])
experiment = client.get_experiment_by_name("Default").experiment_id
print(client.create_run(experiment, run_name=sys.argv[2]).info.run_id)
"""


def start(uri: str, name: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", START, uri, name], stdout=subprocess.PIPE, text=True)


def ended(process: subprocess.Popen[str]) -> str:
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    return said.strip()


def runs(path: Path) -> list[str]:
    with sqlite3.connect(path) as opened:
        return sorted(row[0] for row in opened.execute("SELECT name FROM runs"))


def beside(path: Path) -> list[str]:
    return sorted(each.name for each in path.parent.iterdir() if "build" in each.name or "journal" in each.name)


def test_many_that_start_at_once_are_all_tracked(tmp_path: Path) -> None:
    path = tmp_path / "new" / "mlflow.db"
    names = [f"run-{number}" for number in range(4)]
    started = [start(f"{SQLITE}{path}", name) for name in names]
    assert len({ended(each) for each in started}) == 4
    assert runs(path) == names and beside(path) == []


def test_a_start_that_is_killed_at_any_moment_costs_the_next_nothing(tmp_path: Path) -> None:
    path, rng = tmp_path / "mlflow.db", random.Random(3)
    cut_short = 0
    for _ in range(5):
        process = start(f"{SQLITE}{path}", "killed")
        while process.poll() is None and not beside(path) and not path.exists():
            time.sleep(0.01)
        if path.exists():
            break
        time.sleep(rng.uniform(0, 0.4))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        cut_short += not path.exists()
    else:
        ended(start(f"{SQLITE}{path}", "whole"))
    assert cut_short, "no start was killed while it built"
    ended(start(f"{SQLITE}{path}", "last"))
    assert runs(path)[-1:] != ["killed"] and "last" in runs(path)
    assert beside(path) == []


def half_built(path: Path, template: bytes) -> None:
    """What MLflow leaves when it is killed in its migrations: tables, and no experiment; and a journal."""
    path.write_bytes(template)
    with sqlite3.connect(path) as opened:
        opened.execute("DELETE FROM experiments")
        opened.execute("UPDATE alembic_version SET version_num = '451aebb31d03'")
        opened.execute("DROP TABLE latest_metrics")
    path.with_name(f"{path.name}-journal").write_bytes(b"\\xd9\\xd5\\x05\\xf9\\x20\\xa1\\x63\\xd7" + bytes(600))


def test_a_half_built_database_is_replaced(tmp_path: Path, template: bytes) -> None:
    path = tmp_path / "mlflow.db"
    half_built(path, template)
    ensure_database(f"{SQLITE}{path}")
    with sqlite3.connect(path) as opened:
        assert opened.execute("SELECT name FROM experiments").fetchall() == [("Default",)]
        assert opened.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        opened.execute("SELECT * FROM latest_metrics")
    assert beside(path) == []


def test_a_database_that_holds_something_is_never_replaced(tmp_path: Path, template: bytes) -> None:
    older = tmp_path / "older.db"
    older.write_bytes(template)
    with sqlite3.connect(older) as opened:
        opened.execute("UPDATE alembic_version SET version_num = '451aebb31d03'")
    other, nothing = tmp_path / "other.db", tmp_path / "nothing.db"
    with sqlite3.connect(other) as opened:
        opened.execute("CREATE TABLE mine (x)")
    nothing.write_bytes(b"no database at all, but somebody's file" * 99)
    before = {path: path.read_bytes() for path in (older, other, nothing)}
    for path in before:
        ensure_database(f"{SQLITE}{path}")
    assert {path: path.read_bytes() for path in before} == before


def test_only_a_file_of_sqlite_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(database, "_build", lambda path: pytest.fail(f"{path} is built"))
    for uri in ("http://127.0.0.1:5000", "postgresql://host/db", "sqlite://", "sqlite:///:memory:"):
        ensure_database(uri)
    assert list(tmp_path.iterdir()) == []
