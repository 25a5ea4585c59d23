"""Identifies a unit set, the alphabet that unit ids are numbers of, and refuses to mix two of them."""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from echox.errors import DataError, EchoXError
from echox.files import parse_json, read_text, write_atomically

RECORD = "unit_set.json"
"""Which units a folder holds or was made for: a k-means, a dataset, a vocoder."""


@dataclass(frozen=True, kw_only=True)
class UnitSetIdentity:
    """What decides which sound a unit id stands for.

    Published units may be known by name alone: `weights` and `centroids` are then empty and agree with any.

    Attributes:
        features: kind of the frames: whisper, hubert or log_mel.
        model: name of their model, without its folder; empty for log_mel.
        layer: block of the model, from 1; 0 for log_mel.
        clusters: number of units K.
        weights: SHA-256 of the model's weight files; empty where it is not known.
        centroids: SHA-256 of the centroids in their order, see `KMeans.sha256`; empty where it is not known.
    """

    features: str
    model: str = ""
    layer: int = 0
    clusters: int
    weights: str = ""
    centroids: str = ""

    @property
    def digest(self) -> str:
        """Eight hexadecimal digits over all fields, for people to compare."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:8]

    def __str__(self) -> str:
        parts = [f"{self.features} {self.model}".strip(), *([f"layer {self.layer}"] if self.layer else [])]
        named = "" if self.centroids else ", known by name"
        return f"{', '.join([*parts, f'{self.clusters} clusters'])} ({self.digest}{named})"

    def conflicts(self, other: UnitSetIdentity) -> tuple[str, ...]:
        """Fields by which the two are known to be different unit sets; none where they may be the same."""
        found = [name for name in ("features", "layer", "clusters") if getattr(self, name) != getattr(other, name)]
        if not self._may_share_model(other):
            found.append("model")
        if self.centroids and other.centroids and self.centroids != other.centroids:
            found.append("centroids")
        return tuple(found)

    def doubt(self, other: UnitSetIdentity) -> bool:
        """Whether their models have one name and different weight files: one model in two formats, or two models."""
        return self.model == other.model and self._other_weights(other)

    def _other_weights(self, other: UnitSetIdentity) -> bool:
        return bool(self.weights and other.weights) and self.weights != other.weights

    def _may_share_model(self, other: UnitSetIdentity) -> bool:
        if self.model == other.model or (self.weights and self.weights == other.weights):
            return True
        # Equal centroids of one model in two folders. Of another model they would be centroids of other frames.
        return bool(self.centroids) and self.centroids == other.centroids and not self._other_weights(other)

    @classmethod
    def parse(cls, content: Any, where: str) -> UnitSetIdentity:
        """The identity from its JSON value.

        Raises:
            DataError: it is none.
        """
        try:
            found = cls(**content)
            if any(type(value) is not type(getattr(_SHAPE, name)) for name, value in asdict(found).items()):
                raise TypeError("a field is of the wrong type")
        except TypeError as error:
            raise DataError(
                f"The record of a unit set cannot be read: {error}",
                where=where,
                fix="Make it again, or delete it: the units are then unknown, and not compared with others.",
            ) from error
        return found


_SHAPE = UnitSetIdentity(features="", clusters=0)


def read_unit_set(folder: str | Path) -> UnitSetIdentity | None:
    """Which unit set the units in a folder are of, or were used to make it; None where no record says so.

    Raises:
        DataError: the record is damaged.
    """
    path = Path(folder) / RECORD
    if not path.exists():
        return None
    try:
        text = read_text(path)
    except (OSError, ValueError) as error:
        fix = "Make it again, or delete it: the units are then unknown, and not compared with others."
        raise DataError(f"The record of a unit set cannot be read: {error}", where=str(path), fix=fix) from error
    return parse_record(text, str(path))


def parse_record(text: str, where: str) -> UnitSetIdentity:
    """The content of a record file.

    Raises:
        DataError: it is no JSON, or of no unit set.
    """
    try:
        content = parse_json(text)
    except ValueError as error:
        raise DataError(f"The record of a unit set is no JSON: {error}", where=where, fix="Make it again.") from error
    return UnitSetIdentity.parse(content, where)


def write_unit_set(folder: str | Path, unit_set: UnitSetIdentity | None) -> None:
    """Record the unit set of a folder; None removes a record that is no longer true. An equal one keeps its date."""
    path = Path(folder) / RECORD
    if unit_set is None:
        path.unlink(missing_ok=True)
        return
    text = json.dumps(asdict(unit_set), indent=1) + "\n"
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text)


@dataclass(frozen=True)
class UnitPart:
    """Something that holds units or was made for them.

    Attributes:
        place: what and where it is, for people.
        unit_set: which units; None where it is not known.
    """

    place: str
    unit_set: UnitSetIdentity | None


def warn(text: str) -> None:
    """One line on standard error."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


def check_same_unit_set(
    parts: Sequence[UnitPart],
    *,
    fix: str,
    error: type[EchoXError] = DataError,
    say: Callable[[str], None] = warn,
) -> UnitSetIdentity | None:
    """Make sure that no two parts are of different unit sets.

    Args:
        parts: what is used together.
        fix: what to do where they differ.
        error: class of the error.
        say: called with one line where a part's units are unknown, which is no error.

    Returns:
        The unit set of all, in the form that says most; None where none is known.

    Raises:
        DataError: two differ; or `error`.
    """
    known = [(part.place, part.unit_set) for part in parts if part.unit_set is not None]
    for (place, mine), (other, theirs) in itertools.combinations(known, 2):
        if fields := mine.conflicts(theirs):
            if fields == ("model",):
                fix += "; one model under two names: import its centroids again with --name"
            raise error(
                f"{place} has units of {mine}, and {other} of {theirs}: unit sets that differ in "
                f"{' and '.join(fields)} give one id to different sounds",
                fix=fix,
            )
        if mine.doubt(theirs):
            say(f"the model files of {place} ({mine}) and {other} ({theirs}) differ; they are taken for one model")
    unknown = [part.place for part in parts if part.unit_set is None]
    if unknown and len(parts) > 1:
        rest = f"with those of {known[0][0]}, {known[0][1]}" if known else "with each other"
        say(f"no {RECORD} or other record says which units {' and '.join(unknown)} has; not compared {rest}")
    found = [unit_set for _, unit_set in known]
    return max(found, key=lambda unit_set: (bool(unit_set.centroids), bool(unit_set.weights)), default=None)
