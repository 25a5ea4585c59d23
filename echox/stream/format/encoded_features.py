"""Packs and pads precomputed outputs of the frozen speech encoder, kept in the shards beside their audio."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


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
