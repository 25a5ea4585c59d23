"""Identifies generated answers: everything that decides what the model says to the questions of a dataset."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from echox.config.schema import Recipe
from echox.engine.checkpoint.checkpointer import find_weights
from echox.engine.checkpoint.manifest import read_manifest, weights_name
from echox.stream.collate import PromptTokens
from echox.stream.sampling.source import Source

Identity = Mapping[str, Any]
"""JSON: weights, prompt, what is heard of the audio, decoding, and the questions."""


def model_identity(recipe: Recipe, prompt: PromptTokens) -> dict[str, Any]:
    """What answers depend on beside the questions.

    Precision, batch size and number of processes are left out: they move an answer only where two tokens are equally
    probable but for rounding.

    Raises:
        CheckpointError: the S2T run has no good checkpoint.
    """
    model, respond = recipe.model, recipe.model.echo.respond
    speech = model.speech_encoder
    assert speech is not None
    sampled = {"temperature": respond.temperature, "top_p": respond.top_p, "seed": respond.seed}
    return {
        "weights": _weights(recipe),
        "prompt": {
            **_without_none(asdict(prompt)),
            "history": recipe.data.history,
            "history_tokens": recipe.data.history_tokens,
        },
        "speech": {
            "encoder": speech.model_dump(exclude={"path", "precomputed"}),
            "alignment": model.alignment.model_dump(exclude={"dropout"}),
            "shrink": model.shrink.model_dump(exclude={"dropout"}),
        },
        "decoding": {
            "max_tokens": respond.max_tokens,
            **(sampled if respond.temperature > 0 else {"temperature": 0.0}),
        },
    }


def _without_none(values: Mapping[str, Any]) -> dict[str, Any]:
    """So that an option that is not used leaves the identity as it was before there was such an option."""
    return {name: value for name, value in values.items() if value is not None}


def with_questions(model: Identity, source: Source) -> dict[str, Any]:
    """The identity of the answers to one dataset."""
    return {**model, "questions": {"fingerprint": source.catalogue.fingerprint, "task": source.task}}


def short(identity: Identity) -> str:
    """Twelve hexadecimal digits for the name of a folder."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]


def differences(found: Identity, wanted: Identity) -> str:
    """In which parts two identities differ, by their names: `weights`, `decoding.max_tokens`."""
    names: list[str] = []
    for part in wanted:
        mine, its = wanted[part], found.get(part)
        if isinstance(mine, Mapping) and isinstance(its, Mapping):
            names += [f"{part}.{key}" for key in sorted({*mine, *its}) if mine.get(key) != its.get(key)]
        elif mine != its:
            names.append(part)
    return ", ".join(names)


def _weights(recipe: Recipe) -> str:
    """SHA-256 of the trained S2T weights; of random ones, their seed."""
    if recipe.init.s2t is None:
        return f"random, seed {recipe.seed}"
    checkpoint = find_weights(recipe.init.s2t).parent
    return read_manifest(checkpoint)["files"][weights_name(checkpoint)]["sha256"]
