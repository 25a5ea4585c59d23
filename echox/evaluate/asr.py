"""Transcribes what a model says with the judge, a Whisper in ONNX form that is not the one in the loop.

The folder has the layout in which hubs publish Whisper for onnxruntime: `onnx/encoder_model*.onnx`,
`onnx/decoder_model_merged*.onnx`, `tokenizer.json`, `generation_config.json` and `preprocessor_config.json`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from echox.config.languages import ENGLISH
from echox.errors import MissingModelError
from echox.evaluate.onnx import open_session

if TYPE_CHECKING:
    import onnxruntime
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

_RATE = 16_000
_FULL_S = 30.0
_FRAMES_PER_S = 50
MARGIN_S = 1.0
"""Silence a clip must have inside its window; with less, Whisper is inclined to go on after the end."""
WINDOWS_S = (4.0, 6.0, 10.0, _FULL_S)
"""Windows the encoder reads; a clip takes the smallest that leaves the margin."""
TOKENS_PER_S, TOKENS_PER_S_ELSEWHERE = 8, 40
"""Most text tokens for a second of sound, for runaway repetition has no end. English has four at most; of Burmese or
Georgian a letter is up to three, thirteen letters a second."""
BATCH = 8
"""Most clips at once; fewer in long windows, whose attention maps the exported graph all keeps."""
_BATCH_S2 = 800.0


class Judge:
    """Greedy transcription in batches, of English unless another language or none is named.

    Whisper reads windows of 30 s, of which a short answer leaves nine tenths silent. Its position table can be cut to
    a shorter window without touching any weight; the features of the sound are those of the 30-s input, cut.

    Args:
        folder: model folder.
        threads: CPU threads; default: all.
        windows_s: windows to choose from, seconds; (30,) for Whisper's own input only.
        language: what is spoken, as Whisper names it ("en"); None lets a multilingual model decide for each clip.

    Raises:
        MissingModelError: the model does not know the language.
    """

    def __init__(
        self,
        folder: Path,
        threads: int | None = None,
        windows_s: Sequence[float] = WINDOWS_S,
        language: str | None = ENGLISH,
    ) -> None:
        from tokenizers import Tokenizer

        self._folder = folder
        self._threads = threads or os.cpu_count() or 1
        self._encoder_path = _one(folder, "encoder_model")
        self._decoder = open_session(_one(folder, "decoder_model_merged"), self._threads)
        self._past = [item for item in self._decoder.get_inputs() if item.name.startswith("past_key_values.")]
        # Attention maps, where the export has them, are not asked for: they cost more than the rest.
        names = [item.name for item in self._decoder.get_outputs()]
        self._outputs = ["logits", *(name for name in names if name.startswith("present."))]
        self._windows_s = sorted({min(window, _FULL_S) for window in windows_s} | {_FULL_S})
        self._encoders: dict[float, onnxruntime.InferenceSession] = {}
        # Sessions read replaced tensors where they lie; their memory must outlive the session.
        self._tables: list[onnxruntime.OrtValue] = []
        self._tokenizer = Tokenizer.from_file(str(_existing(folder / "tokenizer.json")))
        generation = json.loads(_existing(folder / "generation_config.json").read_text())
        self._end = int(generation["eos_token_id"])
        self._suppress = np.array(generation.get("suppress_tokens") or [], dtype=np.int64)
        self._suppress_first = np.array(generation.get("begin_suppress_tokens") or [], dtype=np.int64)
        spoken = f"<|{language or ENGLISH}|>"  # in the place of the language that is found
        prompt_names = ("<|startoftranscript|>", spoken, "<|transcribe|>", "<|notimestamps|>")
        prompt = [self._tokenizer.token_to_id(name) for name in prompt_names]
        self._english: int | None = self._tokenizer.token_to_id("<|en|>")
        if prompt[1] is None and (self._english is not None or language not in (None, ENGLISH)):
            fix = "name a multilingual Whisper as the judge, and a language by its code, such as de"
            raise MissingModelError(f"the judge does not know the language {language!r}", where=str(folder), fix=fix)
        # English-only models have no language and task tokens.
        self._prompt = np.array([token for token in prompt if token is not None], dtype=np.int64)
        known = () if language or prompt[1] is None else (generation.get("lang_to_id") or {}).values()
        self._languages = np.array(sorted(known), dtype=np.int64)
        self._features = _feature_extractor(folder)

    @classmethod
    def load(cls, folder: str | Path, threads: int | None = None, language: str | None = ENGLISH) -> Judge:
        """Open a model folder.

        Raises:
            MissingModelError: a file of it is absent, or it does not know the language.
        """
        return cls(Path(folder), threads, language=language)

    def transcribe(self, audio: Sequence[Floats], progress: Callable[[int, int], None] | None = None) -> list[str]:
        """Text of each clip; an empty clip has none, one longer than 30 s is heard in pieces.

        Args:
            audio: 16 kHz mono; [samples] each.
            progress: called with pieces done and pieces in all.
        """
        limit = int(_FULL_S * _RATE)
        pieces = [
            (owner, clip[at : at + limit]) for owner, clip in enumerate(audio) for at in range(0, len(clip), limit)
        ]
        heard = self._transcribe([piece for _, piece in pieces], progress)
        texts: list[list[str]] = [[] for _ in audio]
        for (owner, _), text in zip(pieces, heard, strict=True):
            texts[owner].append(text)
        return [" ".join(filter(None, parts)) for parts in texts]

    def _transcribe(self, clips: Sequence[Floats], progress: Callable[[int, int], None] | None) -> list[str]:
        texts = [""] * len(clips)
        order = sorted(range(len(clips)), key=lambda index: len(clips[index]))
        done = 0
        while order:
            window = self._window(len(clips[order[0]]))
            most = max(1, min(BATCH, int(_BATCH_S2 / window**2)))
            batch = [index for index in order[:most] if self._window(len(clips[index])) == window]
            order = order[len(batch) :]
            heard = self._batch([clips[index] for index in batch], window)
            for index, text in zip(batch, heard, strict=True):
                if text is None:
                    # A short window now and then sets off a repetition that the full one does not.
                    (text,) = self._batch([clips[index]], _FULL_S, keep_unended=True)
                texts[index] = text or ""
            done += len(batch)
            if progress is not None:
                progress(done, len(clips))
        return texts

    def _window(self, samples: int) -> float:
        fitting = (window for window in self._windows_s if window >= samples / _RATE + MARGIN_S)
        return next(fitting, _FULL_S)

    def _batch(self, clips: Sequence[Floats], window: float, keep_unended: bool = False) -> list[str | None]:
        """Texts of clips in one window; None for one that did not come to an end by itself."""
        mel_BMT = self._features(list(clips))[:, :, : round(window * 2 * _FRAMES_PER_S)]
        (hidden_BTD,) = self._encoder(window).run(["last_hidden_state"], {"input_features": mel_BMT})
        prompt_BN = self._prompts(hidden_BTD)
        in_english = self._english is None or bool((prompt_BN[:, 1] == self._english).all())
        tokens_per_s = TOKENS_PER_S if in_english else TOKENS_PER_S_ELSEWHERE
        limit = min(int(max(len(clip) for clip in clips) / _RATE * tokens_per_s) + 8, 440)
        rows, ended_B = self._greedy(hidden_BTD, prompt_BN, limit)
        return [
            self._tokenizer.decode(row, skip_special_tokens=True).strip() if ended or keep_unended else None
            for row, ended in zip(rows, ended_B.tolist(), strict=True)
        ]

    def _encoder(self, window: float) -> onnxruntime.InferenceSession:
        import onnxruntime

        if window not in self._encoders:
            replaced: dict[str, onnxruntime.OrtValue] = {}
            if window < _FULL_S:
                table_TD = _position_table(self._encoder_path)[: round(window * _FRAMES_PER_S)]
                replaced[_POSITIONS] = onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(table_TD))
                self._tables += replaced.values()
            self._encoders[window] = open_session(self._encoder_path, self._threads, replaced)
        return self._encoders[window]

    def _greedy(
        self, hidden_BTD: Floats, prompt_BN: NDArray[np.int64], limit: int
    ) -> tuple[list[list[int]], NDArray[np.bool_]]:
        """Most probable token at each step, with a key-value cache, until every row has ended; and which have."""
        batch = len(hidden_BTD)
        past = self._no_past(batch)
        tokens_BN = prompt_BN
        rows: list[list[int]] = [[] for _ in range(batch)]
        ended_B = np.zeros(batch, dtype=bool)
        for step in range(limit):
            feed = {
                "input_ids": tokens_BN,
                "encoder_hidden_states": hidden_BTD,
                "use_cache_branch": np.array([step > 0]),
            }
            logits_BNV, *present = self._decoder.run(self._outputs, {**feed, **past})
            for name, value in zip(self._outputs[1:], present, strict=True):
                # The cross-attention cache is written by the first step and read by all others.
                if step == 0 or ".decoder." in name:
                    past[name.replace("present.", "past_key_values.")] = value
            logits_BV = logits_BNV[:, -1]
            logits_BV[:, self._suppress] = -np.inf
            if step == 0:
                logits_BV[:, self._suppress_first] = -np.inf
            next_B = logits_BV.argmax(axis=1)
            ended_B |= next_B == self._end
            if ended_B.all():
                break
            for row, token in enumerate(next_B.tolist()):
                if not ended_B[row]:
                    rows[row].append(token)
            tokens_BN = next_B[:, None]
        return rows, ended_B

    def _prompts(self, hidden_BTD: Floats) -> NDArray[np.int64]:
        """The prompt of each row, with the language most probable after the start where none is given."""
        prompt_BN = np.tile(self._prompt, (len(hidden_BTD), 1))
        if len(self._languages):
            start = {
                "input_ids": prompt_BN[:, :1],
                "encoder_hidden_states": hidden_BTD,
                "use_cache_branch": np.array([False]),
            }
            (logits_B1V,) = self._decoder.run(["logits"], {**start, **self._no_past(len(hidden_BTD))})
            prompt_BN[:, 1] = self._languages[logits_B1V[:, -1, self._languages].argmax(axis=1)]
        return prompt_BN

    def _no_past(self, batch: int) -> dict[str, Floats]:
        return {item.name: np.zeros((batch, item.shape[1], 0, item.shape[3]), np.float32) for item in self._past}


_POSITIONS = "embed_positions.weight"


def _position_table(path: Path) -> Floats:
    """The encoder's position table [1500, D], read from the ONNX file.

    In the protobuf a tensor is its name (field 8), then its raw data (field 9): tag, length as a varint, bytes.
    """
    content = path.read_bytes()
    label = b"B" + bytes([len(_POSITIONS)]) + _POSITIONS.encode() + b"J"
    at = content.find(label)
    if at < 0:
        raise MissingModelError(
            "The encoder has no position table in float32",
            where=str(path),
            fix="Use a Whisper exported for transformers.js, for example Xenova/whisper-small.",
        )
    at += len(label)
    size = shift = 0
    while True:
        byte = content[at]
        size |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            break
    table = np.frombuffer(content, dtype="<f4", count=size // 4, offset=at)
    return table.reshape(round(_FULL_S * _FRAMES_PER_S), -1)


def _feature_extractor(folder: Path) -> Callable[[list[Floats]], Floats]:
    """Whisper's log-mel of clips padded to 30 s; [B, mels, 3000]."""
    import torch

    from echox.audio.features import LogMel

    mels = int(json.loads(_existing(folder / "preprocessor_config.json").read_text())["feature_size"])
    log_mel = LogMel(mels, input_mode="pad_30s")

    def features(clips: list[Floats]) -> Floats:
        audio_BN = torch.zeros(len(clips), max(len(clip) for clip in clips))
        for row, clip in enumerate(clips):
            audio_BN[row, : len(clip)] = torch.from_numpy(np.ascontiguousarray(clip, dtype=np.float32))
        mel_BMT, _ = log_mel(audio_BN, torch.tensor([len(clip) for clip in clips]))
        result: Any = mel_BMT.numpy()
        return result  # type: ignore[no-any-return]

    return features


def _one(folder: Path, stem: str) -> Path:
    found = sorted((folder / "onnx").glob(f"{stem}*.onnx"))
    if not found:
        raise _missing(folder / "onnx" / f"{stem}.onnx")
    # The smallest: quantised before full precision, where a folder has both.
    return min(found, key=lambda path: path.stat().st_size)


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise _missing(path)
    return path


def _missing(path: Path) -> MissingModelError:
    return MissingModelError(
        "The judge's folder is incomplete", where=str(path), fix="Fetch it with `make demo`, or name another folder."
    )
