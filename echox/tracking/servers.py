"""Decides which tracking servers a run folder may send its readers to: the folder may be someone else's.

A URI in `mlflow.json` is followed where that can neither make nor change a file outside, nor show a password to a
server that its owner did not name.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from echox.files import is_within
from echox.tracking.database import SQLITE
from echox.tracking.lifecycle import make_client

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

_LOGINS = {
    "http": ("MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_AWS_SIGV4", "MLFLOW_TRACKING_AUTH"),
    "postgresql": ("PGPASSWORD",),
    "mysql": ("MYSQL_PWD",),
}
_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
_SAME = {"https": "http"}


def refusal(uri: str, run_folder: Path, environment: Mapping[str, str] = os.environ) -> str:
    """Why the tracking URI that a run folder names is not followed; empty where it is.

    Args:
        uri: of its `mlflow.json`.
        run_folder: the folder.
        environment: whose $MLFLOW_TRACKING_URI is always followed.
    """
    if uri == environment.get("MLFLOW_TRACKING_URI"):
        return ""
    if uri.startswith(SQLITE):
        file = Path(uri.removeprefix(SQLITE).partition("?")[0])
        if is_within(run_folder.resolve().parent, file) or _is_mlflow(file):
            return ""
        return "it is no MLflow database, and lies outside the folder of runs"
    try:
        scheme = urlsplit(uri).scheme.partition("+")[0]
    except ValueError:
        return "it is no URI"
    scheme = _SAME.get(scheme, scheme)
    if scheme not in _LOGINS:
        return "it is of no kind that a run folder may name"
    held = [name for name in _LOGINS[scheme] if environment.get(name)]
    if held or (scheme == "http" and Path("~/.mlflow/credentials").expanduser().is_file()):
        return f"only the run's folder names it, and it would be shown {held[0] if held else 'your MLflow credentials'}"
    return ""


def listing_client(uri: str, timeout_s: int) -> MlflowClient:
    """A client for a look at a server; a database that is away is told at once, where MLflow would try for minutes.

    Raises:
        OSError: no database listens there.
    """
    parts = urlsplit(uri)
    port = _PORTS.get(parts.scheme.partition("+")[0])
    if port is not None and parts.hostname:
        socket.create_connection((parts.hostname, parts.port or port), timeout=timeout_s).close()
    return make_client(uri, timeout_s)


def _is_mlflow(file: Path) -> bool:
    """Whether a file is a database of MLflow; it is only read."""
    if not file.is_file():
        return False
    wanted = "SELECT count(*) FROM sqlite_master WHERE type = 'table' AND name IN ('experiments', 'runs')"
    place = f"{file.absolute().as_uri()}?mode=ro"
    try:
        with contextlib.closing(sqlite3.connect(place, 1.0, uri=True)) as database:
            return bool(database.execute(wanted).fetchone()[0] == 2)
    except sqlite3.Error:
        return False
