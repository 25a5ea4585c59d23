"""Synthesises speech for the demo: one Piper voice for answers, variations for questions, the same on every build."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from echox.audio.io import SAMPLE_RATE, resample
from echox.errors import MissingModelError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from piper import PiperVoice

    Waveform = NDArray[np.float32]

CHUNK = 128
"""Sentences a session speaks before it is seeded again: the noise depends on the chunk, not on threads."""


@dataclass(frozen=True, kw_only=True)
class Rendering:
    """How Piper is asked to speak.

    Attributes:
        length_scale: slowness, 1 is the voice's own pace.
        noise_scale: variation of the sound.
        noise_w_scale: variation of the phoneme durations.
    """

    length_scale: float = 1.0
    noise_scale: float = 0.0
    noise_w_scale: float = 0.0

    @property
    def is_steady(self) -> bool:
        """Whether a sentence always sounds the same, whatever was spoken before it."""
        return self.noise_scale == 0 and self.noise_w_scale == 0


@dataclass(frozen=True, kw_only=True)
class Voice:
    """A rendering and what is done to the waveform after it, which costs next to nothing.

    Attributes:
        name: written into each sample.
        rendering: how Piper speaks.
        pitch: resampling factor, above 1 is higher and faster.
        tilt: spectral tilt: y[n] = x[n] + tilt * x[n-1]; positive is duller, negative is thinner.
        gain_db: loudness change.
        noise_db: level of added white noise relative to full scale; None adds none.
    """

    name: str
    rendering: Rendering = Rendering()
    pitch: float = 1.0
    tilt: float = 0.0
    gain_db: float = 0.0
    noise_db: float | None = None


ANSWER_VOICE = Voice(name="answer")
"""The one voice of all answers: no randomness, so that equal words sound the same."""

_EVEN = Rendering(noise_scale=0.5, noise_w_scale=0.6)
_SLOW = Rendering(length_scale=1.12, noise_scale=0.667, noise_w_scale=0.8)

TRAIN_RENDERINGS: tuple[tuple[Voice, ...], ...] = (
    (
        Voice(name="even", rendering=_EVEN),
        Voice(name="even-deep", rendering=_EVEN, pitch=0.88, tilt=0.25),
        Voice(name="even-bright", rendering=_EVEN, pitch=1.05, tilt=-0.35, gain_db=-6),
        Voice(name="even-high", rendering=_EVEN, pitch=1.12, gain_db=-3, noise_db=-55),
    ),
    (
        Voice(name="slow", rendering=_SLOW),
        Voice(name="slow-deep", rendering=_SLOW, pitch=0.92, gain_db=-8, noise_db=-60),
        Voice(name="slow-dull", rendering=_SLOW, pitch=0.97, tilt=0.45),
        Voice(name="slow-high", rendering=_SLOW, pitch=1.12, tilt=-0.2, gain_db=-4),
    ),
)
"""The eight voices of training questions, grouped by rendering: one rendering serves several voices."""

HELDOUT_VOICES: tuple[Voice, ...] = (
    Voice(
        name="quick-heldout",
        rendering=Rendering(length_scale=0.9, noise_scale=0.6, noise_w_scale=0.7),
        pitch=1.02,
        tilt=0.3,
        gain_db=-5,
    ),
    Voice(
        name="calm-heldout",
        rendering=Rendering(length_scale=1.05, noise_scale=0.3, noise_w_scale=0.9),
        pitch=0.95,
        tilt=-0.3,
        noise_db=-58,
    ),
)
"""Two voices never heard in training."""


@dataclass(frozen=True, kw_only=True)
class Utterance:
    """One sentence and the voices it is wanted in; they share a rendering, so Piper speaks it once."""

    text: str
    voices: tuple[Voice, ...]

    def __post_init__(self) -> None:
        if len({voice.rendering for voice in self.voices}) != 1:
            raise ValueError(f"the voices of {self.text!r} need one rendering in common")


def vary(spoken: Waveform, rate: float, voice: Voice, seed: int) -> Waveform:
    """Apply a voice's changes to a rendering.

    Args:
        spoken: float32 [samples] as Piper made it.
        rate: its samples a second.
        voice: the changes.
        seed: of the added noise.

    Returns:
        float32 [samples] at 16 kHz, peak at most 0.95 before the gain.
    """
    samples = resample(spoken, rate * voice.pitch)
    if voice.tilt:
        delayed = np.concatenate([samples[:1], samples[:-1]])
        samples = np.asarray(samples + voice.tilt * delayed, dtype=np.float32)
    peak = float(np.abs(samples).max())
    samples = samples * np.float32((0.95 / peak if peak > 0.95 else 1.0) * 10 ** (voice.gain_db / 20))
    if voice.noise_db is not None:
        noise = np.random.default_rng(seed).standard_normal(len(samples), dtype=np.float32)
        samples = samples + np.float32(10 ** (voice.noise_db / 20)) * noise
    return np.asarray(np.clip(samples, -1.0, 1.0), dtype=np.float32)


class Speaker:
    """Piper with a seeded, single-threaded session a chunk, several chunks at a time; a context that ends its threads.

    Sentences of a voice without randomness are spoken once and remembered, as a corpus wants some in several sets.

    Args:
        folder: holds `NAME.onnx` and `NAME.onnx.json`.
        threads: chunks at a time; None takes the processors this process may use.

    Raises:
        MissingModelError: no voice in the folder.
    """

    def __init__(self, folder: Path, threads: int | None = None) -> None:
        from piper.config import PiperConfig

        models = sorted(folder.glob("*.onnx"))
        if not models:
            raise MissingModelError(f"No Piper voice in {folder}", where=str(folder), fix="Fetch the demo models.")
        self.model = models[0]
        self.config = PiperConfig.from_dict(json.loads(Path(f"{self.model}.json").read_text(encoding="utf-8")))
        self._pool = ThreadPoolExecutor(threads or len(os.sched_getaffinity(0)), thread_name_prefix="piper")
        # onnxruntime's seed and espeak's phonemiser are each one a process.
        self._seeding = threading.Lock()
        self._phonemising = threading.Lock()
        self._spoken: dict[tuple[str, Rendering], Waveform] = {}
        self._left = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._left = True
        self._pool.shutdown(cancel_futures=True)

    def _session(self, seed: int) -> PiperVoice:
        import onnxruntime
        from piper import PiperVoice

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        with self._seeding:
            # A session takes its random generators' seeds while it is made.
            onnxruntime.set_seed(seed)
            session = onnxruntime.InferenceSession(
                str(self.model), sess_options=options, providers=["CPUExecutionProvider"]
            )
        return PiperVoice(config=self.config, session=session, download_dir=self.model.parent)

    def _say(self, piper: PiperVoice, text: str, rendering: Rendering) -> Waveform:
        from piper import SynthesisConfig

        settings = SynthesisConfig(
            length_scale=rendering.length_scale,
            noise_scale=rendering.noise_scale,
            noise_w_scale=rendering.noise_w_scale,
            normalize_audio=False,
        )
        with self._phonemising:
            sentences = piper.phonemize(text)
        parts: list[Any] = []
        for phonemes in sentences:
            audio: Any = piper.phoneme_ids_to_audio(piper.phonemes_to_ids(phonemes), settings)
            parts.append(audio[0] if isinstance(audio, tuple) else audio)
        return np.asarray(np.concatenate(parts), dtype=np.float32).reshape(-1)

    def _chunk(self, index: int, utterances: Sequence[Utterance]) -> list[list[Waveform]]:
        piper = self._session(seed=1 + index)
        # A sentence left unsaid would shift the noise of those after it.
        steady = all(utterance.voices[0].rendering.is_steady for utterance in utterances)
        spoken: list[list[Waveform]] = []
        for position, utterance in enumerate(utterances):
            if self._left:
                raise CancelledError
            what = utterance.text, utterance.voices[0].rendering
            known = self._spoken.get(what) if steady else None
            samples = self._say(piper, *what) if known is None else known
            if steady:
                self._spoken[what] = samples
            seed = index * CHUNK + position
            spoken.append([vary(samples, self.config.sample_rate, voice, seed) for voice in utterance.voices])
        return spoken

    def speak(
        self, utterances: Sequence[Utterance], progress: Callable[[int, int], None] | None = None
    ) -> Iterator[list[Waveform]]:
        """Speak sentences. They are begun with the call, after those of earlier calls, and not when they are asked for.

        Args:
            utterances: what to say; the samples depend on this list alone.
            progress: called with (sentences done, sentences in all) after each chunk that was taken.

        Returns:
            For each utterance, in order, one waveform a voice: float32 [samples], 16 kHz.
        """
        chunks = [utterances[start : start + CHUNK] for start in range(0, len(utterances), CHUNK)]
        return self._in_order(self._pool.map(self._chunk, range(len(chunks)), chunks), len(utterances), progress)

    @staticmethod
    def _in_order(
        chunks: Iterator[list[list[Waveform]]], total: int, progress: Callable[[int, int], None] | None
    ) -> Iterator[list[Waveform]]:
        done = 0
        for spoken in chunks:
            yield from spoken
            done += len(spoken)
            if progress is not None:
                progress(done, total)


def seconds(samples: Waveform) -> float:
    """Length of a waveform at 16 kHz, seconds."""
    return round(len(samples) / SAMPLE_RATE, 3)
