"""Builds one rank's data stream from the data section of a recipe: datasets, plan, reader, validation."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from echox.config.paths import resolve_data
from echox.device import usable_gpus
from echox.errors import DataError, EchoXError
from echox.stream.format.catalogue import DATASET_NAME
from echox.stream.format.scan import AUDIO, ENCODED, TASKS, UNITS
from echox.stream.quarantine import Allowance
from echox.stream.reader import StreamReader
from echox.stream.sampling.batching import Budget, CostBudget, SampleBudget
from echox.stream.sampling.plan import Plan
from echox.stream.sampling.source import SERVE, Source
from echox.stream.storage.remote import is_remote, locate
from echox.stream.storage.store import ShardStore, open_catalogue
from echox.stream.validation import ValidReader

if TYPE_CHECKING:
    from echox.config.schema import Recipe, SourceConfig
    from echox.stream.collate import Collate

log = logging.getLogger(__name__)


def open_sources(recipe: Recipe, configs: Iterable[SourceConfig], *, quiet: bool = True) -> list[Source]:
    """Datasets of a recipe.

    Args:
        recipe: what trains on them.
        configs: `recipe.data.train` or `recipe.data.valid`.
        quiet: does not say how many samples of a dataset serve, where it is not all of them.

    Raises:
        DataError: one is absent, has no catalogue, is not what its catalogue says, or has no sample that serves.
    """
    sources = [
        Source(
            path=config.path,
            task=config.task,
            catalogue=open_catalogue(locate(config.path)),
            repeat=config.repeat,
            weight=config.weight,
            members=needed_members(recipe, config.task),
        )
        for config in configs
    ]
    for source in sources:
        if source.serving is None:
            continue
        counted = (
            f"{source.samples} of {source.catalogue.samples} samples of {source.path} serve for task {source.task}"
        )
        if not source.samples:
            tasks, members = sorted(SERVE[source.task]), ", ".join(sorted(source.members))
            raise DataError(
                f"{counted}: it takes those of task {' or '.join(tasks)}, or of none, that have {members}; there are "
                f"{_found(source)}",
                where=source.catalogue.location,
                fix="correct data's task for it, or build the dataset for this stage",
            )
        if not quiet:
            log.info("%s; there are %s", counted, _found(source))
    return sources


def needed_members(recipe: Recipe, task: str) -> frozenset[str]:
    """Members that a sample must have to serve for a task in a stage."""
    speech = recipe.model.speech_encoder
    if task == "tts":
        return frozenset({UNITS})
    annotated = recipe.stage == "echo" and task == "sqa" and recipe.model.echo.labels == "annotated"
    heard = ENCODED if speech is not None and speech.precomputed else AUDIO
    return frozenset({heard, *((UNITS,) if annotated else ())})


def _found(source: Source) -> str:
    """Samples by their task and members, the most first."""
    catalogue = source.catalogue
    tasks = np.zeros(catalogue.samples, np.uint8) if catalogue.tasks is None else catalogue.tasks
    pairs, counts = np.unique(np.stack([tasks, catalogue.records["layout"]]), axis=1, return_counts=True)
    named = [
        f"{count} {TASKS[task] or 'of no task'} with {', '.join(sorted(catalogue.layouts[layout]))}"
        for count, (task, layout) in sorted(zip(counts.tolist(), pairs.T.tolist(), strict=True), reverse=True)
    ]
    return "; ".join([*named[:3], *(["others"] if len(named) > 3 else [])])


def listings(places: Iterable[str]) -> dict[str, Path]:
    """`dataset.json` of each dataset that lies in a folder here, by the recipe's name of it."""
    found: dict[str, Path] = {}
    for place in places:
        if is_remote(place):
            continue
        try:
            listing = resolve_data(place) / DATASET_NAME
        except EchoXError:
            continue  # the error is raised where the dataset is opened
        if listing.is_file():
            found[place] = listing
    return found


def budget_of(recipe: Recipe) -> Budget:
    """How much goes into a micro-batch; padding costs where rows are padded."""
    data, padded = recipe.data, recipe.model.layout == "padded"
    if data.budget is not None:
        return CostBudget(data.budget.by, data.budget.size, data.budget.micro_batches, padded)
    return SampleBudget(data.global_batch, data.global_batch // data.micro_batch, padded)


def build_plan(recipe: Recipe, sources: list[Source]) -> Plan:
    """The stream of a recipe."""
    data = recipe.data
    return Plan(
        sources,
        seed=recipe.seed,
        budget=budget_of(recipe),
        window_shards=data.window_shards,
        pool=data.pool,
        weight_by=data.weight_by,
    )


def train_reader(
    recipe: Recipe, sources: list[Source], collate: Collate[Any, Any], rank: int, world_size: int
) -> StreamReader:
    """The training data of one rank; it begins to read with `start`."""
    data = recipe.data
    return StreamReader(
        build_plan(recipe, sources),
        [ShardStore(source.catalogue) for source in sources],
        collate,
        rank=rank,
        world_size=world_size,
        threads=data.reader_threads,
        prefetch=data.prefetch,
        allowance=Allowance(data.quarantine.samples, data.quarantine.share),
        pin=usable_gpus() > 0,
    )


def valid_readers(
    recipe: Recipe, sources: list[Source], collate: Collate[Any, Any], rank: int, world_size: int
) -> Mapping[str, ValidReader]:
    """The held-out data of one rank, by the name of its dataset."""
    data = recipe.data
    return {
        Path(source.path).name: ValidReader(
            source,
            ShardStore(source.catalogue),
            collate,
            budget_of(recipe),
            by_tokens=data.budget is not None and data.budget.by == "tokens",
            rank=rank,
            world_size=world_size,
            threads=data.reader_threads,
            prefetch=data.prefetch,
            pin=usable_gpus() > 0,
        )
        for source in sources
    }


def transcripts(sources: Iterable[Source]) -> Iterator[str]:
    """What is said in every question of the training data; reads all metadata."""
    for source in sources:
        store = ShardStore(source.catalogue)
        try:
            for number in source.numbers().tolist():
                yield str(store.read(number, ()).meta.get("question_text") or "")
        finally:
            store.close()
