"""Decodes and encodes audio, to and from 16 kHz mono float32, the only waveform the rest of the project handles."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import soundfile
import soxr

from echox.audio.containers import pieces
from echox.errors import DataError
from echox.files import open_regular

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Waveform = NDArray[np.float32]

SAMPLE_RATE = 16_000
"""Samples a second of every waveform inside the project."""
LONGEST_S = 1800.0
"""No sample of speech is longer; a header may claim anything, and a few bytes of silence decode to gigabytes."""

_RATES = (1_000, 768_000)
_MOST_CHANNELS = 64
_FULL_RATE = 48_000
"""Of a file of a higher rate, fewer seconds are read: memory is bounded by samples."""
_LARGEST = 1 << 30
"""Bytes of a compressed file that are read."""
_WHOLE = (b"RIFF", b"RF64", b"fLaC", b"FORM")
_AROUND_S = 0.1
"""Decoded before and after a part, for the filter that changes its rate."""
_BLOCK = 1 << 21
"""Values decoded at a time, of all channels together."""


def read_audio(
    source: str | Path | bytes,
    longest_s: float = LONGEST_S,
    channel: int | None = None,
    rate: int = SAMPLE_RATE,
) -> Waveform:
    """Decode, downmix and resample.

    Args:
        source: a file, or the bytes of one (WAV, FLAC, OGG, MP3: whatever libsndfile reads).
        longest_s: what is longer is refused, and decoded no further, seconds.
        channel: the one that is wanted, from 0; None is the mean of all.
        rate: samples a second to resample to.

    Returns:
        float32 [samples] at `rate`, mono, nominally within -1 and 1.

    A length that the header does not know, as of a stream that was written into a pipe, is found by decoding; a file
    that was joined of several (see `pieces`) is read to its end.

    Raises:
        DataError: no such file, not audio, no samples in it, more than `longest_s`, some that are not finite, or no
            such channel.
    """
    name = f"{len(source)} bytes of audio" if isinstance(source, bytes) else str(source)
    fix = "Give a file that libsndfile can decode, such as WAV or FLAC."
    found: list[Waveform] = []
    left = longest_s
    try:
        for part in pieces(source) if isinstance(source, bytes) else _parts(Path(source)):
            with _in_memory(part) if isinstance(part, bytes) else open_regular(part) as file:
                mono, own_rate = _decode(file, name, left, longest_s, channel)
            found.append(resample(mono, own_rate, rate))
            left -= len(mono) / own_rate
    except (soundfile.LibsndfileError, OSError) as error:
        # The whole message of libsndfile names bytes by their address in memory.
        known = error.error_string if isinstance(error, soundfile.LibsndfileError) else error.strerror or str(error)
        reason = known.rstrip(".").splitlines()[0]
        raise DataError(f"Cannot decode {name}: {reason}", where=name, fix=fix) from error
    samples = found[0] if len(found) == 1 else np.concatenate(found)
    if len(samples) == 0:
        raise DataError(f"The audio of {name} is empty", where=name, fix="Give a recording with sound in it.")
    if not np.isfinite(samples).all():
        raise DataError(f"The audio of {name} has samples that are not finite numbers", where=name, fix=fix)
    return samples


def read_span(
    path: Path,
    start_s: float,
    seconds: float | None,
    channel: int | None = None,
    longest_s: float = LONGEST_S,
    rate: int = SAMPLE_RATE,
) -> Waveform | None:
    """Decode a part of a long recording, of any length itself, and nothing else of it.

    Args:
        path: a WAV or FLAC file; of others the parts cannot be found without decoding them.
        start_s, seconds: the part; None is to the end, and what is beyond the end is not there.
        channel: the one that is wanted, from 0; None is the mean of all.
        longest_s: no more of it is decoded, seconds.
        rate: samples a second to resample to.

    Returns:
        float32 [samples] at `rate`, mono; None for a file of another format.

    Raises:
        DataError: the file is damaged, or has no such channel.
        OSError: it cannot be opened.
    """
    with open_regular(path) as file:
        if os.pread(file, 4, 0) not in (b"RIFF", b"RF64", b"fLaC"):
            return None
        try:
            with soundfile.SoundFile(file, closefd=False) as opened:
                _check_kind(opened.samplerate, opened.channels, channel, str(path))
                own_rate, around = opened.samplerate, round(_AROUND_S * opened.samplerate)
                first = min(round(start_s * own_rate), opened.frames)
                last = opened.frames if seconds is None else min(round((start_s + seconds) * own_rate), opened.frames)
                before = min(first, around)
                opened.seek(first - before)
                last = max(first, min(last, first + round(longest_s * own_rate)))
                block = opened.read(last - first + before + around, "float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            what = f"Cannot decode a part of {path}: {error.error_string}"
            raise DataError(what, where=str(path), fix="Repair the recording, or leave it out.") from error
    mono = block[:, channel] if channel is not None else block.mean(axis=1, dtype=np.float32)
    begin, samples = round(before * rate / own_rate), round((last - first) * rate / own_rate)
    return resample(np.ascontiguousarray(mono), own_rate, rate)[begin : begin + samples]


def _check_kind(rate: int, channels: int, channel: int | None, name: str) -> None:
    if not (_RATES[0] <= rate <= _RATES[1] and channels <= _MOST_CHANNELS):
        fix = f"Give audio of {_RATES[0]:,} to {_RATES[1]:,} Hz and at most {_MOST_CHANNELS} channels."
        raise DataError(f"The audio of {name} has {channels} channels at {rate} Hz", where=name, fix=fix)
    if channel is not None and channel >= channels:
        fix = "Channels count from 0."
        raise DataError(f"The audio of {name} has no channel {channel}, but {channels}", where=name, fix=fix)


def header_seconds(content: bytes | memoryview) -> float | None:
    """Length of an encoded clip by its header; None where the header does not know, or knows nothing sensible.

    Raises:
        soundfile.LibsndfileError: it is no audio.
    """
    seconds = sum(float(soundfile.info(io.BytesIO(piece)).duration) for piece in pieces(bytes(content)))
    return seconds if seconds <= LONGEST_S else None


def header_rate(content: bytes) -> int:
    """Samples a second of an encoded clip, by its header.

    Raises:
        soundfile.LibsndfileError: it is no audio.
    """
    return int(soundfile.info(io.BytesIO(content)).samplerate)


def sayable(seconds: float) -> int:
    """Characters that can be said in a time: twice what a fast reader says, and some for digits that are read out."""
    return int(50 * seconds) + 50


def _parts(path: Path) -> Sequence[bytes | Path]:
    """A file, as itself where libsndfile reads it to its end whatever its header says; it may be a long one."""
    with open_regular(path) as file:
        whole = os.pread(file, 4, 0)[:4] in _WHOLE
        return [path] if whole else pieces(os.pread(file, _LARGEST, 0))


def _decode(file: int, name: str, left_s: float, longest_s: float, channel: int | None) -> tuple[Waveform, int]:
    """Mono samples at the file's own rate, decoded in blocks, of `longest_s` the last `left_s`; and the rate."""
    with soundfile.SoundFile(file, closefd=False) as opened:
        rate, channels, claimed = opened.samplerate, opened.channels, opened.frames
        _check_kind(rate, channels, channel, name)
        most = int(left_s * min(rate, _FULL_RATE))
        known = claimed <= int(LONGEST_S * min(rate, _FULL_RATE))
        size = max(1, min(claimed, _BLOCK // channels))
        blocks: list[Waveform] = []
        total, more = 0, claimed > 0
        while more:
            block = np.empty((size, channels), np.float32)
            if not known:
                block.fill(np.nan)
            try:
                got = opened.buffer_read_into(block, "float32")
                more = got == size and total + got != claimed
            except soundfile.LibsndfileError:
                if known:
                    raise
                # Of a length that it did not know, libsndfile finds the end to be an error, after the last samples.
                got, more = int(np.isfinite(block[:, 0]).sum()), False
            total += got
            if total > most:
                longest = longest_s * min(rate, _FULL_RATE) / rate
                pieces_of = f"{longest / 60:.0f} minutes" if longest >= 120 else f"{longest:.0f} s"
                fix = f"Cut it into pieces of at most {pieces_of}."
                raise DataError(f"The audio of {name} is longer than {longest:.0f} s", where=name, fix=fix)
            one = 0 if channels == 1 else channel
            mono = block[:got].mean(axis=1, dtype=np.float32) if one is None else block[:got, one]
            blocks.append(np.ascontiguousarray(mono))
    return blocks[0] if len(blocks) == 1 else np.concatenate([*blocks, np.zeros(0, np.float32)]), rate


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


def encode_flac(samples: Waveform, rate: int = SAMPLE_RATE) -> bytes:
    """FLAC bytes, mono 16-bit: the `question.flac` and `answer.flac` members of the data contract."""
    buffer = io.BytesIO()
    soundfile.write(buffer, _pcm16(samples), rate, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


def encode_wav(samples: Waveform) -> bytes:
    """WAV bytes, 16 kHz mono 16-bit, for players."""
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, SAMPLE_RATE, format="WAV", subtype="PCM_16")
    return buffer.getvalue()
