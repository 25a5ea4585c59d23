"""Samples to micro-batches: decoding, log-mel, tokens, padding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from echox.audio.features import LogMel
from echox.audio.io import read_audio
from echox.stream.batch import SpeechBatch, UnitBatch
from echox.stream.encoded import MEMBER, unpack
from echox.stream.index import Sample


@dataclass(frozen=True)
class Item:
    """One row to be: a sample, its task, and whether it counts or only fills the batch."""

    sample: Sample
    task: str
    weight: float = 1.0


Collate = Callable[[Sequence[Item], int], Any]


@dataclass(frozen=True)
class PromptTokens:
    """Token ids around one spoken turn.

    Attributes:
        before: template before the audio.
        after: template after the audio; `after_asr` has the transcription instruction in front.
        end: end token of the response.
    """

    before: list[int]
    after: list[int]
    after_asr: list[int]
    end: int


class Heard(NamedTuple):
    """Audio as the speech front end takes it, see `SpeechBatch`."""

    mel_BMT: Tensor
    frames_B: Tensor
    features_BTd: Tensor | None = None


def pad_rows(rows: Sequence[Sequence[int]], value: int = 0) -> tuple[Tensor, Tensor]:
    """Right-pad integer rows: `[B, longest]` and the mask of real positions (at least one column)."""
    longest = max(1, max(len(row) for row in rows))
    values = torch.full((len(rows), longest), value, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    for index, row in enumerate(rows):
        values[index, : len(row)] = torch.as_tensor(row, dtype=torch.long)
        mask[index, : len(row)] = True
    return values, mask


def pad_audio(clips: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Zero-pad waveforms: `[B, longest]` float32 and their lengths in samples."""
    lengths = torch.tensor([len(clip) for clip in clips])
    audio = torch.zeros(len(clips), int(lengths.max()))
    for row, clip in zip(audio, clips, strict=True):
        row[: len(clip)] = torch.from_numpy(clip)
    return audio, lengths


class SpeechCollate:
    """Items of sqa and asr sources to a `SpeechBatch`.

    Args:
        tokenize: text to LLM token ids, without special tokens.
        prompt: template tokens.
        log_mel: features of the speech encoder.
        max_samples: longest audio in samples; the rest is cut off and counted in `cut` (U27).
        precomputed: shards hold the encoder's output; their audio is not decoded.
    """

    def __init__(
        self,
        tokenize: Callable[[str], list[int]],
        prompt: PromptTokens,
        log_mel: LogMel,
        max_samples: int,
        *,
        precomputed: bool = False,
    ) -> None:
        self.tokenize = tokenize
        self.prompt = prompt
        self.log_mel = log_mel
        self.max_samples = max_samples
        self.precomputed = precomputed
        self.cut = 0

    def __call__(self, items: Sequence[Item], step: int) -> SpeechBatch:
        """Decode, featurise, tokenise and pad."""
        metas = [item.sample.meta for item in items]
        if self.precomputed:
            features, frames = unpack([item.sample.read(MEMBER) for item in items])
            heard = Heard(torch.zeros(len(items), self.log_mel.n_mels, 0), 2 * frames, features)
        else:
            heard = self._hear([read_audio(item.sample.read("question.flac")) for item in items])
        return self._batch(
            heard,
            [item.task for item in items],
            [meta["question_text"] or "" for meta in metas],
            [meta["answer_text"] or "" for meta in metas],
            ids=[meta["id"] for meta in metas],
            weights=[item.weight for item in items],
            step=step,
        )

    def from_audio(
        self,
        audio: Sequence[np.ndarray],
        tasks: Sequence[str],
        transcripts: Sequence[str],
        answers: Sequence[str],
        *,
        ids: Sequence[str],
        weights: Sequence[float],
        step: int = -1,
    ) -> SpeechBatch:
        """The same for audio in memory; serving passes empty transcripts and answers."""
        return self._batch(self._hear(audio), tasks, transcripts, answers, ids=ids, weights=weights, step=step)

    def _hear(self, audio: Sequence[np.ndarray]) -> Heard:
        self.cut += sum(len(clip) > self.max_samples for clip in audio)
        return Heard(*self.log_mel(*pad_audio([clip[: self.max_samples] for clip in audio])))

    def _batch(
        self,
        heard: Heard,
        tasks: Sequence[str],
        transcripts: Sequence[str],
        answers: Sequence[str],
        *,
        ids: Sequence[str],
        weights: Sequence[float],
        step: int,
    ) -> SpeechBatch:
        before = torch.tensor([self.prompt.before] * len(ids), dtype=torch.long)
        after, after_mask = pad_rows([self.prompt.after_asr if task == "asr" else self.prompt.after for task in tasks])
        response, response_mask = pad_rows([[*self.tokenize(text), self.prompt.end] for text in answers])
        spoken, spoken_mask = pad_rows([self.tokenize(text) for text in transcripts])
        return SpeechBatch(
            ids=list(ids),
            step=step,
            weight_B=torch.tensor(weights, dtype=torch.float32),
            mel_BMT=heard.mel_BMT,
            frames_B=heard.frames_B,
            features_BTd=heard.features_BTd,
            before_BP=before,
            after_BQ=after,
            after_mask_BQ=after_mask,
            response_BR=response,
            response_mask_BR=response_mask,
            transcript_BC=spoken,
            transcript_lengths_B=spoken_mask.sum(1),
        )


class UnitCollate:
    """Items of tts sources to a `UnitBatch`.

    Args:
        tokenize: text to LLM token ids, without special tokens.
        encode: units to unit-language word ids.
    """

    def __init__(self, tokenize: Callable[[str], list[int]], encode: Callable[[np.ndarray], Sequence[int]]) -> None:
        self.tokenize = tokenize
        self.encode = encode

    def __call__(self, items: Sequence[Item], step: int) -> UnitBatch:
        """Read units, encode them into words, tokenise and pad."""
        text, text_mask = pad_rows([self.tokenize(item.sample.meta["answer_text"]) for item in items])
        units = [np.frombuffer(item.sample.read("answer.units"), dtype="<u2") for item in items]
        words, words_mask = pad_rows([list(self.encode(row)) for row in units])
        return UnitBatch(
            ids=[item.sample.meta["id"] for item in items],
            step=step,
            weight_B=torch.tensor([item.weight for item in items], dtype=torch.float32),
            text_BT=text,
            text_mask_BT=text_mask,
            words_BM=words,
            words_mask_BM=words_mask,
        )
