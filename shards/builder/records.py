"""Records in small JSON files beside the shards what a step was made from, so that it can be skipped."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from echox import files
from echox.files import write_atomically

"""Place of the corpus below the cache."""
PER_SHARD = 128
"""Samples a shard: eight or more shards for two workers to share."""
INPUTS_NAME = "inputs.json"
"""Digest of what a set was built from."""


def digest(value: Any) -> str:
    """SHA-256 of a JSON value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file that is either the old or the new one, never half of it."""
    write_atomically(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """The value of a JSON file; None when it is absent or unreadable, so that its step is done again."""
    try:
        return files.read_json(path)
    except (OSError, ValueError):
        return None
