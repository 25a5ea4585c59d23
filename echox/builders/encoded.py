"""Identifies the speech encoder that made the precomputed features of a dataset, and checks it against a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from echox.config.model_schema import ModelConfig
from echox.config.paths import resolve_model
from echox.errors import DataError
from echox.files import read_record, sha256_file

RECORD = "encoded.json"
"""What encoded a folder's samples, beside its `dataset.json`."""


def encoding_identity(model: ModelConfig) -> dict[str, Any]:
    """Everything the features depend on beside the audio: the encoder's weights and how its input is cut.

    `max_audio_s` also tells features of one window (30 s at most) from those of several.
    """
    speech = model.speech_encoder
    assert speech is not None
    identity: dict[str, Any] = {
        "weights": sha256_file(resolve_model(speech.path) / "model.safetensors"),
        "input": speech.input,
        "margin_s": speech.margin_s,
        "max_audio_s": speech.max_audio_s,
        "stack": model.alignment.stack,
    }
    if speech.input != "trim":
        identity["attention"] = "whole windows"  # older features of this mode saw no silence
    return identity


def check_encoded(folder: Path, identity: dict[str, Any]) -> None:
    """Make sure that a folder's features are those of this encoder.

    Raises:
        DataError: the folder has no features, or others.
    """
    record = folder / RECORD
    found = (read_record(folder, RECORD) or None) if record.exists() else None
    if found == identity:
        return
    differs = (
        "has none" if found is None else f"differs in {', '.join(k for k in identity if found.get(k) != identity[k])}"
    )
    raise DataError(
        f"model.speech_encoder.precomputed=true needs encoded questions in the shards; {folder.name} {differs}",
        where=str(folder),
        fix="run `echox shards encode` with this recipe, or set it to false",
    )
