"""Defines the micro-batches that a stage's `forward` receives: padded tensors with masks."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(kw_only=True)
class Batch:
    """Common part of all micro-batches.

    Attributes:
        ids: sample ids, in row order; none for a row that only fills the batch.
        step: optimizer step the batch belongs to; -1 outside training.
        weight_B: 1 for a sample that counts, 0 for a row that only fills the batch.
        account: what exactly-once accounting adds up, see `echox.stream.accounting`; stays on the host.
    """

    ids: list[str]
    step: int
    weight_B: Tensor
    account: np.ndarray | None = None

    def to(self, device: torch.device | str) -> Self:
        """The same batch with its tensors on `device`; from a pinned batch they go there beside what the host does."""
        return replace(self, **{name: t.to(device, non_blocking=True) for name, t in self._tensors().items()})

    def pinned(self) -> Self:
        """The same batch in memory that a GPU copies from by itself; copying it there takes this thread's time."""
        return replace(self, **{name: t.pin_memory() for name, t in self._tensors().items()})

    def _tensors(self) -> dict[str, Any]:
        found = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}


@dataclass(kw_only=True)
class SpeechBatch(Batch):
    """Spoken turns for the S2T and Echo stages.

    Where earlier turns of a dialogue are heard too, their clips are H further rows of `mel_BMT`, `frames_B` and
    `frames_on_host_B`, behind those of the B questions; all clips go through the speech front end at once.

    Attributes:
        mel_BMT, frames_B: log-mel and its real frames (margin included); the log-mel has no column where the encoder's
            output was precomputed.
        features_BTd: the precomputed output, two mel frames a column.
        frames_on_host_B, transcript_lengths_on_host_B: on the CPU once the batch is on a device, which need not be
            asked for them then.
        before_BP, before_mask_BP: prompt tokens before the audio, with the dialogue before it; no mask: all are real.
        before_sizes: columns of `before_BP` before the first earlier clip, from there to the next one, and so on up to
            the question's audio; empty where no row has an earlier clip.
        history_BK: which of the H earlier clips stands at each of those places of a row, -1 for none; None without any.
        after_BQ, after_mask_BQ: prompt tokens after the audio.
        response_BR, response_mask_BR: target text with its end token.
        transcript_BC, transcript_lengths_B: what the audio says, for CTC; of length 0 where there is no target.
        targets: what the stage found in a forward without dropout, for the next forward of the same batch.
        addresses: where each sample lies: key of its source, and number in it; none for a row that fills the batch.
        labels_BM, labels_mask_BM: unit-language words of the recorded answers, where they are the labels of Stage III.
        own_BR, own_mask_BR: the model's own answers without end token, where they were made beforehand; a row without a
            real position has none that can be used.
    """

    mel_BMT: Tensor
    frames_B: Tensor
    before_BP: Tensor
    after_BQ: Tensor
    after_mask_BQ: Tensor
    response_BR: Tensor
    response_mask_BR: Tensor
    transcript_BC: Tensor
    transcript_lengths_B: Tensor
    before_mask_BP: Tensor | None = None
    before_sizes: tuple[int, ...] = ()
    history_BK: Tensor | None = None
    features_BTd: Tensor | None = None
    frames_on_host_B: Tensor | None = None
    transcript_lengths_on_host_B: Tensor | None = None
    targets: Any = None
    addresses: list[tuple[int, int]] = field(default_factory=list)
    labels_BM: Tensor | None = None
    labels_mask_BM: Tensor | None = None
    own_BR: Tensor | None = None
    own_mask_BR: Tensor | None = None

    def to(self, device: torch.device | str) -> Self:
        """The same batch with its tensors on `device`, and the lengths that a forward asks for here too."""
        frames = self.frames_B if self.frames_on_host_B is None else self.frames_on_host_B
        lengths = self.transcript_lengths_on_host_B
        return replace(
            super().to(device),
            frames_on_host_B=frames,
            transcript_lengths_on_host_B=self.transcript_lengths_B if lengths is None else lengths,
        )

    @property
    def audio(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """What the speech front end takes."""
        return self.mel_BMT, self.frames_B, self.features_BTd, self.frames_on_host_B

    def stats(self) -> dict[str, float]:
        """Real and padded mel frames, and seconds of audio (100 mel frames a second)."""
        heard = len(self.frames_B) - len(self.weight_B)
        frames = float((self.frames_B * F.pad(self.weight_B, (0, heard), value=1.0)).sum())
        columns = self.mel_BMT.shape[2] if self.features_BTd is None else 2 * self.features_BTd.shape[1]
        return {
            "tokens": frames,
            "positions": float(len(self.frames_B) * columns),
            "audio_s": frames / 100,
        }


@dataclass(kw_only=True)
class UnitBatch(Batch):
    """Text and its unit-language words for the T2C stage.

    Attributes:
        text_BT, text_mask_BT: text tokens, without template.
        words_BM, words_mask_BM: unit-language words, without end token.
    """

    text_BT: Tensor
    text_mask_BT: Tensor
    words_BM: Tensor
    words_mask_BM: Tensor

    def stats(self) -> dict[str, float]:
        """Real and padded positions of text and words."""
        real = float(self.text_mask_BT.sum() + self.words_mask_BM.sum())
        return {"tokens": real, "positions": float(self.text_mask_BT.numel() + self.words_mask_BM.numel())}
