"""Hears units: a vocoder speaks them, an ASR model that is not the one in the loop writes down what it hears, once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from echox.audio.io import resample

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from echox.speak.vocoder import VocoderStream

    Units = NDArray[np.uint16]
    Clip = NDArray[np.float32]

SPOKEN_AT_ONCE = 16
HEARD_AT_ONCE = 64
"""Clips given to the judge together, which sorts them by length and batches them itself."""

Progress = Callable[[int, int], None]


class Transcriber(Protocol):
    """An ASR model that is not the one in the loop."""

    def transcribe(self, audio: list[Clip]) -> list[str]:
        """Text of 16 kHz mono clips."""
        ...


class Speaker(Protocol):
    """A vocoder: units to waveforms."""

    sample_rate: int

    def stream(self) -> VocoderStream:
        """Begin one unit sequence."""
        ...

    def __call__(self, units: Sequence[Units], durations: Sequence[Units] | None = None) -> list[Clip]:
        """Waveforms of unit sequences."""
        ...


def speak(vocoder: Speaker, units: Sequence[Units]) -> list[Clip]:
    """Waveforms of unit sequences, 16 kHz mono."""
    waves: list[Clip] = []
    for start in range(0, len(units), SPOKEN_AT_ONCE):
        spoken = vocoder(units[start : start + SPOKEN_AT_ONCE])
        waves += [resample(wave, vocoder.sample_rate) for wave in spoken]
    return waves


class Listener:
    """A vocoder and a judge, and what they made of each unit sequence: judging is most of the work of an evaluation.

    Args:
        vocoder: speaks.
        judge: transcribes.

    Attributes:
        vocoder, judge: the same.
        judged: unit sequences that the judge was given.
    """

    def __init__(self, vocoder: Speaker, judge: Transcriber) -> None:
        self.judge = judge
        self.judged = 0
        self.vocoder = vocoder
        self._heard: dict[bytes, str] = {}

    def speak(self, units: Sequence[Units]) -> list[Clip]:
        """Waveforms of unit sequences, 16 kHz mono."""
        return speak(self.vocoder, units)

    def hear(self, units: Sequence[Units], progress: Progress | None = None) -> list[str]:
        """The judge's transcript of each unit sequence; equal ones are judged once, by length; silence is empty.

        Args:
            units: unit sequences, any number of them at once.
            progress: called with the distinct sequences judged and those to be judged.
        """
        keys = [_key(each) for each in units]
        new = {key: each for key, each in zip(keys, units, strict=True) if len(each) and key not in self._heard}
        waiting = sorted(new.items(), key=lambda item: len(item[1]))
        for start in range(0, len(waiting), HEARD_AT_ONCE):
            group = waiting[start : start + HEARD_AT_ONCE]
            texts = self.judge.transcribe(self.speak([each for _, each in group]))
            self._heard |= {key: text for (key, _), text in zip(group, texts, strict=True)}
            self.judged += len(group)
            if progress:
                progress(start + len(group), len(waiting))
        return [self._heard.get(key, "") for key in keys]


def _key(units: Units) -> bytes:
    return np.ascontiguousarray(units, dtype="<u2").tobytes()
