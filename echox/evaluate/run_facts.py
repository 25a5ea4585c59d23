"""Gathers what the folders of a model's stages say of their training: recipe, steps, sizes, audio that was read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, TypeGuard

from echox.config.paths import resolve_data
from echox.engine.checkpoint.manifest import newest_manifest, read_manifest
from echox.errors import EchoXError
from echox.files import names_inside, read_record
from echox.run_records import metric_rows
from echox.stream.format.catalogue import DATASET_NAME

_SEEN = re.compile(r"data/(.+)/seconds")


@dataclass(frozen=True)
class StageFacts:
    """What a run's folder says of the training of one stage.

    Attributes:
        recipe: as it was resolved; empty where there is none.
        step: optimizer steps of the newest checkpoint; None without one.
        trained: parameters in it.
        precision: of the training.
        seconds: of audio that were read of each training set, by the name in the metrics.
    """

    recipe: Mapping[str, Any]
    step: int | None
    trained: int | None
    precision: str
    seconds: Mapping[str, float] = field(default_factory=dict)


def stage_facts(run: Path) -> StageFacts:
    """The facts of a run, whose folder may be someone else's: what cannot be used is left out."""
    manifest: Mapping[str, Any] = {}
    path = newest_manifest(run)
    if path is not None:
        try:
            manifest = read_manifest(path.parent)
        except (EchoXError, OSError):
            manifest = {}
    entries = [entry for entry in _mapping(manifest, "trainable").values() if isinstance(entry, Mapping)]
    shapes = [shape for entry in entries if _is_shape(shape := entry.get("shape"))]
    seconds = {
        match[1]: value for row in metric_rows(run) for name, value in row.items() if (match := _SEEN.fullmatch(name))
    }
    return StageFacts(
        recipe=read_record(run, "recipe.json"),
        step=manifest.get("step") if isinstance(manifest.get("step"), int) else None,
        trained=sum(prod(shape) for shape in shapes) or None,
        precision=str(manifest.get("precision", "")),
        seconds=seconds,
    )


def dataset_facts(path: str) -> tuple[str, str, str]:
    """Samples, hours and fingerprint of a training set; dashes where it is not on this machine.

    Sets are found by name only: a foreign recipe must not choose which folder of this machine is read.
    """
    try:
        found = read_record(resolve_data(path), DATASET_NAME) if names_inside(path) else {}
    except EchoXError:
        found = {}
    samples, hours, fingerprint = (found.get(name) for name in ("samples", "hours", "fingerprint"))
    return (
        f"{samples:,}" if isinstance(samples, int) else "–",
        f"{hours:.2f}" if isinstance(hours, float) else "–",
        fingerprint[:12] if isinstance(fingerprint, str) else "–",
    )


def base_models(facts: Mapping[str, StageFacts]) -> list[str]:
    """The pretrained models that the stages build on."""
    paths = [at(fact.recipe, "model", part, "path") for fact in facts.values() for part in ("llm", "speech_encoder")]
    return list(dict.fromkeys(path for path in paths if isinstance(path, str) and path))


def at(tree: Any, *keys: str, default: Any = None) -> Any:
    """A value in nested mappings; the default where one of them is none."""
    for key in keys:
        if not isinstance(tree, Mapping) or key not in tree:
            return default
        tree = tree[key]
    return tree


def _mapping(tree: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = tree.get(key)
    return found if isinstance(found, Mapping) else {}


def _is_shape(shape: object) -> TypeGuard[list[int]]:
    return (
        isinstance(shape, list) and len(shape) < 9 and all(type(size) is int and 0 <= size < 1 << 40 for size in shape)
    )
