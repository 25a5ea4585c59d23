"""Vocoders on units that come in pieces: the samples are those of the whole, one by one, at every size of piece."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from echox.errors import DataError
from echox.speak.blocks import Blocks
from echox.speak.phase import GROUP, LOOK_AHEAD, MOMENTUM, PhaseStream
from echox.speak.unit_mel import HOP
from echox.speak.unit_mel_stream import FRAMES, UNITS, UnitMelStream
from echox.speak.vocoder import CodeHifiGan, UnitMelVocoder, Vocoder, sees_frames
from tests.speak import voices

Units = NDArray[np.uint16]


@pytest.fixture(scope="module")
def unit_mel() -> UnitMelVocoder:
    return voices.unit_mel(20)


@pytest.fixture(scope="module")
def hifi_gan(tmp_path_factory: pytest.TempPathFactory) -> CodeHifiGan:
    return CodeHifiGan.load(voices.write_hifi_gan(tmp_path_factory.mktemp("hifi_gan")))


@pytest.fixture(params=["unit_mel", "hifi_gan"])
def vocoder(request: pytest.FixtureRequest) -> Vocoder:
    made: Vocoder = request.getfixturevalue(request.param)
    return made


def units_of(size: int, seed: int = 0) -> Units:
    return np.random.default_rng(seed).integers(0, 20, size).astype(np.uint16)


def spoken(vocoder: Vocoder, pieces: list[Units]) -> NDArray[np.float32]:
    stream = vocoder.stream()
    return np.concatenate([*(stream.push(piece) for piece in pieces), stream.close()])


def in_pieces(units: Units, size: int) -> list[Units]:
    return [units[start : start + size] for start in range(0, len(units), size)]


@pytest.mark.parametrize("length", [1, UNITS - 1, UNITS, 41])
def test_every_size_of_piece_gives_the_same_samples(vocoder: Vocoder, length: int) -> None:
    units = units_of(length, seed=length)
    (whole,) = vocoder([units])
    assert whole.dtype == np.float32 and len(whole) >= 320 * length
    for size in range(1, length + 1) if length < 9 else (1, 2, 3, 7, 8, 9, 16, 25, 40, 41):
        assert np.array_equal(spoken(vocoder, in_pieces(units, size)), whole), size
    chance = random.Random(length)
    cuts = sorted(chance.randint(0, length) for _ in range(6))
    uneven = [units[first:last] for first, last in zip([0, *cuts], [*cuts, length], strict=True)]
    assert np.array_equal(spoken(vocoder, uneven), whole)


def test_nothing_is_said_of_no_units(vocoder: Vocoder) -> None:
    none = np.zeros(0, np.uint16)
    assert len(spoken(vocoder, [])) == len(spoken(vocoder, [none])) == len(vocoder([none])[0]) == 0


def test_samples_come_long_before_the_last_unit(vocoder: Vocoder) -> None:
    units, stream = units_of(200, seed=1), vocoder.stream()
    heard = [len(stream.push(unit)) for unit in in_pieces(units, 1)]
    assert next(place for place, samples in enumerate(heard) if samples) < 40
    assert sum(heard) > 0.7 * len(vocoder([units])[0])


def test_an_unknown_unit_is_refused_and_the_stream_goes_on(vocoder: Vocoder) -> None:
    units, stream = units_of(30), vocoder.stream()
    first = stream.push(units[:10])
    with pytest.raises(DataError, match="Unit 20 is unknown to a vocoder of 20 units"):
        stream.push(np.array([3, 20], np.uint16))
    assert np.array_equal(np.concatenate([first, stream.push(units[10:]), stream.close()]), vocoder([units])[0])


def test_blocks_give_the_durations_and_the_mel_of_the_whole(unit_mel: UnitMelVocoder) -> None:
    model, units = unit_mel.model, units_of(60, seed=2)
    stream, mel, frames = UnitMelStream(model), [], []
    stream._mel.push = lambda mel_TM: (mel.append(mel_TM), np.zeros(0, np.float32))[1]  # type: ignore[method-assign]
    given = stream.push_frames
    stream.push_frames = lambda each: (frames.append(each), given(each))[1]  # type: ignore[method-assign]
    stream.push(units)
    stream.close()
    durations = model.durations(units)
    assert len(set(durations.tolist())) >= 4, "durations differ"
    assert np.concatenate(frames).tolist() == np.repeat(units, durations).tolist()
    torch.testing.assert_close(torch.cat(mel), model.spectrum(units, durations), rtol=0, atol=1e-5)
    assert len(mel) > 5 and len(mel[0]) == 2 * FRAMES


def test_given_durations_are_kept(vocoder: Vocoder) -> None:
    units = units_of(12)
    durations = np.arange(1, 13).astype(np.uint16)
    (wave,) = vocoder([units], [durations])
    assert len(wave) == 320 * durations.sum()


def test_blocks_of_frames_sound_as_the_whole(hifi_gan: CodeHifiGan) -> None:
    units = units_of(150, seed=3)
    (wave,) = hifi_gan([units], [np.ones(150, np.uint16)])
    with torch.no_grad():
        embedded = hifi_gan.model.unit_embedding(torch.from_numpy(units.astype(np.int64))[None]).transpose(1, 2)
        whole = hifi_gan.model.hifi_gan(embedded).reshape(-1).numpy()
    np.testing.assert_allclose(wave, whole, atol=1e-5)


def test_no_sample_depends_on_frames_further_away_than_is_said(hifi_gan: CodeHifiGan) -> None:
    model, reach = hifi_gan.model, sees_frames(hifi_gan.model.config)
    frames_1DT = torch.randn(1, 16, 4 * reach, requires_grad=True)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    middle = 2 * reach
    wave = model.hifi_gan(frames_1DT).reshape(-1)
    wave[320 * middle : 320 * (middle + 1)].square().sum().backward()
    assert frames_1DT.grad is not None
    (seen,) = frames_1DT.grad[0].abs().sum(0).nonzero(as_tuple=True)
    assert middle - reach <= int(seen.min()) and int(seen.max()) <= middle + reach
    assert reach <= middle - int(seen.min()) + 3, "it waits for little more than it needs"


def test_a_vocoder_sees_as_many_units_as_it_says(unit_mel: UnitMelVocoder) -> None:
    model = unit_mel.model
    assert model.sees_units == 4
    logits = model.duration_logits(torch.from_numpy(units_of(40).astype(np.int64))[None], torch.tensor([40]))
    model.units.weight.grad = None
    changed = units_of(40).astype(np.int64)
    changed[20] = (changed[20] + 1) % 20
    other = model.duration_logits(torch.from_numpy(changed)[None], torch.tensor([40]))
    (differ,) = (logits[0] != other[0]).any(-1).nonzero(as_tuple=True)
    assert int(differ.min()) == 16 and int(differ.max()) == 24


def test_a_sine_keeps_its_pitch_and_size_across_groups() -> None:
    rate, frames = 16_000, 4 * (GROUP + LOOK_AHEAD)
    time = torch.arange(frames * HOP) / rate
    sine = 0.5 * torch.sin(2 * torch.pi * 440 * time)
    window = torch.hann_window(640)
    padded = torch.nn.functional.pad(sine, (320, 320))
    spectrum = torch.fft.rfft(padded.unfold(0, 640, HOP) * window, 1024).abs()

    def found(size: int) -> NDArray[np.float32]:
        stream = PhaseStream(window, 1024, HOP)
        pieces = [stream.push(spectrum[start : start + size]) for start in range(0, len(spectrum), size)]
        return np.concatenate([*pieces, stream.close()])

    wave = found(5)
    assert all(np.array_equal(found(size), wave) for size in (1, GROUP, len(spectrum))), "at every size of piece"
    wave = wave[: len(sine)]
    again = torch.fft.rfft(
        torch.nn.functional.pad(torch.from_numpy(wave), (320, 320)).unfold(0, 640, HOP) * window, 1024
    )
    error = (again.abs() - spectrum)[2:-2].norm() / spectrum[2:-2].norm()
    assert float(error) < 0.1
    loudness = [float(np.abs(wave[start : start + 320]).max()) for start in range(640, len(wave) - 640, 320)]
    assert min(loudness) > 0.4 and max(loudness) < 0.6


def test_rounds_are_those_of_griffin_and_lim() -> None:
    torch.manual_seed(0)
    window, seen_TF = torch.hann_window(640), torch.rand(6, 513)
    begun_TF = torch.polar(seen_TF, 6 * torch.rand(6, 513))
    held_L, scale_L = torch.randn(640 + 5 * HOP), 1 + torch.rand(640 + 5 * HOP)
    found = PhaseStream(window, 1024, HOP, iterations=3)._iterated(begun_TF, seen_TF, held_L, scale_L)
    spectrum, before = begun_TF, torch.zeros(6, 513)
    for _ in range(3):
        wave = held_L.clone()
        for frame, row in enumerate(spectrum):
            wave[frame * HOP : frame * HOP + 640] += torch.fft.irfft(row, 1024)[:640] * window
        frames = [(wave * scale_L)[frame * HOP : frame * HOP + 640] * window for frame in range(6)]
        now = torch.fft.rfft(torch.stack(frames), 1024)
        ahead = now - before * (MOMENTUM / (1 + MOMENTUM))
        spectrum, before = torch.polar(seen_TF, ahead.angle()), now
    torch.testing.assert_close(found, spectrum, rtol=0, atol=1e-4)


def test_blocks_have_their_neighbours_and_begin_at_fixed_places() -> None:
    chance = random.Random(0)
    for _ in range(200):
        size, around, length = chance.randint(1, 5), chance.randint(0, 7), chance.randint(0, 23)
        blocks, left, found = Blocks(size, around), list(range(length)), []
        while left:
            count = chance.randint(1, 6)
            for block in blocks.push(np.array(left[:count])):
                assert len(block.items) - block.own.stop == around, "a block waits for its neighbours"
                found.append(block)
            left = left[count:]
        found += list(blocks.close())
        starts = range(0, length, size)
        expected = [list(range(max(0, start - around), min(length, start + size + around))) for start in starts]
        assert [block.items.tolist() for block in found] == expected
        own = [block.items[block.own].tolist() for block in found]
        assert own == [list(range(start, min(length, start + size))) for start in starts]
