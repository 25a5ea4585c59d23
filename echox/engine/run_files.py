"""Keeps the files that weights mean nothing without in the run's folder, and compares them by hash on a resume."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

from echox.errors import CheckpointError
from echox.files import write_atomically


@dataclass(frozen=True, kw_only=True)
class RunFile:
    """A text file that the weights of a run were trained with, such as a vocabulary.

    Attributes:
        path: where it lies.
        sha256: of what the weights depend on in it; two files of one hash may stand for each other.
        about: what it is, as JSON; goes into the manifest.
    """

    path: Path
    sha256: str
    about: Mapping[str, Any] = field(default_factory=dict)


class RunFileEntry(TypedDict):
    """What a manifest says of a file in the run's folder: hash, and what it is."""

    sha256: str
    about: Mapping[str, Any]


def describe(files: Mapping[str, RunFile]) -> dict[str, RunFileEntry]:
    """The manifest's entries of files by the name they have in the run's folder."""
    return {name: {"sha256": file.sha256, "about": dict(file.about)} for name, file in sorted(files.items())}


def compare(saved: Mapping[str, RunFileEntry], files: Mapping[str, RunFile], run_folder: Path) -> None:
    """Raise CheckpointError for a file that is not the one a checkpoint was trained with; older ones recorded none."""
    for name, entry in saved.items():
        file = files.get(name)
        if file is not None and file.sha256 != entry["sha256"]:
            raise CheckpointError(
                f"{name} is not the one the checkpoint was trained with: sha256 {file.sha256[:12]} now, "
                f"{entry['sha256'][:12]} then",
                where=str(file.path),
                fix=f"name the copy {run_folder / name} in the recipe, or start a new run under another name",
            )


def store(files: Mapping[str, RunFile], run_folder: Path) -> None:
    """Copy files into the run's folder, each at once or not at all; one that is there already keeps its date."""
    for name, file in files.items():
        text, copy = file.path.read_text(encoding="utf-8"), run_folder / name
        if not copy.is_file() or copy.read_text(encoding="utf-8") != text:
            write_atomically(copy, text)
