"""`echox respond`: lets the S2T model of a Stage III recipe answer the questions of its datasets, before training.

The answers are what `model.echo.pseudo_text: generated` trains on. Each process holds the whole S2T model and answers
its share; no process waits for another but at the end of a dataset. What was answered and written is not answered
again, whatever the number of processes.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echox.config.paths import storage_folder
from echox.device import best_device, follow_recipe
from echox.errors import EchoXError, RecipeError

if TYPE_CHECKING:
    import torch

    from echox.builders.setup import TextTools
    from echox.config.schema import Recipe
    from echox.engine.context import RunContext
    from echox.engine.interfaces import TrainResult
    from echox.engine.world import World
    from echox.models.s2t import S2TModel
    from echox.responses.decoding import Decoder
    from echox.responses.table import Answer
    from echox.stream.collate import SpeechCollate
    from echox.stream.sampling.source import Source

Say = Callable[[str, int, int], None]
"""Told what is being done, how many parts of it are done, and how many there are."""
FLUSH_S = 30.0
"""Answers of so many seconds are lost when a process is killed."""


@dataclass(frozen=True, kw_only=True)
class Answered:
    """The answers to one dataset.

    Attributes:
        path, task: of the dataset, as in the recipe.
        folder: where its answers lie.
        samples: of the dataset.
        rejected: answers that are not used, by reason.
        new: answers made by this call, in all processes.
    """

    path: str
    task: str
    folder: str
    samples: int
    rejected: dict[str, int]
    new: int


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What `respond` did: a record a dataset, and the seconds that it took."""

    datasets: tuple[Answered, ...]
    seconds: float


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "respond",
        help="let the S2T model answer the questions that a Stage III recipe trains on",
        description="Let the S2T model answer the questions that a Stage III recipe trains on, in this process or in "
        "every process of a torchrun. Run again after an interruption, it answers what is left.",
        epilog="examples: echox respond demo/echo model.echo.respond.batch=16\n"
        "          torchrun --standalone --nproc-per-node 2 -m echox respond demo/echo\n"
        "          echox submit demo/echo --respond",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", metavar="RECIPE", help="YAML file, or a name below launch/recipes such as demo/echo")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys to change")
    parser.add_argument("--json", action="store_true", help="print the result as JSON on stdout")
    parser.set_defaults(run=run_respond)


def run_respond(args: argparse.Namespace) -> int:
    """Answer; rank 0 prints the result."""
    from echox.config.load import load_recipe
    from echox.engine.context import TorchrunContext, device_of
    from echox.engine.world import World
    from echox.progress import Progress

    recipe = load_recipe(args.recipe, args.overrides)
    follow_recipe(recipe)
    if TorchrunContext.detected():
        with TorchrunContext(storage_folder(recipe.storage), timeout_s=recipe.scaling.collective_timeout_s) as context:
            world = World.of(context.rank, context.world_size, device_of(context))
            summary, is_main = respond(recipe, world=world, progress=Progress()), world.is_main
    else:
        summary, is_main = respond(recipe, progress=Progress()), True
    if is_main:
        _print(summary, as_json=args.json)
    return 0


def respond(recipe: Recipe, *, world: World | None = None, progress: Say | None = None) -> Summary:
    """Answer the questions of all datasets of a Stage III recipe that have no complete answers yet.

    Args:
        recipe: its `init.s2t` answers; where its weights are random, so are the answers.
        world: the processes that share the work, over an initialised torch.distributed; None: this one alone.
        progress: called on every rank with its own share; None: silent.

    Returns:
        The same on every rank.

    Raises:
        RecipeError: the recipe is of another stage.
        CheckpointError, DataError, MissingModelError: a part that the recipe names is absent or does not fit.
    """
    from echox.builders.data import open_sources
    from echox.builders.setup import TextTools

    if recipe.stage != "echo":
        raise RecipeError(f"recipe {recipe.name} is of stage {recipe.stage}", fix="give the recipe of a stage echo")
    began, world = time.monotonic(), world or _alone()
    text = TextTools.load(recipe)
    sources = {source.key: source for source in open_sources(recipe, (*recipe.data.train, *recipe.data.valid))}
    work = _Work(recipe, text, world, progress or (lambda what, done, total: None))
    found = tuple(work.answer(source) for source in sources.values())
    return Summary(datasets=found, seconds=round(time.monotonic() - began, 1))


def respond_in_job(
    recipe: Recipe, context: RunContext, build: Any = None, tracker: Any = None, **options: Any
) -> TrainResult:
    """`respond` in place of the train function of a Ray job (`echox submit RECIPE --respond`)."""
    from echox.engine.context import device_of
    from echox.engine.interfaces import TrainResult
    from echox.engine.world import World
    from echox.progress import Progress

    world = World.of(context.rank, context.world_size, device_of(context))
    summary = respond(recipe, world=world, progress=Progress())
    if world.is_main:
        _print(summary, as_json=False)
    counts = {name: count for one in summary.datasets for name, count in _counts(one)}
    if tracker is not None:
        tracker.log_metrics(counts, 0)
    return TrainResult(run_folder=context.storage / recipe.name, step=0, checkpoint=None, metrics=counts)


class _Work:
    """Answers dataset after dataset; loads the model for the first one that has questions left."""

    def __init__(self, recipe: Recipe, text: TextTools, world: World, say: Say) -> None:
        from echox.responses.identity import model_identity

        self.recipe, self.text, self.world, self.say = recipe, text, world, say
        self._identity = model_identity(recipe, text.prompt)
        self._model: tuple[S2TModel, SpeechCollate, Decoder] | None = None

    def answer(self, source: Source) -> Answered:
        """Complete the answers to one dataset."""
        from echox.responses.identity import with_questions
        from echox.responses.table import complete

        identity = with_questions(self._identity, source)
        folder, table, answered = self._agreed(lambda: _state(source, identity, storage_folder(self.recipe.storage)))
        new = 0
        if table is None:
            new = source.catalogue.samples - len(answered)
            self._together(lambda: self._answer_share(source, folder, answered))
            table = self._agreed(lambda: complete(folder, identity, source.catalogue.samples))
        return Answered(
            path=source.path,
            task=source.task,
            folder=str(folder),
            samples=table.samples,
            rejected=table.rejected,
            new=new,
        )

    def _answer_share(self, source: Source, folder: Path, answered: set[int]) -> None:
        """The questions of this rank that are left, the longest first."""
        from echox.responses.reading import longest_first, read_ahead
        from echox.responses.table import write_part
        from echox.stream.storage.store import ShardStore

        model, collate, decoder = self._loaded()
        left = [number for number in longest_first(source) if number not in answered]
        size, rank, ranks = self.recipe.model.echo.respond.batch, self.world.rank, self.world.size
        batches = [left[start : start + size] for start in range(rank * size, len(left), ranks * size)]
        what, total, done = f"answers to {source.path}", sum(map(len, batches)), 0
        store = ShardStore(source.catalogue)
        unwritten: list[Answer] = []
        written = time.monotonic()
        try:
            for batch, damaged in read_ahead(source, store, collate, batches):
                unwritten += damaged
                if batch is not None:
                    rows = decoder.generate(model, batch.to(self.world.device))
                    unwritten += decoder.judged(batch, rows)
                if time.monotonic() - written >= FLUSH_S:
                    done += len(unwritten)
                    write_part(folder, unwritten)
                    unwritten, written = [], time.monotonic()
                self.say(what, done + len(unwritten), total)
            if unwritten:
                write_part(folder, unwritten)
        finally:
            store.close()

    def _loaded(self) -> tuple[S2TModel, SpeechCollate, Decoder]:
        from echox.builders.responses import build_decoder
        from echox.builders.setup import build_speech_collate

        if self._model is None:
            decoder = build_decoder(self.recipe, self.text.prompt, self.text.tokenizer)
            model = load_s2t(self.recipe, self.text, self.world.device)
            self._model = (model, build_speech_collate(self.recipe, self.text), decoder)
        return self._model

    def _together(self, do: Callable[[], None]) -> None:
        """Do something on every rank; an error of any rank is raised on all."""
        mine: EchoXError | None = None
        try:
            do()
        except EchoXError as error:
            mine = error
        for found in self.world.all_gather(mine):
            if found is not None:
                raise found

    def _agreed(self, do: Callable[[], Any]) -> Any:
        """What rank 0 makes of it, result or error, on every rank."""
        found: Any = None
        if self.world.is_main:
            try:
                found = do()
            except EchoXError as error:
                found = error
        found = self.world.broadcast(found)
        if isinstance(found, EchoXError):
            raise found
        return found


def load_s2t(recipe: Recipe, text: TextTools, device: torch.device) -> S2TModel:
    """The trained S2T model of a Stage III recipe, whole, for inference."""
    import torch

    from echox.builders.setup import build_stage
    from echox.config.schema import InitConfig

    torch.manual_seed(recipe.seed)
    alone = recipe.model_copy(update={"stage": "s2t", "init": InitConfig(s2t=recipe.init.s2t)})
    model: S2TModel = build_stage(alone, text).eval().requires_grad_(False).to(device).s2t  # type: ignore[assignment]
    return model


def _state(source: Source, identity: Any, storage: Path) -> tuple[Path, Any, set[int]]:
    """Where the answers go, their table if it is complete, and otherwise the samples that have an answer."""
    from echox.responses.identity import short
    from echox.responses.table import ResponseTable, choose_folder, places, read_parts

    for place in places(source, storage):
        table = ResponseTable.find(place / short(identity))
        if table is not None:
            return table.folder, table, set()
    folder = choose_folder(source, identity, storage)
    return folder, None, {answer.number for answer in read_parts(folder)}


def _alone() -> World:
    import torch

    from echox.engine.world import World

    return World(0, 1, torch.device(best_device()))


def _counts(one: Answered) -> list[tuple[str, float]]:
    name, share = f"responses/{Path(one.path).name}", sum(one.rejected.values()) / max(one.samples, 1)
    return [(f"{name}/samples", float(one.samples)), (f"{name}/rejected_share", share)]


def _print(summary: Summary, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(asdict(summary)))
        return
    for one in summary.datasets:
        said = ", ".join(f"{count} {reason}" for reason, count in one.rejected.items()) or "none"
        print(f"{one.path}: {one.samples} answers ({one.new} new), rejected: {said}; in {one.folder}")
