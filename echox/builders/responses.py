"""Finds the model's own answers that a Stage III recipe trains on, and checks that they are those of its S2T model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from echox.config.paths import storage_folder
from echox.config.schema import Recipe
from echox.engine.run_files import RunFile
from echox.responses.decoding import Decoder
from echox.responses.identity import model_identity, short, with_questions
from echox.responses.table import RECORD, ResponseTable, find_table
from echox.stream.collate import PromptTokens
from echox.stream.sampling.source import Source


@dataclass(frozen=True)
class OwnAnswers:
    """The answers of a recipe.

    Attributes:
        tables: of each source, by its key.
        files: the records of the training data's tables, to be kept with the run and compared on a resume.
    """

    tables: dict[int, ResponseTable]
    files: dict[str, RunFile]


def find_answers(recipe: Recipe, prompt: PromptTokens, train: list[Source], valid: Iterable[Source]) -> OwnAnswers:
    """The tables that `model.echo.pseudo_text: generated` reads; none for another stage or another pseudo text.

    Raises:
        DataError: a dataset has no answers, or none of this S2T model, prompt and decoding.
        CheckpointError: the S2T run has no good checkpoint.
    """
    if recipe.stage != "echo" or recipe.model.echo.pseudo_text != "generated":
        return OwnAnswers({}, {})
    model = model_identity(recipe, prompt)
    storage = storage_folder(recipe.storage)
    tables = {source.key: find_table(source, with_questions(model, source), storage) for source in (*train, *valid)}
    return OwnAnswers(tables, {f"responses-{source.name}.json": _run_file(tables[source.key]) for source in train})


def build_decoder(recipe: Recipe, prompt: PromptTokens, tokenizer: Any) -> Decoder:
    """What decodes and judges answers as the recipe says."""

    def to_text(tokens: list[int]) -> str:
        return str(tokenizer.decode(tokens, skip_special_tokens=True)).strip()

    return Decoder(recipe.model.echo.respond, prompt.end, to_text)


def _run_file(table: ResponseTable) -> RunFile:
    identity = table.record["identity"]
    contents = json.dumps([identity, table.record["sha256"]], sort_keys=True)
    digest = hashlib.sha256(contents.encode()).hexdigest()
    return RunFile(path=table.folder / RECORD, sha256=digest, about={"identity": short(identity)})
