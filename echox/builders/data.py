"""Builds one rank's data stream from the data section of a recipe: datasets, plan, reader, validation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echox.config.paths import resolve_data
from echox.errors import EchoXError
from echox.stream.format.catalogue import DATASET_NAME
from echox.stream.quarantine import Allowance
from echox.stream.reader import StreamReader
from echox.stream.sampling.batching import Budget, CostBudget, SampleBudget
from echox.stream.sampling.plan import Plan
from echox.stream.sampling.source import Source
from echox.stream.storage.remote import is_remote, locate
from echox.stream.storage.store import ShardStore, open_catalogue
from echox.stream.validation import ValidReader

if TYPE_CHECKING:
    from echox.config.schema import Recipe, SourceConfig
    from echox.stream.collate import Collate


def open_sources(configs: Iterable[SourceConfig]) -> list[Source]:
    """The datasets of a recipe.

    Raises:
        DataError: one is absent, has no catalogue, or is not what its catalogue says.
    """
    return [
        Source(
            path=config.path,
            task=config.task,
            catalogue=open_catalogue(locate(config.path)),
            repeat=config.repeat,
            weight=config.weight,
        )
        for config in configs
    ]


def listings(configs: Iterable[SourceConfig]) -> dict[str, Path]:
    """`dataset.json` of each dataset that lies in a folder here, by the recipe's name of it."""
    found: dict[str, Path] = {}
    for config in configs:
        if is_remote(config.path):
            continue
        try:
            listing = resolve_data(config.path) / DATASET_NAME
        except EchoXError:
            continue  # the error is raised where the dataset is opened
        if listing.is_file():
            found[config.path] = listing
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
        )
        for source in sources
    }


def transcripts(sources: Iterable[Source]) -> Iterator[str]:
    """What is said in every question of the training data; reads all metadata."""
    for source in sources:
        store = ShardStore(source.catalogue)
        try:
            for number in range(source.catalogue.samples):
                yield str(store.read(number, ()).meta.get("question_text") or "")
        finally:
            store.close()
