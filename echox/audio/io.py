"""Decodes and encodes audio, to and from 16 kHz mono float32, the only waveform the rest of the project handles."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import soundfile
import soxr

from echox.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Waveform = NDArray[np.float32]

SAMPLE_RATE = 16_000
"""Samples a second of every waveform inside the project."""


def read_audio(source: str | Path | bytes) -> Waveform:
    """Decode, downmix and resample.

    Args:
        source: a file, or the bytes of one (WAV, FLAC, OGG, MP3: whatever libsndfile reads).

    Returns:
        float32 [samples], 16 kHz mono, nominally within -1 and 1.

    Raises:
        DataError: no such file, not audio, no samples in it, or samples that are not finite.
    """
    name = f"{len(source)} bytes of audio" if isinstance(source, bytes) else str(source)
    fix = "Give a file that libsndfile can decode, such as WAV or FLAC."
    try:
        with _in_memory(source) if isinstance(source, bytes) else nullcontext(source) as file:
            samples, rate = soundfile.read(file, dtype="float32", always_2d=True, closefd=False)
    except (soundfile.LibsndfileError, OSError) as error:
        # The whole message of libsndfile names bytes by their address in memory.
        known = error.error_string if isinstance(error, soundfile.LibsndfileError) else str(error)
        reason = known.rstrip(".").splitlines()[0]
        raise DataError(f"Cannot decode {name}: {reason}", where=name, fix=fix) from error
    if len(samples) == 0:
        raise DataError(f"The audio of {name} is empty", where=name, fix="Give a recording with sound in it.")
    mono = samples[:, 0] if samples.shape[1] == 1 else samples.mean(axis=1, dtype=np.float32)
    if not np.isfinite(mono).all():
        raise DataError(f"The audio of {name} has samples that are not finite numbers", where=name, fix=fix)
    return resample(np.ascontiguousarray(mono), rate)


@contextmanager
def _in_memory(content: bytes) -> Iterator[int]:
    """A file descriptor of bytes, which libsndfile reads without Python.

    For each block of a BytesIO it would call back and wait for the interpreter: two threads decode a seventh less.
    """
    descriptor = os.memfd_create("audio")
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(content)
        os.lseek(descriptor, 0, os.SEEK_SET)
        yield descriptor
    finally:
        os.close(descriptor)


def resample(samples: Waveform, rate: float, to_rate: float = SAMPLE_RATE) -> Waveform:
    """Change the sample rate with soxr's high quality filter; the same array when there is nothing to do.

    Args:
        samples: float32 [samples].
        rate: samples a second in.
        to_rate: samples a second out.
    """
    if rate == to_rate:
        return samples
    return np.asarray(soxr.resample(samples, rate, to_rate), dtype=np.float32)


def _pcm16(samples: Waveform) -> NDArray[np.int16]:
    if samples.ndim != 1 or len(samples) == 0:
        raise DataError(f"Expected mono samples, found an array of shape {samples.shape}")
    return (np.clip(samples, -1.0, 32767 / 32768) * 32768.0).round().astype(np.int16)


def write_audio(path: str | Path, samples: Waveform, rate: int = SAMPLE_RATE) -> None:
    """Write 16-bit mono audio, in the format of the file's suffix; values beyond -1 and 1 are clipped."""
    soundfile.write(path, _pcm16(samples), rate, subtype="PCM_16")


def encode_flac(samples: Waveform) -> bytes:
    """FLAC bytes, 16 kHz mono 16-bit: the `question.flac` and `answer.flac` members of the data contract."""
    buffer = io.BytesIO()
    soundfile.write(buffer, _pcm16(samples), SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()
