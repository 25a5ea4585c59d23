"""Settles after how many unit-language words the teacher of Stage III stops: as the T2C run learned from its own data.

A T2C run measures its texts when it begins; a run of either stage records the number in its manifests and keeps it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from echox.builders.data import build_plan
from echox.config.paths import is_url, run_dir
from echox.config.schema import Recipe
from echox.engine.checkpoint.checkpointer import find_weights
from echox.engine.checkpoint.manifest import MANIFEST, list_checkpoints, read_manifest
from echox.engine.checkpoint.recorded import LANGUAGE
from echox.errors import CheckpointError, CorruptSampleError
from echox.stream.collate import Collate, Item, UnitCollate
from echox.stream.sampling.keyed_rng import permutation
from echox.stream.sampling.plan import Plan
from echox.stream.sampling.source import Source
from echox.stream.storage.store import ShardStore
from echox.units.word_limit import SPARE_WORDS, UNKNOWN, words_per_token

if TYPE_CHECKING:
    from echox.engine.checkpoint.contents import Manifest

TEXTS = 2048
"""Texts that are measured, at most: those of the first windows of a run's own stream, which it reads anyway."""
_MOST = 1000.0
"""Words a token that a record may say."""
KEY = "words_per_token"
"""Beside the identity of the unit language, in a manifest."""


def measure(recipe: Recipe, sources: Sequence[Source], collate: UnitCollate) -> float | None:
    """Words a token that the data of a T2C recipe need, the same on every rank; what the run has recorded comes first.

    Args:
        recipe: of the T2C run.
        sources: its training data.
        collate: reads them; a damaged sample is passed over, since training reports it.

    Returns:
        None where no sample can be read.

    Raises:
        CheckpointError: what the run has recorded is no number of words.
        DataError: a shard is gone.
        TransientReadError: storage failed again and again.
    """
    kept = _of_own_run(recipe)
    if kept is not None:
        return kept
    plan = build_plan(recipe, list(sources))
    stores = [ShardStore(source.catalogue) for source in sources]
    try:
        rows = []
        for index, number in _first(plan, stores):
            try:
                rows.append(collate.decode(Item(stores[index].read(number, collate.members), "tts")))
            except CorruptSampleError:
                continue
    finally:
        for store in stores:
            store.close()
    words = collate.language.encode_batch([row.units for row in rows])
    sizes = [(len(row.text), len(said)) for row, said in zip(rows, words, strict=True) if row.text and len(said)]
    return words_per_token(*np.array(sizes).T) if sizes else None


class Settled(NamedTuple):
    """What a run goes by: its recipe with a number for `auto`, the number it records, and a line for its log."""

    recipe: Recipe
    words_per_token: float | None = None
    note: str = ""


def settle(recipe: Recipe, sources: Sequence[Source], collate: Collate[Any, Any]) -> Settled:
    """The limit of a run that begins or goes on, the same on every rank: measured in Stage II, taken in Stage III.

    Args:
        recipe: of any stage.
        sources: its training data.
        collate: reads them.

    Raises:
        CheckpointError: the T2C run has no good checkpoint, or a record is no number of words.
        DataError, TransientReadError: texts cannot be measured, see `measure`.
    """
    if recipe.stage == "t2c" and isinstance(collate, UnitCollate):
        words = measure(recipe, sources, collate)
        note = "" if words is None else f"{words:g} words a text token fit nearly all texts, with a margin"
        return Settled(recipe, words, note)
    if recipe.stage != "echo":
        return Settled(recipe)
    given = recipe.model.echo.units_per_token
    if given != "auto":
        return _settled(recipe, given, "the recipe says")
    kept = _of_own_run(recipe)
    if kept is not None:
        return _settled(recipe, kept, "this run has had from its beginning")
    learned = None if recipe.init.t2c is None else recorded(find_weights(recipe.init.t2c).parent)
    if learned is not None:
        return _settled(recipe, learned, f"{recipe.init.t2c} has learned from its data")
    return _settled(recipe, UNKNOWN, "holds where no T2C run has learned another")


def with_own_limit(recipe: Recipe, checkpoint: Path) -> Recipe:
    """The recipe of an Echo checkpoint with the number that its run was trained with.

    Raises:
        CheckpointError: its record is no number of words.
    """
    if recipe.stage != "echo" or recipe.model.echo.units_per_token != "auto":
        return recipe
    return _with(recipe, recorded(checkpoint) or UNKNOWN)


def likely(recipe: Recipe) -> float:
    """Words a token that a Stage III recipe will probably go by; nothing is fetched or verified for it."""
    given = recipe.model.echo.units_per_token
    if given != "auto":
        return given
    run = recipe.init.t2c
    if run is None or is_url(run):
        return UNKNOWN
    places = [Path(run)] if (Path(run) / MANIFEST).is_file() else list_checkpoints(Path(run))
    return _newest(places) or UNKNOWN


def recorded(checkpoint: Path) -> float | None:
    """Words a token in the manifest of a T2C or Echo checkpoint; None where there is none, as in older ones.

    Raises:
        CheckpointError: it is no number of words.
    """
    return _number(read_manifest(checkpoint), checkpoint)


def _number(manifest: Manifest, checkpoint: Path) -> float | None:
    entry = manifest.get("run_files", {}).get(LANGUAGE)
    value = None if entry is None else entry["about"].get(KEY)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= _MOST:
        raise CheckpointError(
            f"the manifest says that a text token takes {value!r} unit-language words",
            where=str(checkpoint),
            fix="set model.echo.units_per_token to a number, or name another checkpoint",
        )
    return value


def _of_own_run(recipe: Recipe) -> float | None:
    """What the run has recorded, where it goes on."""
    return _newest(list_checkpoints(run_dir(recipe.storage, recipe.name)))


def _newest(checkpoints: Sequence[Path]) -> float | None:
    for checkpoint in checkpoints:
        try:
            manifest = read_manifest(checkpoint)
        except CheckpointError:
            continue  # a damaged one, which is not resumed from either
        return _number(manifest, checkpoint)
    return None


def _first(plan: Plan, stores: Sequence[ShardStore]) -> list[tuple[int, int]]:
    """Source and number of the samples that are measured: a random part of the first windows."""
    windows, found = plan.order.windows(0), list[tuple[int, int]]()
    window = 0
    while len(found) < TEXTS and (windows is None or window < windows):
        rows = plan.order.pick(0, window)
        found += zip(rows.source_N.tolist(), rows.number_N.tolist(), strict=True)
        for index in np.unique(rows.source_N).tolist():
            shards = plan.sources[index].catalogue.records["shard"][rows.number_N[rows.source_N == index]]
            stores[index].stage(np.unique(shards).tolist())
        window += 1
    chosen = permutation(len(found), "words per token", plan.seed)[:TEXTS]
    return [found[place] for place in sorted(chosen.tolist())]


def _with(recipe: Recipe, number: float) -> Recipe:
    echo = recipe.model.echo.model_copy(update={"units_per_token": number})
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"echo": echo})})


def _settled(recipe: Recipe, number: float, whose: str) -> Settled:
    line = f"the teacher says at most {number:g} words a text token and {SPARE_WORDS} more, as {whose}"
    return Settled(_with(recipe, number), number, line)
