"""Datasets that are not in a local folder."""

from __future__ import annotations

from pathlib import Path

from echox.errors import DataError


def is_remote(location: str | Path) -> bool:
    """Whether a location is a URL rather than a folder."""
    return isinstance(location, str) and ("://" in location or location.startswith("pipe:"))


def fetch_catalogue(location: str) -> tuple[Path, str]:
    """Bring a remote catalogue into the cache: its path, and its digest by `dataset.json`."""
    raise DataError("only local folders can be read", where=location)
