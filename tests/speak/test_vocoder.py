"""The embedded vocoder learns, repeats itself and refuses what it cannot say; the unit HiFi-GAN is transformers'."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from echox.errors import DataError, MissingModelError
from echox.speak.unit_mel import (
    HOP,
    N_MELS,
    RIDGE,
    UnitMel,
    UnitMelConfig,
    count_units,
    log_mel,
    mel_filters,
    neighbours,
    read_clips,
    solve_map,
    spread,
    train_vocoder,
)
from echox.speak.unit_mel_stream import MelStream
from echox.speak.vocoder import CodeHifiGan, UnitMelVocoder, load_vocoder
from echox.units.identity import UnitSetIdentity, read_unit_set, write_unit_set
from tests.speak.voices import write_hifi_gan

RATE = 16_000
PITCHES = (300.0, 700.0, 1500.0, 3100.0)
LASTING = (2, 5, 3, 9)
SMALL = UnitMelConfig(n_units=5, width=32, blocks=1)


def clip(seed: int, length: int = 12) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A voice with one pitch a unit; unit 3 lasts longer after unit 0, so durations need context."""
    random = np.random.default_rng(seed)
    units = [int(random.integers(0, 4))]
    while len(units) < length:
        units.append(int(random.choice([unit for unit in range(4) if unit != units[-1]])))
    durations = [
        LASTING[unit] + 6 * (unit == 3 and place > 0 and units[place - 1] == 0) for place, unit in enumerate(units)
    ]
    pitch = np.repeat([PITCHES[unit] for unit in units], np.array(durations) * 2 * HOP)
    audio = 0.5 * np.sin(2 * np.pi * np.cumsum(pitch) / RATE)
    return np.array(units, np.uint16), np.array(durations, np.uint16), audio.astype(np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("vocoder")
    train_vocoder([clip(seed) for seed in range(30)], place, config=SMALL, steps=150, batch=8, lr=5e-3)
    return place


def loudest(wave: np.ndarray) -> float:
    return float(np.fft.rfftfreq(len(wave), 1 / RATE)[np.abs(np.fft.rfft(wave)).argmax()])


def test_it_says_each_unit_at_its_pitch_and_length(folder: Path) -> None:
    units, durations, _ = clip(99)
    (wave,) = load_vocoder(folder)([units], [durations])
    assert wave.dtype == np.float32 and len(wave) == durations.sum() * 2 * HOP
    ends = np.cumsum(durations.astype(int)) * 2 * HOP
    for unit, lasting, end in zip(units, durations, ends, strict=True):
        if lasting >= 3:
            middle = wave[end - lasting * 2 * HOP + HOP : end - HOP]
            assert loudest(middle) == pytest.approx(PITCHES[unit], rel=0.12)


def test_durations_are_predicted_from_context(folder: Path) -> None:
    model = UnitMel.load(folder)
    errors = [np.abs(model.durations(clip(seed)[0]).astype(int) - clip(seed)[1]) for seed in range(100, 110)]
    assert float(np.concatenate(errors).mean()) < 0.6
    (wave,) = load_vocoder(folder)([clip(100)[0]])
    assert abs(len(wave) / (2 * HOP) - int(clip(100)[1].sum())) <= 4


def test_same_seed_same_vocoder(tmp_path: Path) -> None:
    clips = [clip(seed) for seed in range(4)]
    first, second = (train_vocoder(clips, tmp_path / name, config=SMALL, steps=3, batch=2) for name in ("a", "b"))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    other = train_vocoder(clips, tmp_path / "c", config=SMALL, steps=3, batch=2, seed=1)
    assert not torch.equal(first.head.weight, other.head.weight)


def test_speaking_twice_gives_the_same_samples_and_a_clip_does_not_depend_on_the_others(folder: Path) -> None:
    vocoder = load_vocoder(folder)
    units, other = clip(5)[0], clip(6)[0]
    first, empty, _ = vocoder([units, np.zeros(0, np.uint16), other])
    assert len(empty) == 0
    assert (vocoder([units])[0] == first).all()


def test_padding_and_neighbours_do_not_reach_a_row() -> None:
    torch.manual_seed(0)
    model = UnitMel(UnitMelConfig(n_units=5, width=16, blocks=2)).eval()
    units_BU = torch.randint(0, 5, (2, 9))
    both = model.duration_logits(units_BU, torch.tensor([9, 4]))
    alone = model.duration_logits(units_BU[1:, :4], torch.tensor([4]))
    assert torch.allclose(both[1, :4], alone[0], atol=1e-5)


def test_mel_map_solves_its_normal_equations() -> None:
    random = np.random.default_rng(0)
    frames = [torch.from_numpy(random.integers(0, 4, length)) for length in (40, 25)]
    mels = [torch.from_numpy(random.normal(size=(2 * len(row), N_MELS)).astype(np.float32)) for row in frames]
    weights = solve_map(frames, mels, 4).numpy()
    design = np.zeros((65, 28))
    for row, columns in enumerate(torch.cat([neighbours(part, 4) for part in frames]).tolist()):
        design[row, columns] = 1
    target = torch.cat(mels).reshape(65, -1).numpy()
    stacked = np.concatenate([design, np.sqrt(RIDGE) * np.eye(28)])
    expected = np.linalg.lstsq(stacked, np.concatenate([target, np.zeros((28, 2 * N_MELS))]), rcond=None)[0]
    np.testing.assert_allclose(weights, expected, atol=1e-4)


def test_the_phases_bring_back_the_spectrum() -> None:
    _, durations, audio = clip(3)
    filters_FM = mel_filters()
    frames = int(durations.sum())
    mel_TM = log_mel(audio, frames, filters_FM)
    assert mel_TM.shape == (2 * frames, N_MELS)
    stream = MelStream()
    wave = np.concatenate([stream.push(mel_TM), stream.close()])
    assert len(wave) == len(audio)
    again_TM = log_mel(wave, frames, filters_FM)
    loud = mel_TM > mel_TM.amax() - 4
    assert float((again_TM - mel_TM)[loud].abs().mean()) < 0.35


def test_spread_repeats_units() -> None:
    assert spread(np.array([7, 2], np.uint16), np.array([3, 1], np.uint16)).tolist() == [7, 7, 7, 2]
    with pytest.raises(DataError, match="2 units cannot have 1 durations"):
        spread(np.array([7, 2], np.uint16), np.array([3], np.uint16))


def test_what_it_cannot_say_is_one_sentence(folder: Path, tmp_path: Path) -> None:
    vocoder = load_vocoder(folder)
    with pytest.raises(DataError, match="Unit 5 is unknown to a vocoder of 5"):
        vocoder([np.array([5], np.uint16)])
    with pytest.raises(DataError, match="Durations do not fit"):
        vocoder([np.array([1, 2], np.uint16)], [np.array([1], np.uint16)])
    with pytest.raises(MissingModelError, match="no vocoder"):
        load_vocoder(tmp_path)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(MissingModelError, match="Cannot load the vocoder"):
        load_vocoder(tmp_path)
    with pytest.raises(DataError, match="No clip with units"):
        train_vocoder([], tmp_path)


def test_it_trains_from_a_folder_of_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from echox.audio.io import encode_flac
    from echox.stream.format.writer import write_shards
    from echox.units.kmeans import KMeans

    made = [clip(seed) for seed in range(3)]
    samples = [
        {
            "__key__": f"s{index}",
            "json": {"id": f"s{index}", "task": "tts", "question_s": None, "answer_s": len(audio) / RATE},
            "answer.units": units.astype("<u2").tobytes(),
            "answer.durations": durations.astype("<u2").tobytes(),
            "answer.flac": encode_flac(audio),
        }
        for index, (units, durations, audio) in enumerate(made)
    ]
    write_shards(tmp_path / "tts-train", samples)
    clips = read_clips(tmp_path / "tts-train")
    assert [units.tolist() for units, _, _ in clips] == [units.tolist() for units, _, _ in made]
    assert count_units(tmp_path / "tts-train", clips) == 4
    KMeans(np.zeros((9, 2), np.float32)).save(tmp_path / "units" / "kmeans.npz")
    seen: list[tuple[str, int, int]] = []
    model = train_vocoder(
        tmp_path / "tts-train", tmp_path / "vocoder", steps=2, batch=2,
        progress=lambda *step: seen.append(step),
    )  # fmt: skip
    assert model.config.n_units == 9 and read_unit_set(tmp_path / "vocoder") is None
    units = UnitSetIdentity(features="log_mel", clusters=7, centroids="aa")
    write_unit_set(tmp_path / "tts-train", units)
    model = train_vocoder(tmp_path / "tts-train", tmp_path / "vocoder", steps=1, batch=2)
    assert model.config.n_units == 7 and read_unit_set(tmp_path / "vocoder") == units
    train_vocoder(made, tmp_path / "other", steps=1, batch=2, n_units=7, unit_set=units)
    assert read_unit_set(tmp_path / "other") == units
    # Trained again on units that nobody knows, it does not keep the record of those before.
    train_vocoder(made, tmp_path / "other", steps=1, batch=2, n_units=7)
    assert read_unit_set(tmp_path / "other") is None
    # Killed while it is written, it is of unknown units rather than of those of the one before.
    monkeypatch.setattr(UnitMel, "save", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train_vocoder(made, tmp_path / "vocoder", steps=1, batch=2, n_units=7)
    assert read_unit_set(tmp_path / "vocoder") is None
    assert [step[1:] for step in seen] == [(1, 2), (2, 2)]
    assert isinstance(load_vocoder(tmp_path / "vocoder"), UnitMelVocoder)


@pytest.fixture(scope="module")
def hifi_gan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hifi_gan(tmp_path_factory.mktemp("hifi_gan"))


def test_unit_hifi_gan_makes_320_samples_a_frame_and_agrees_with_transformers(hifi_gan: Path) -> None:
    vocoder = load_vocoder(hifi_gan)
    assert isinstance(vocoder, CodeHifiGan) and vocoder.sample_rate == RATE
    units = np.array([3, 1, 4, 1, 5], np.uint16)
    predicted, empty = vocoder([units, np.zeros(0, np.uint16)])
    assert len(empty) == 0 and len(predicted) % 320 == 0 and len(predicted) >= 5 * 320
    (given,) = vocoder([units], [np.array([2, 1, 3, 1, 1], np.uint16)])
    assert len(given) == 8 * 320
    # transformers' forward repeats units by the predicted durations itself.
    ones = torch.zeros(1, 1, dtype=torch.long)
    with torch.no_grad():
        expected, _ = vocoder.model(torch.from_numpy(units.astype(np.int64))[None], ones, ones)
    np.testing.assert_allclose(predicted, expected.reshape(-1).numpy(), atol=1e-5)


def test_a_damaged_unit_hifi_gan_is_one_sentence(hifi_gan: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((hifi_gan / "config.json").read_text())
    with pytest.raises(MissingModelError, match="unit HiFi-GAN"):
        load_vocoder(tmp_path)
