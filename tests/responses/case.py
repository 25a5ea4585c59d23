"""A Stage III recipe at tiny size whose datasets, S2T run and T2C run lie in a folder, with answers of every kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from echox.builders.data import open_sources
from echox.builders.setup import TextTools, build_speech_collate, build_stage
from echox.config.schema import Recipe
from echox.respond import load_s2t
from echox.stream.collate import Item
from echox.stream.format.writer import write_shards
from echox.stream.storage.store import read_folder
from tests import tiny
from tests.builders import tiny_run
from tests.shards.layouts import encoded
from tests.stages import by_hand

SAMPLES = {"train": 13, "valid": 4}
MOST = 12
"""Tokens of an answer."""


def make(folder: Path, **echo: Any) -> Recipe:
    """Everything in `folder`; the recipe's answers are greedy, and some of them end."""
    tiny_run.write_models(folder)
    for seed, (name, samples) in enumerate(SAMPLES.items()):
        write_shards(folder / name, (sample(seed, number) for number in range(samples)), 5)
    init = {}
    for seed, stage in ((9, "s2t"), (6, "t2c")):  # 9: answers that differ, and seldom repeat themselves
        recipe = tiny_run.make_recipe(folder, stage)
        module = build_stage(recipe, TextTools.load(recipe))
        tiny_run.randomise(module, seed)
        init[stage] = str(tiny_run.write_run(folder / "runs" / stage, recipe, tiny_run.trained(module)))
    return with_end(recipe_of(folder, init, **echo))


def recipe_of(folder: Path, init: dict[str, str], **echo: Any) -> Recipe:
    respond = {"max_tokens": MOST, "batch": 4, **echo.pop("respond", {})}
    recipe = tiny_run.make_recipe(
        folder, "echo", init=init, echo={"pseudo_text": "generated", "respond": respond, **echo}
    )
    tree = recipe.model_dump(mode="json")
    tree["storage"] = str(folder / "runs")
    tree["engine"]["deepspeed"] = "ds_configs/zero3_cpu.json"
    tree["scaling"]["workers"] = 1
    tree["data"] |= {
        "train": [{"path": str(folder / "train"), "task": "sqa"}],
        "valid": [{"path": str(folder / "valid"), "task": "sqa"}],
        "global_batch": 4,
        "micro_batch": 2,
    }
    return Recipe.model_validate(tree)


def sample(seed: int, number: int) -> dict[str, Any]:
    random = np.random.default_rng([seed, number])
    size = int(random.integers(5000, 16000))
    tone = random.standard_normal(size) * np.sin(np.arange(size) * 0.01 * (number + 1)) * 8000
    words = [f"w{token}" for token in random.integers(12, tiny.VOCABULARY, 3 + number % 4)]
    return {
        "__key__": f"{seed}-{number:03d}",
        "question.flac": encoded(tone.astype(np.int16), kind="FLAC"),
        "json": {
            "id": f"id{seed}-{number}",
            "question_text": " ".join(words[:2]),
            "answer_text": " ".join(words),
            "question_s": size / 16000,
        },
    }


def change(recipe: Recipe, **changes: Any) -> Recipe:
    """Values by dotted key, with `__` for the dots."""
    tree = recipe.model_dump(mode="json")
    for key, value in changes.items():
        *path, last = key.split("__")
        place = tree
        for part in path:
            place = place[part]
        place[last] = value
    return Recipe.model_validate(tree)


def with_end(recipe: Recipe) -> Recipe:
    """The recipe with an end token that some greedy answers reach early, one at once, and others never."""
    rows = list(greedy(change(recipe, model__llm__prompt__end="w0"), -1).values())
    tokens = {token for row in rows for token in row}

    def kinds(end: int) -> tuple[int, int]:
        lengths = [row.index(end) if end in row else MOST for row in rows]
        return len({length for length in lengths if 0 < length < MOST}), -abs(sum(n == MOST for n in lengths) - 3)

    return change(recipe, model__llm__prompt__end=f"w{max(sorted(tokens), key=kinds)}")


def batches_alone(recipe: Recipe, name: str) -> Any:
    """Each sample of a dataset as a batch of its own."""
    configs = (*recipe.data.train, *recipe.data.valid)
    (source,) = open_sources(recipe, (config for config in configs if config.path.endswith(name)))
    collate = build_speech_collate(recipe, TextTools.load(recipe))
    for found in read_folder(source.path):
        yield found.number, collate([Item(found, "sqa", source=source.key)], -1)


def greedy(recipe: Recipe, end: int, name: str = "train") -> dict[int, list[int]]:
    """Answers token by token from whole forwards, by number of the sample."""
    s2t = load_s2t(recipe, TextTools.load(recipe), torch.device("cpu"))
    with torch.no_grad():
        return {
            number: by_hand.own_answer(s2t, by_hand.row_of_prompt(s2t, batch, 0), end, MOST)
            for number, batch in batches_alone(recipe, name)
        }


def write_recipe(recipe: Recipe, path: Path) -> Path:
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    return path
