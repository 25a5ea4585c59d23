"""Adds the frozen speech encoder's output to shards, so that training does not compute it again every epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from echox.audio.batches import length_batches
from echox.audio.features import WINDOW
from echox.audio.io import SAMPLE_RATE, read_audio
from echox.builders.encoded import RECORD, encoding_identity
from echox.config.model_schema import ModelConfig
from echox.config.paths import resolve_data
from echox.config.schema import Recipe
from echox.device import best_device
from echox.release.pretrained import load_whisper_encoder
from echox.stream.collate import pad_audio
from echox.stream.format.encoded_features import pack
from echox.stream.format.scan import ENCODED
from shards.builder.records import PER_SHARD, read_json, write_json
from shards.builder.rewrite import read_samples, rewrite

if TYPE_CHECKING:
    from torch import Tensor

Progress = Callable[[str], None]
_BATCH_S = 60


class QuestionEncoder:
    """The speech encoder of a recipe, with the input it gets in training.

    Attributes:
        cut: clips so far that were longer than the recipe's `max_audio_s`.
    """

    def __init__(self, model: ModelConfig) -> None:
        from echox.audio.features import LogMel
        from echox.models.speech import TrimmedWhisperEncoder

        speech = model.speech_encoder
        assert speech is not None
        encoder = load_whisper_encoder(speech.path, torch.float32)
        self.device = best_device()
        self._encoder = TrimmedWhisperEncoder(encoder, model.layout, input_mode=speech.input).to(self.device)
        self._log_mel = LogMel(
            encoder.config.num_mel_bins,
            input_mode=speech.input,
            margin_s=speech.margin_s,
            stack=model.alignment.stack,
        )
        self._most = int(speech.max_audio_s * SAMPLE_RATE)
        self._least = 0 if speech.input == "trim" else WINDOW
        self.cut = 0

    @torch.no_grad()
    def __call__(self, clips: list[Any]) -> list[Tensor]:
        """Features `[frames, width]` of each clip, batched by length."""
        self.cut += sum(len(clip) > self._most for clip in clips)
        clips = [clip[: self._most] for clip in clips]
        found: dict[int, Tensor] = {}
        for batch in length_batches([max(len(clip), self._least) for clip in clips], _BATCH_S * SAMPLE_RATE):
            mel, frames = self._log_mel(*pad_audio([clips[index] for index in batch]))
            features, lengths = self._encoder(mel.to(self.device), frames.to(self.device), frames)
            for index, row, length in zip(batch, features.cpu(), lengths.tolist(), strict=True):
                found[index] = row[:length].clone()
        return [found[index] for index in range(len(clips))]


def encode_folder(folder: Path, model: ModelConfig, progress: Progress | None = None) -> bool:
    """Write `question.encoded.npy` into every sample of a folder of shards.

    Args:
        folder: shards whose samples have `question.flac`.
        model: the recipe's model section: encoder, input mode, stacking.
        progress: called with one line a folder; None is silent.

    Returns:
        Whether anything was done: a folder already encoded the same way is left as it is.

    Raises:
        DataError: the folder cannot be read.
        MissingModelError: the encoder is not there.
    """
    say: Progress = progress or (lambda line: None)
    identity = encoding_identity(model)
    if read_json(folder / RECORD) == identity:
        say(f"{folder.name}: already encoded")
        return False
    encoder = QuestionEncoder(model)
    samples = 0

    def encoded() -> Iterator[dict[str, Any]]:
        nonlocal samples
        waiting: list[dict[str, Any]] = []
        for sample in read_samples(folder):
            waiting.append(sample)
            if len(waiting) == PER_SHARD:
                yield from flush(waiting)
                waiting = []
        yield from flush(waiting)

    def flush(group: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        nonlocal samples
        features = encoder([read_audio(sample["question.flac"]) for sample in group])
        samples += len(group)
        cut = f", {encoder.cut} cut at max_audio_s" if encoder.cut else ""
        say(f"{folder.name}: {samples} questions encoded{cut}")
        for sample, row in zip(group, features, strict=True):
            yield {**sample, ENCODED: pack(row)}

    rewrite(folder, encoded())
    write_json(folder / RECORD, identity)
    return True


def encode_sources(recipe: Recipe, progress: Progress | None = None) -> None:
    """Encode every folder that a recipe trains or validates on, see `encode_folder`."""
    for path in dict.fromkeys(source.path for source in (*recipe.data.train, *recipe.data.valid)):
        encode_folder(resolve_data(path), recipe.model, progress)
