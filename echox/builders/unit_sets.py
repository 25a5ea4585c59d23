"""Checks that all parts of a recipe with units are of one unit set: datasets, unit language, T2C run.

Unit ids say nothing by themselves: two alphabets of 1,000 units train together without an error, and into noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path

from echox.config.paths import resolve_data, resolve_data_file
from echox.config.schema import Recipe
from echox.engine.checkpoint.checkpointer import find_weights
from echox.engine.checkpoint.manifest import checkpoints_folder, read_manifest
from echox.engine.checkpoint.recorded import LANGUAGE
from echox.engine.run_files import RunFile, RunFileEntry
from echox.errors import CheckpointError, DataError, TransientReadError
from echox.stream.sampling.source import Source
from echox.stream.storage.remote import is_remote, open_remote
from echox.stream.storage.retry import Retry
from echox.units.identity import (
    RECORD,
    UnitPart,
    UnitSetIdentity,
    check_same_unit_set,
    parse_record,
    read_unit_set,
    warn,
)
from echox.units.language import UnitLanguage

_UNIT_SET = "unit_set"

Say = Callable[[str], None]


def check_units(
    recipe: Recipe, sources: Iterable[Source], language: UnitLanguage | None, *, quiet: bool = False
) -> None:
    """Make sure that what a T2C or Echo recipe joins is of one unit set.

    Args:
        recipe: the recipe.
        sources: its datasets.
        language: its unit language, if it has one.
        quiet: pass over unknown units without a line, as all ranks but one do.

    Raises:
        DataError: datasets, or a dataset and the unit language, are of different unit sets.
        CheckpointError: the T2C run that an Echo recipe starts from has another unit language.
    """
    say: Say = (lambda text: None) if quiet else warn
    annotated = recipe.stage == "echo" and recipe.model.echo.labels == "annotated"
    if annotated:
        sources = [source for source in sources if source.task == "sqa"]
    if recipe.stage == "t2c" or annotated:
        parts = [UnitPart(f"dataset {source.path}", units_of_dataset(source)) for source in sources]
        if language is not None:
            parts.append(UnitPart(f"the unit language {_place(recipe)}", language.unit_set))
        check_same_unit_set(
            parts,
            fix="make all units with one k-means (`echox shards build --units`) and fit the unit language on them",
            say=say,
        )
    if recipe.stage == "echo" and recipe.init.t2c is not None and language is not None:
        check_language(language, str(_place(recipe)), find_weights(recipe.init.t2c).parent, say=say)


def check_language(language: UnitLanguage, place: str, checkpoint: Path, *, say: Say = warn) -> None:
    """Make sure that a unit language is the one that a checkpoint was trained with: word ids mean nothing in another.

    Args:
        language: what is to be used.
        place: where it lies.
        checkpoint: folder of a T2C or Echo checkpoint.
        say: called with one line where the checkpoint records none, which is no error.

    Raises:
        CheckpointError: it is another one.
    """
    entry = _entry(checkpoint)
    if entry is None:
        say(f"{checkpoint} does not record its unit language; not compared with {place}")
        return
    if entry["sha256"] == language.sha256:
        return
    about = entry["about"].get(_UNIT_SET)
    unit_set = "units that are not recorded" if about is None else UnitSetIdentity.parse(about, str(checkpoint))
    copy = _copy(checkpoint)
    right = f"set model.t2c.unit_language={copy}" if copy.is_file() else "name the file that it was trained with"
    raise CheckpointError(
        f"the unit language {place} ({language}) is not the one that {checkpoint} was trained with "
        f"({entry['sha256'][:8]}, of {unit_set})",
        fix=f"{right}, or train T2C again",
    )


def run_files(recipe: Recipe, language: UnitLanguage | None, **learned: float | None) -> dict[str, RunFile]:
    """The unit language of a stage that speaks, to be kept with its run, and what was `learned` of texts in it."""
    if recipe.stage == "s2t" or language is None:
        return {}
    known = {name: value for name, value in learned.items() if value is not None}
    about = {_UNIT_SET: None if language.unit_set is None else asdict(language.unit_set), **known}
    return {LANGUAGE: RunFile(path=_place(recipe), sha256=language.sha256, about=about)}


def with_own_language(recipe: Recipe, checkpoint: Path) -> Recipe:
    """The recipe of a checkpoint with the unit language that its run keeps, where it keeps one."""
    copy, t2c = _copy(checkpoint), recipe.model.t2c
    if t2c is None or _entry(checkpoint) is None or not copy.is_file():
        return recipe
    own = t2c.model_copy(update={"unit_language": str(copy.absolute())})
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"t2c": own})})


def _place(recipe: Recipe) -> Path:
    assert recipe.model.t2c is not None
    return resolve_data_file(recipe.model.t2c.unit_language)


def _copy(checkpoint: Path) -> Path:
    run = checkpoint.parent.parent
    # A checkpoint that was copied out of its run has no unit language beside it.
    return run / LANGUAGE if checkpoint.parent == checkpoints_folder(run) else checkpoint / LANGUAGE


def _entry(checkpoint: Path) -> RunFileEntry | None:
    files: Mapping[str, RunFileEntry] = read_manifest(checkpoint).get("run_files", {})
    return files.get(LANGUAGE)


def units_of_dataset(source: Source) -> UnitSetIdentity | None:
    """Which units a dataset holds, by the record beside its `dataset.json`, here or beside its remote shards."""
    if not is_remote(source.path):
        found = read_unit_set(resolve_data(source.path))
        if found is not None or not is_remote(source.catalogue.location):
            return found
    remote = open_remote(source.catalogue.location)
    where = remote.where(RECORD)
    try:
        text = Retry(attempts=3)(lambda: b"".join(remote.stream(RECORD)), f"fetching {RECORD}", where)
    except (DataError, TransientReadError):
        return None
    return parse_record(text.decode("utf-8", "replace"), where)
