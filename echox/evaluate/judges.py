"""Opens the judge that is named: a Whisper in ONNX form, or one in transformers' form, as published scores use it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from echox.audio.io import SAMPLE_RATE
from echox.config.languages import ENGLISH
from echox.config.paths import resolve_model
from echox.errors import MissingModelError
from echox.files import sha256_files

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from echox.evaluate.listening import Transcriber

_READ = ("*.json", "*.txt", "*.safetensors", "onnx/*.onnx")


@dataclass(frozen=True)
class NamedJudge:
    """A judge's model folder, not yet opened.

    Attributes:
        name: as it was given, for people.
        folder: where it lies.
    """

    name: str
    folder: Path

    @classmethod
    def find(cls, name: str) -> NamedJudge:
        """A judge by folder, or by its name below the cache's models.

        Raises:
            MissingModelError: there is none.
        """
        return cls(name, resolve_model(name))

    def identity(self) -> dict[str, str]:
        """SHA-256 of every file that decides what it hears."""
        return sha256_files(self.folder, _READ)

    def open(self, language: str | None) -> Transcriber:
        """Load it.

        Args:
            language: what is spoken ("en"); None lets the model decide for each clip.

        Raises:
            MissingModelError: it is incomplete, or no Whisper.
        """
        from echox.evaluate.asr import Judge

        if (self.folder / "onnx").is_dir():
            return Judge.load(self.folder, language=language)
        return TransformersWhisper(self.folder, language)


class TransformersWhisper:
    """Whisper by transformers' pipeline for speech recognition, one clip at a time, with timestamps.

    As UltraEval-Audio calls `openai/whisper-large-v3` (`audio_evals/lib/whisper`): half precision on a GPU, and the
    language not named. One at a time, so that a transcript depends on its clip alone.

    Args:
        folder: `config.json`, weights in safetensors, tokenizer and feature extractor.
        language: what is spoken; None lets the model decide.

    Raises:
        MissingModelError: the folder holds no such model, or one that hears English only and is told otherwise.
    """

    def __init__(self, folder: Path, language: str | None = None) -> None:
        import torch
        from transformers import AutoProcessor, WhisperForConditionalGeneration, pipeline

        from echox.device import best_device

        device = best_device()
        dtype = torch.float32 if device == "cpu" else torch.float16
        try:
            processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
            model = WhisperForConditionalGeneration.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, dtype=dtype
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise MissingModelError(
                f"this is no Whisper: {str(error).splitlines()[0]}",
                where=str(folder),
                fix="name a folder of openai/whisper-large-v3, or of its kind, or one in ONNX form",
            ) from error
        known = getattr(model.generation_config, "lang_to_id", None) or {}
        if language not in (None, ENGLISH) and f"<|{language}|>" not in known:
            fix = "name a multilingual Whisper as the judge, and a language by its code, such as de"
            raise MissingModelError(f"the judge does not know the language {language!r}", where=str(folder), fix=fix)
        # One that hears English only is not to be told so.
        self._options: dict[str, Any] = {} if language is None or not known else {"language": language}
        self._pipe = pipeline(
            "automatic-speech-recognition",
            model=model,
            tokenizer=processor.tokenizer,
            feature_extractor=processor.feature_extractor,
            device=device,
            dtype=dtype,
        )

    def transcribe(self, audio: Sequence[NDArray[np.float32]]) -> list[str]:
        """Text of 16 kHz mono clips; an empty clip has none."""
        return [self._heard(clip) if len(clip) else "" for clip in audio]

    def _heard(self, clip: NDArray[np.float32]) -> str:
        given = {"raw": clip, "sampling_rate": SAMPLE_RATE}
        found: Any = self._pipe(given, return_timestamps=True, generate_kwargs=dict(self._options))
        return str(found["text"]).strip()
