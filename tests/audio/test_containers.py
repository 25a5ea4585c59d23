"""Files whose headers know less than their frames: joined, cut and streamed ones, against the samples they hold."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
import soundfile

from echox.audio.containers import is_bare_flac, is_cut, pieces
from echox.audio.io import header_seconds, read_audio

RATE = 16_000
QUIET_S = 3.0


@pytest.fixture(scope="module")
def samples() -> np.ndarray:
    """Three quiet seconds, then three loud ones: a bit rate that varies, so that guesses from the start are wrong."""
    time = np.arange(int(2 * QUIET_S * RATE)) / RATE
    noise = np.random.default_rng(0).standard_normal(len(time))
    return np.where(time < QUIET_S, 0.003, 0.3 + 0.1 * noise).astype(np.float32) * np.sin(2 * np.pi * 220 * time)


def encoded(samples: np.ndarray, kind: str, subtype: str, **more: str) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples.astype(np.float32), RATE, format=kind, subtype=subtype, **more)
    return buffer.getvalue()


def without_first_frame(mp3: bytes) -> bytes:
    """As a stream has it: libsndfile writes a frame first that tells the length."""
    sync = mp3[:2]
    return mp3[mp3.index(sync, 4) :]


def seconds(data: bytes) -> float:
    return len(read_audio(data)) / RATE


@pytest.mark.parametrize("mode", ["CONSTANT", "VARIABLE"])
def test_an_mp3_is_read_to_its_end_whatever_its_header_tells(samples: np.ndarray, mode: str) -> None:
    whole = encoded(samples, "MP3", "MPEG_LAYER_III", bitrate_mode=mode)
    assert pieces(whole) == [whole], "its header is right"
    bare = without_first_frame(whole)
    assert seconds(bare) == pytest.approx(6.0, abs=0.1) and header_seconds(bare) == pytest.approx(6.0, abs=0.1)
    assert seconds(whole + whole) == pytest.approx(12.0, abs=0.2)
    tagged = b"ID3\x04\0\0" + bytes([0, 0, 1, 0]) + bytes(128) + bare + b"TAG" + bytes(125)
    assert seconds(tagged) == pytest.approx(6.0, abs=0.1)
    both = read_audio(whole + whole)
    levels = [np.sqrt((part**2).mean()) for part in np.split(both[len(both) - len(samples) + 1000 :][:90_000], 2)]
    assert levels[0] < 0.02 < 0.15 < levels[1], "the second part is quiet and then loud, as it was"


def test_a_bit_rate_that_varies_deceives_libsndfile(samples: np.ndarray) -> None:
    bare = without_first_frame(encoded(samples, "MP3", "MPEG_LAYER_III", bitrate_mode="VARIABLE"))
    assert soundfile.info(io.BytesIO(bare)).duration < 4.0, "what is tested here is still needed"


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_a_chained_ogg_is_read_to_its_end(samples: np.ndarray, subtype: str) -> None:
    one, two = encoded(samples, "OGG", subtype), encoded(samples[::-1][:RATE], "OGG", subtype)
    assert pieces(one) == [one] and not is_cut(one)
    assert pieces(one + two) == [one, two]
    assert np.array_equal(read_audio(one + two), np.concatenate([read_audio(one), read_audio(two)]))
    assert header_seconds(one + two) == pytest.approx(7.0, abs=0.01)


@pytest.mark.parametrize(
    ("kind", "subtype"),
    [("WAV", "PCM_16"), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III")],
)
@pytest.mark.parametrize("share", [0.3, 0.5, 0.9])
def test_what_is_cut_is_known_to_be(samples: np.ndarray, kind: str, subtype: str, share: float) -> None:
    whole = encoded(samples, kind, subtype)
    assert not is_cut(whole)
    assert is_cut(whole[: int(len(whole) * share)])


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_an_ogg_without_its_last_page_is_cut(samples: np.ndarray, subtype: str) -> None:
    whole = encoded(samples, "OGG", subtype)
    without = whole[: whole.rindex(b"OggS")]
    assert is_cut(without) and seconds(without) < 5.9
    assert is_cut(whole + without), "of a chain, too"


def test_sizes_of_a_wav_that_are_not_known_or_a_little_off(samples: np.ndarray) -> None:
    whole = encoded(samples, "WAV", "PCM_16")
    assert whole[36:40] == b"data"
    for riff, size in [
        (0x7FFF_F024, 0x7FFF_F000),
        (0xFFFF_FFFF, 0xFFFF_FFFF),
        (0, 0),
        (len(whole) - 2, len(whole) - 44),
        (len(whole), len(whole) - 44),
        (len(whole) - 8, len(whole) - 40),
    ]:
        odd = whole[:4] + struct.pack("<I", riff) + whole[8:40] + struct.pack("<I", size) + whole[44:]
        assert not is_cut(odd)
        assert np.array_equal(read_audio(odd), read_audio(whole)), (hex(riff), hex(size))


def test_a_flac_with_tags_or_a_picture_is_not_bare() -> None:
    bare = encoded(np.zeros(RATE), "FLAC", "PCM_16")
    assert is_bare_flac(bare)
    buffer = io.BytesIO()
    with soundfile.SoundFile(buffer, "w", RATE, 1, format="FLAC", subtype="PCM_16") as file:
        file.artist = "a person"
        file.write(np.zeros(RATE))
    assert not is_bare_flac(buffer.getvalue())
    picture = bytes([6]) + (100).to_bytes(3, "big") + bytes(100)
    assert not is_bare_flac(bare[:42] + picture + bare[42:])
    assert not is_bare_flac(b"RIFF")


def test_random_bytes_behind_every_magic_are_taken_calmly() -> None:
    random = np.random.default_rng(1)
    for magic in (
        b"OggS",
        b"RIFF",
        b"ID3",
        b"\xff\xfb\x90\x40",
        b"\xff\xf3\x88\xc4",
        b"fLaC",
        b"TAG",
        b"APETAGEX",
        b"",
    ):
        for length in (0, 1, 5, 40, 4000):
            data = magic + random.bytes(length)
            assert b"".join(pieces(data)) is not None and is_cut(data) in (True, False)
            assert is_bare_flac(data) is (False if magic != b"fLaC" else is_bare_flac(data))
