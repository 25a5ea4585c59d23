"""Precomputed output of the frozen speech encoder, kept in the shards beside the audio it was made from."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from echox.config.paths import resolve_model
from echox.config.schema import ModelConfig
from echox.errors import DataError
from echox.release.checksums import sha256_file

MEMBER = "question.encoded.npy"
"""Features of one clip: float16 [frames, width], margin included."""
RECORD = "encoded.json"
"""What encoded a folder's samples, beside its `dataset.json`."""


def encoding_identity(model: ModelConfig) -> dict[str, Any]:
    """Everything the features depend on beside the audio: the encoder's weights and how its input is cut."""
    speech = model.speech_encoder
    assert speech is not None
    return {
        "weights": sha256_file(resolve_model(speech.path) / "model.safetensors"),
        "input": speech.input,
        "margin_s": speech.margin_s,
        "max_audio_s": speech.max_audio_s,
        "stack": model.alignment.stack,
    }


def check_encoded(folder: Path, identity: dict[str, Any]) -> None:
    """Make sure that a folder's features are those of this encoder.

    Raises:
        DataError: the folder has no features, or others.
    """
    record = folder / RECORD
    found = json.loads(record.read_text()) if record.is_file() else None
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


def pack(features_Td: Tensor) -> bytes:
    """A clip's features as the bytes of its member."""
    buffer = io.BytesIO()
    np.save(buffer, features_Td.to(torch.float16).numpy(), allow_pickle=False)
    return buffer.getvalue()


def unpack(member: bytes) -> Tensor:
    """A clip's features `[frames, width]`, float32, from the bytes of its member."""
    return torch.from_numpy(np.load(io.BytesIO(member), allow_pickle=False)).float()


def pad_features(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Features of several clips, zero-padded: `[B, longest, width]` float32, and the frames of each `[B]`."""
    frames = torch.tensor([len(row) for row in rows])
    features = torch.zeros(len(rows), int(frames.max()), rows[0].shape[1])
    for target, row in zip(features, rows, strict=True):
        target[: len(row)] = row
    return features, frames
