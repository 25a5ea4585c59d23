"""An Echo run of random weights on disk, and loaded with questions that it answers at uneven lengths."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from echox.builders.setup import TextTools, build_stage
from echox.speak.pipeline import SpeechToSpeech
from tests.builders import tiny_run
from tests.stages import by_hand

MAX_NEW = 12


def clips() -> list[NDArray[np.float32]]:
    """Noises of uneven length and pitch."""
    random = np.random.default_rng(0)
    return [
        (random.standard_normal(size) * np.sin(np.arange(size) * 0.01 * (n + 1)) * 0.3).astype(np.float32)
        for n, size in enumerate((9000, 16000, 5200, 12345, 7000))
    ]


def write_echo_run(folder: Path) -> Path:
    """An Echo run, with the runs it started from."""
    tiny_run.write_models(folder)
    init = {}
    for number, stage in enumerate(("s2t", "t2c", "echo")):
        recipe = tiny_run.make_recipe(folder, stage, init=init if stage == "echo" else {})
        module = build_stage(recipe, TextTools.load(recipe))
        tiny_run.randomise(module, number + 6)
        init[stage] = str(tiny_run.write_run(folder / stage, recipe, tiny_run.trained(module)))
    return folder / "echo"


def load_with_ends(run: Path) -> SpeechToSpeech:
    """The run, with an end token that some answers reach early and others never."""
    loaded = SpeechToSpeech.load(run, device="cpu")
    loaded.max_new = MAX_NEW
    text = loaded._text
    batch = loaded._batch(clips(), "sqa")
    prompt = by_hand.row_of_prompt(loaded.stage.s2t, batch, 0)
    end = by_hand.own_answer(loaded.stage.s2t, prompt, -1, 8)[6]
    loaded._text = dataclasses.replace(text, prompt=dataclasses.replace(text.prompt, end=end))
    return loaded
