"""Fits names, sizes and URIs to what MLflow accepts, by pure functions that are importable without MLflow."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlparse

from echox.config.locations import has_password, without_secrets
from echox.errors import RecipeError

EXPERIMENT = "echox"
"""The default of a recipe."""
KEY_LIMIT = 250
PARAM_LIMIT = 6000
TAG_LIMIT = 5000
METRICS_PER_BATCH = 1000
PARAMS_PER_BATCH = 100
T = TypeVar("T")
_FORBIDDEN = re.compile(r"[^\w.\- :/]")


def metric_name(name: str) -> str:
    """The name as MLflow takes it: forbidden characters become `_`, empty path parts vanish, at most 250 characters.

    MLflow also refuses names that look like an unnormalised path (`a//b`, `../x`, `/a`).
    """
    parts = [part for part in _FORBIDDEN.sub("_", name).split("/") if part not in ("", ".", "..")]
    return "/".join(parts)[:KEY_LIMIT] or "unnamed"


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """One dotted key a leaf, values as text: what MLflow's parameters are.

    Lists of plain values stay one parameter; lists of sections are numbered.
    """
    flat: dict[str, str] = {}
    for key, value in tree.items():
        name = metric_name(f"{prefix}{key}")
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{name}.")
        elif isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
            flat |= flatten({str(index): item for index, item in enumerate(value)}, f"{name}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, default=str)
            flat[name] = text[:PARAM_LIMIT]
    return flat


def batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Split `items` into slices of at most `size`."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def default_uri(storage: Path) -> str:
    """SQLite beside the runs: no server, and the store every MLflow since 3.7 reads by default."""
    return f"sqlite:///{(storage / 'mlflow.db').resolve()}"


def tracking_uri(named: str | None, storage: Path, environment: Mapping[str, str] = os.environ) -> str:
    """Where a run is tracked: what its recipe names, else $MLFLOW_TRACKING_URI, else `default_uri`.

    Raises:
        RecipeError: it is a plain folder, or the variable holds a password, which would be stored with the run.
    """
    given = environment.get("MLFLOW_TRACKING_URI", "")
    if not named and has_password(given):
        raise RecipeError(
            f"MLFLOW_TRACKING_URI={without_secrets(given)} holds a password",
            fix="leave it out and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or PGPASSWORD",
        )
    return check_uri(named or given or default_uri(storage))


def experiment_name(named: str, environment: Mapping[str, str] = os.environ) -> str:
    """The experiment of a run: what its recipe names, else $MLFLOW_EXPERIMENT_NAME, else `EXPERIMENT`."""
    return named if named != EXPERIMENT else environment.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT


def keeps_artifacts(uri: str) -> bool:
    """Whether artifacts go through the store's own server; a database keeps none, and needs a folder beside it."""
    return urlparse(uri).scheme in ("http", "https", "") or uri.startswith("databricks")


def check_uri(uri: str) -> str:
    """Return the URI, or refuse the file store in one sentence.

    Raises:
        RecipeError: the URI is a folder, which MLflow >= 3.17 no longer writes to.
    """
    scheme = urlparse(uri).scheme
    if uri in ("databricks", "databricks-uc", "uc"):  # names MLflow gives a meaning of its own
        return uri
    if scheme in ("", "file") or (len(scheme) == 1 and scheme.isalpha()):
        folder = urlparse(uri).path if scheme == "file" else uri
        raise RecipeError(
            f"tracking.uri={uri} is a folder, and MLflow no longer writes runs into plain folders",
            where="tracking.uri",
            fix=f"use sqlite:///{Path(folder).absolute() / 'mlflow.db'} or the http address of an MLflow server",
        )
    return uri
