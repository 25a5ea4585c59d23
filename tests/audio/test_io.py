"""Decoding, downmixing and resampling, against scipy."""

from __future__ import annotations

import io
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import soundfile
from scipy.signal import resample_poly

from echox.audio.io import encode_flac, read_audio, resample, write_audio
from echox.errors import DataError


def tone(seconds: float, rate: int, hertz: float = 440.0) -> np.ndarray:
    return (0.4 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def test_stereo_at_44100_hz_becomes_16000_hz_mono(tmp_path: Path) -> None:
    left, right = tone(1.0, 44_100), tone(1.0, 44_100, 1000.0)
    soundfile.write(tmp_path / "a.wav", np.stack([left, right], 1), 44_100, subtype="FLOAT")
    got = read_audio(tmp_path / "a.wav")
    expected = resample_poly((left + right) / 2, 160, 441)
    assert got.dtype == np.float32 and abs(len(got) - 16_000) <= 1
    inner = slice(500, 15_500)
    assert np.abs(got[inner] - expected[inner]).max() < 2e-3


def test_16000_hz_mono_is_untouched(tmp_path: Path) -> None:
    samples = tone(0.3, 16_000)
    soundfile.write(tmp_path / "a.wav", samples, 16_000, subtype="FLOAT")
    assert np.array_equal(read_audio(str(tmp_path / "a.wav")), samples)


def test_five_minutes_are_read(tmp_path: Path) -> None:
    write_audio(tmp_path / "long.wav", np.tile(tone(1.0, 16_000), 300))
    assert len(read_audio(tmp_path / "long.wav")) == 300 * 16_000


def claiming(flac: bytes, samples: int) -> bytes:
    """A FLAC whose STREAMINFO has another number of samples; 0 is unknown, as a stream written into a pipe has it."""
    fields = int.from_bytes(flac[18:26], "big") >> 36 << 36 | samples
    return flac[:18] + fields.to_bytes(8, "big") + flac[26:]


@pytest.mark.parametrize("claimed", [0, 2**36 - 1])
@pytest.mark.parametrize("seconds", [0.3, 2.0, 150.0])
def test_a_length_that_no_header_knows_is_found_by_decoding(claimed: int, seconds: float) -> None:
    samples = tone(seconds, 16_000)
    whole = encode_flac(samples)
    assert np.array_equal(read_audio(claiming(whole, claimed)), read_audio(whole))
    assert len(read_audio(whole)) == len(samples)


def test_stereo_of_unknown_length_is_averaged() -> None:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.stack([tone(80.0, 16_000), tone(80.0, 16_000, 900.0)], 1), 16_000, format="FLAC")
    whole = buffer.getvalue()
    assert np.array_equal(read_audio(claiming(whole, 0)), read_audio(whole)) and len(read_audio(whole)) == 80 * 16_000


def test_a_recording_that_has_less_than_it_claims_is_refused() -> None:
    whole = encode_flac(tone(2.0, 16_000))
    for cut in (claiming(whole, 64_000), whole[: len(whole) // 2]):
        with pytest.raises(DataError, match="Cannot decode"):
            read_audio(cut)


def test_silence_without_end_costs_little_memory_and_is_refused() -> None:
    samples = np.zeros(2000 * 16_000, np.int16)
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, 16_000, format="FLAC", subtype="PCM_16")
    content = buffer.getvalue()
    assert len(content) < 200_000
    for bomb in (content, claiming(content, 2**36 - 1)):
        tracemalloc.start()
        with pytest.raises(DataError, match="longer than 1800 s.*pieces of at most 30 minutes"):
            read_audio(bomb)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1.3 * 4 * 1800 * 16_000


def test_of_a_high_rate_fewer_seconds_are_read(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.zeros(115 * 768_000, np.int16), 768_000, subtype="PCM_16")
    with pytest.raises(DataError, match="longer than 112 s"):
        read_audio(tmp_path / "a.wav")


@pytest.mark.parametrize(("rate", "channels"), [(999, 1), (768_001, 1), (16_000, 65)])
def test_what_no_microphone_makes_is_refused(tmp_path: Path, rate: int, channels: int) -> None:
    soundfile.write(tmp_path / "a.wav", np.zeros((100, channels), np.int16), rate)
    with pytest.raises(DataError, match=f"has {channels} channels at {rate} Hz"):
        read_audio(tmp_path / "a.wav")


def test_flac_bytes_round_trip_to_sixteen_bits_and_clip() -> None:
    samples = np.concatenate([tone(0.2, 16_000), np.array([1.5, -1.5], np.float32)])
    encoded = encode_flac(samples)
    info = soundfile.info(__import__("io").BytesIO(encoded))
    assert (info.format, info.subtype, info.samplerate, info.channels) == ("FLAC", "PCM_16", 16_000, 1)
    got = read_audio(encoded)
    assert np.abs(got[:-2] - samples[:-2]).max() <= 0.5 / 32768 + 1e-7
    assert got[-2] == pytest.approx(1.0, abs=1e-4) and got[-1] == -1.0
    assert encoded == encode_flac(samples)


def test_empty_wav_is_refused_by_name(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "empty.wav", np.zeros(0, np.float32), 16_000)
    with pytest.raises(DataError, match="empty.wav is empty"):
        read_audio(tmp_path / "empty.wav")


@pytest.mark.parametrize("content", [b"", b"not audio at all"])
def test_what_is_not_audio_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.wav").write_bytes(content)
    for source in (tmp_path / "x.wav", content):
        with pytest.raises(DataError, match="Cannot decode"):
            read_audio(source)


def test_missing_file_and_not_finite_samples_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="gone.wav"):
        read_audio(tmp_path / "gone.wav")
    soundfile.write(tmp_path / "nan.wav", np.array([0.0, np.nan], np.float32), 16_000, subtype="FLOAT")
    with pytest.raises(DataError, match="not finite"):
        read_audio(tmp_path / "nan.wav")


def test_resampling_to_16k() -> None:
    wave = np.sin(np.arange(24000) / 24000 * 2 * np.pi * 440).astype(np.float32)
    again = resample(wave, 24000)
    assert len(again) == 16000
    expected = np.sin(np.arange(16000) / 16000 * 2 * np.pi * 440)
    np.testing.assert_allclose(again[500:-500], expected[500:-500], atol=0.01)
