"""Keeps what was measured in one JSON file, cell by cell, so that a run goes on where the last one ended."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any, Literal

from echox.errors import DataError

Status = Literal["done", "failed", "left out"]


class Results:
    """The file of one device.

    Args:
        path: it is read where it is there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tree: dict[str, Any] = {"about": {}, "cells": {}, "running": None}
        if path.exists():
            try:
                self._tree = json.loads(path.read_text(encoding="utf-8"))
                self._tree["cells"].items()
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise DataError(
                    "these are no results of `echox bench gpu`", where=str(path), fix="name another file"
                ) from error

    @property
    def about(self) -> dict[str, Any]:
        """The device and the versions."""
        found: dict[str, Any] = self._tree["about"]
        return found

    @property
    def cells(self) -> dict[str, dict[str, Any]]:
        """Name to status, seconds, values, and why."""
        found: dict[str, dict[str, Any]] = self._tree["cells"]
        return found

    @property
    def running(self) -> dict[str, Any] | None:
        """The cell that was begun and has not ended: its name, when, and the seconds after which it hangs."""
        found: dict[str, Any] | None = self._tree["running"]
        return found

    def finished(self, name: str) -> bool:
        """Whether a cell need not be run again: it was measured, or has failed."""
        return self.cells.get(name, {}).get("status") in ("done", "failed")

    def describe(self, about: dict[str, Any]) -> None:
        """Note the device; cells of another one are forgotten."""
        if self.about and self.about.get("device") != about.get("device"):
            self._tree["cells"] = {}
        self._tree["about"] = about
        self._write()

    def begin(self, name: str, limit: float) -> None:
        """Note that a cell runs, and after how many seconds it hangs."""
        self._tree["running"] = {"cell": name, "since": time.time(), "limit": limit}
        self._write()

    def end(self, name: str, status: Status, *, values: Any = None, why: str = "", seconds: float = 0.0) -> None:
        """Note how a cell ended."""
        self.cells[name] = {"status": status, "seconds": round(seconds, 2), "values": values, "why": why}
        self._tree["running"] = None
        self._write()

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        beside.write_text(json.dumps(self._tree, indent=1), encoding="utf-8")
        beside.replace(self.path)
