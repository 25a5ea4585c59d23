"""Makes the SQLite file that runs are tracked in by default: aside, under a lock, and under its name only when whole.

MLflow builds a new database in its place, by some fifty migrations, from whichever processes meet it first. Two of them
at once leave a file that neither can use, and so does one that is killed meanwhile.
"""

from __future__ import annotations

import contextlib
import sqlite3
import uuid
from pathlib import Path

from echox.files import exclusive, fsync

SQLITE = "sqlite:///"
_BUSY_S = 5.0
_whole: set[tuple[str, int]] = set()
"""Files found whole by this process: path and inode."""


def ensure_database(uri: str) -> None:
    """Build the database of a `sqlite:///` URI unless there is one; of another URI nothing is known here.

    A half-built one, as an earlier version may have left it, holds no run and is replaced. What is no database, or one
    of another MLflow, is left for MLflow to complain about.

    Raises:
        OSError: the folder cannot be written.
    """
    file = uri.removeprefix(SQLITE).partition("?")[0]
    if not uri.startswith(SQLITE) or file in ("", ":memory:"):
        return
    path = Path(file)
    if _known(path):
        return
    if not _built(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(path.with_name(f".{path.name}.lock")):
            if not _built(path):
                _build(path)
    _whole.add((str(path), path.stat().st_ino))


def _known(path: Path) -> bool:
    try:
        return (str(path), path.stat().st_ino) in _whole
    except FileNotFoundError:
        return False


def _built(path: Path) -> bool:
    """Whether a database was built to its end: what is done last is to make the first experiment."""
    if not path.is_file():
        return False
    try:
        with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", _BUSY_S, uri=True)) as database:
            tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            if "experiments" not in tables:
                return bool(tables)  # of another program
            return database.execute("SELECT 1 FROM experiments LIMIT 1").fetchone() is not None
    except sqlite3.Error:
        return True  # busy, or no database at all


def _build(path: Path) -> None:
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    started = f".{path.name}.build-"
    for left in path.parent.glob(f"{started}*"):  # by one that was killed; the lock says that nobody is at work
        left.unlink(missing_ok=True)
    aside = path.with_name(started + uuid.uuid4().hex)
    store = SqlAlchemyStore(f"{SQLITE}{aside.absolute()}", (path.parent.absolute() / "mlflow-artifacts").as_uri())
    store.engine.dispose()
    fsync(aside)
    # SQLite would take the journal of the file that is replaced for one of the new file.
    path.with_name(f"{path.name}-journal").unlink(missing_ok=True)
    aside.replace(path)
    fsync(path.parent)
