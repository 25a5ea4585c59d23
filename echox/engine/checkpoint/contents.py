"""Types the JSON of a checkpoint: its manifest, the cursor inside it, and the entries of both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NotRequired, TypedDict

from echox.engine.frozen import FrozenModel
from echox.engine.loss_guard import GuardState
from echox.engine.run_files import RunFileEntry


class FileEntry(TypedDict):
    """One file of a checkpoint: size in bytes, and SHA-256 in hex."""

    bytes: int
    sha256: str


class TensorEntry(TypedDict):
    """One trainable tensor before ZeRO-3 cut it: shape, and dtype as torch prints it."""

    shape: list[int]
    dtype: str


class Cursor(TypedDict):
    """Where training stands beside the weights.

    Attributes:
        step: optimizer steps done.
        stream: record of the train loader, which alone reads it.
        health: state of the loss guard.
    """

    step: int
    stream: Mapping[str, Any]
    health: GuardState


class RunContents(TypedDict):
    """What every checkpoint of a run carries.

    Attributes:
        run, stage: of the recipe.
        recipe: the whole of it, as plain values.
        frozen: name to identity of every frozen model; their weights are never stored.
        run_files: name to identity of every file in the run's folder that the weights depend on; older manifests have
            none.
        speakers: of a vocoder of several, their names in the order of their rows.
        imported: of a release that was imported, what its configuration had and its files told.
        dtypes: elements by kind and dtype.
        precision: "bf16" or "fp32", as resolved.
    """

    run: str
    stage: str
    recipe: dict[str, Any]
    frozen: dict[str, FrozenModel]
    run_files: NotRequired[dict[str, RunFileEntry]]
    speakers: NotRequired[list[str]]
    imported: NotRequired[dict[str, Any]]
    dtypes: dict[str, dict[str, int]]
    precision: str


class Contents(RunContents):
    """What a manifest says of one checkpoint, without its files.

    Attributes:
        step, updates: optimizer steps done, and those that changed weights.
        attempt, world_size: who wrote it.
        created: UTC time.
        cursor: where training stands.
        metrics: the last ones.
        trainable: name to shape and dtype of all that trains.
        versions: of Python and the libraries.
    """

    step: int
    updates: int
    attempt: int
    world_size: int
    created: str
    cursor: Cursor
    metrics: dict[str, float]
    trainable: dict[str, TensorEntry]
    versions: dict[str, str]


class Manifest(Contents):
    """The whole manifest, without the hash that seals it.

    Attributes:
        version: of the format.
        files: relative name to size and hash.
    """

    version: int
    files: dict[str, FileEntry]
