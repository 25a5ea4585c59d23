"""DNSMOS: what its networks are given and how their outputs become opinions; the real ones on real recordings."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from echox.audio.io import read_audio
from echox.errors import MissingModelError
from echox.evaluate import quality
from echox.evaluate.listening import Listener
from echox.evaluate.quality import Dnsmos, Quality, mean_quality, rate_voices, spread_over
from echox.evaluate.scores import SpokenItem
from echox.release.assets import ASSETS, is_present

WINDOW = 144_160
LOST = range(7, 12)
"""Windows that `int((place + 9.01) * 16000)` makes a sample short."""


class Network:
    """Stands for both networks: P.835 says the first sample, ten times it, and 1; P.808 the mean of what it reads."""

    def __init__(self) -> None:
        self.read: list[Any] = []

    def run(self, names: None, given: dict[str, Any]) -> list[Any]:
        batch = given["input_1"]
        assert batch.dtype == np.float32
        self.read.append(batch)
        if batch.ndim == 3:
            return [batch.mean((1, 2))[:, None]]
        return [np.stack([batch[:, 0], 10 * batch[:, 0], np.ones(len(batch), np.float32)], 1)]


@pytest.fixture
def networks(monkeypatch: pytest.MonkeyPatch) -> dict[str, Network]:
    made: dict[str, Network] = {}

    def opened(path: Path, threads: int) -> Network:
        return made.setdefault(path.name, Network())

    monkeypatch.setattr(quality, "open_session", opened)
    return made


def test_windows_are_a_second_apart_and_their_opinions_are_averaged(networks: dict[str, Network]) -> None:
    clip = np.full(WINDOW + 12 * 16_000, 0.5, np.float32)
    clip[16_000 * 2] = 0.25  # the first sample of the third window
    rated = Dnsmos(Path("m")).rate([clip])[0]
    assert rated is not None
    read = np.concatenate(networks[quality.P835].read)
    whole = [place for place in range(12) if place not in LOST]
    assert read.shape == (len(whole), WINDOW)
    firsts = np.array([float(clip[place * 16_000]) for place in whole])
    expected = np.mean([-0.08397278 * x * x + 1.22083953 * x + 0.0052439 for x in firsts])
    assert rated.sig == pytest.approx(expected, abs=1e-6)
    ten = 10 * firsts
    assert rated.bak == pytest.approx(np.mean(-0.13166888 * ten * ten + 1.60915514 * ten - 0.39604546), abs=1e-5)
    assert rated.ovrl == pytest.approx(-0.06766283 + 1.11546468 + 0.04602535)
    mels = np.concatenate(networks[quality.P808].read)
    assert mels.shape == (len(whole), 900, 120)
    assert rated.p808 == pytest.approx(mels.mean((1, 2)).mean(), abs=1e-6)


def test_a_short_clip_is_repeated_read_once_and_cut_as_a_player_does(networks: dict[str, Network]) -> None:
    clip = np.arange(1, 50_001, dtype=np.float32) / 40_000
    rated = Dnsmos(Path("m")).rate([clip])
    read = np.concatenate(networks[quality.P835].read)
    assert read.shape == (1, WINDOW) and rated[0] is not None
    np.testing.assert_array_equal(read[0], np.concatenate([clip] * 3)[:WINDOW].clip(-1, 1))


def test_silence_and_nothing_have_no_opinion(networks: dict[str, Network]) -> None:
    quiet = [np.zeros(0, np.float32), np.zeros(16_000, np.float32), np.full(1, 0.1, np.float32)]
    seen: list[tuple[int, int]] = []
    rated = Dnsmos(Path("m")).rate(quiet, lambda done, total: seen.append((done, total)))
    assert [each is None for each in rated] == [True, True, False] and seen == [(1, 3), (2, 3), (3, 3)]
    assert np.isfinite(np.concatenate(networks[quality.P808].read)).all()


def test_the_log_mel_is_that_of_librosa() -> None:
    """Its definition, written out: Slaney's mel scale and areas, 321-point transforms of a padded signal."""
    wave = np.random.default_rng(3).normal(0, 0.1, WINDOW).astype(np.float32)
    wave[20_000:60_000] = 0
    found = quality._log_mel(wave[None])[0]

    def hertz(mel: float) -> float:
        return mel * 200 / 3 if mel < 15 else 1000 * 6.4 ** ((mel - 15) / 27)

    top = 15 + 27 * np.log(8000 / 1000) / np.log(6.4)
    edges = [hertz(top * step / 121) for step in range(122)]
    bins = np.arange(161) * 16_000 / 321
    bank = np.zeros((161, 120))
    for mel in range(120):
        low, middle, high = edges[mel : mel + 3]
        rise, fall = (bins - low) / (middle - low), (high - bins) / (high - middle)
        bank[:, mel] = np.maximum(0, np.minimum(rise, fall)) * 2 / (high - low)
    padded = np.concatenate([np.zeros(160), wave[:-160].astype(np.float64), np.zeros(160)])
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(321) / 321)
    power = np.array([abs(np.fft.rfft(padded[160 * n :][:321] * hann)) ** 2 for n in range(900)]) @ bank
    decibels = 10 * np.log10(np.maximum(power, 1e-10))
    expected = (np.maximum(decibels - decibels.max(), -80) + 40) / 40
    np.testing.assert_allclose(found, expected, atol=2e-4)


def test_the_three_voices_are_rated_on_the_same_items(networks: dict[str, Network]) -> None:
    class Mouth:
        sample_rate = 16_000

        def __call__(self, units: Any, durations: Any = None) -> list[Any]:
            return [np.full(1600, float(each[0]) / 10, np.float32) for each in units]

    def item(number: int, silent: bool = False) -> SpokenItem:
        units = np.array([] if silent else [number + 1], "<u2")
        return SpokenItem(
            id=str(number), question="", question_audio=np.zeros(1, np.float32), golds=["x"], reference="", text="",
            units=units, cascade_units=np.array([number + 4], "<u2"),
        )  # fmt: skip

    items = [item(0), item(1), item(2), item(3, silent=True), item(4)]
    ears: Any = SimpleNamespace()
    found = rate_voices(items, Listener(Mouth(), ears), Dnsmos(Path("m")), 3)  # type: ignore[arg-type]
    assert list(found) == ["echo", "cascade"], "a voice that says nothing is left out"
    assert {voice: row["n"] for voice, row in found.items()} == {"echo": 3, "cascade": 3}
    levels = sorted(round(float(batch[0, 0]), 1) for batch in networks[quality.P835].read)
    assert levels == [0.1, 0.3, 0.4, 0.5, 0.6, 0.8], "items 0, 2 and 4: own 1, 3, 5; the teacher's 4, 6, 8"
    silent = rate_voices([item(3, silent=True)], Listener(Mouth(), ears), Dnsmos(Path("m")), 3)  # type: ignore[arg-type]
    assert list(silent) == ["cascade"]


def test_means_are_of_what_is_heard() -> None:
    rated = [Quality(1, 2, 3, 4), None, Quality(2, 3, 4, 5)]
    assert mean_quality(rated) == {"n": 2, "ovrl": 1.5, "sig": 2.5, "bak": 3.5, "p808": 4.5}
    assert mean_quality([None]) is None
    assert [spread_over(*given) for given in ((0, 3), (5, 0), (5, 9), (9, 3))] == [[], [], [0, 1, 2, 3, 4], [0, 4, 8]]


def test_a_folder_without_models_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MissingModelError, match=r"sig_bak_ovr\.onnx.*make demo"):
        Dnsmos(tmp_path)
    monkeypatch.setenv("ECHOX_CACHE", str(tmp_path))
    assert Dnsmos.find() is None, "scores do without it"


CACHE = Path(os.environ.get("ECHOX_CACHE", "~/.cache/echox")).expanduser()


def _real() -> tuple[Dnsmos, Any]:
    if not (is_present("dnsmos", CACHE) and is_present("prompts", CACHE)):
        pytest.skip("the demo's models and recordings have not been fetched")
    wavs = CACHE / ASSETS["prompts"].folder / "wav"
    return Dnsmos(CACHE / ASSETS["dnsmos"].folder), lambda name: read_audio(wavs / f"{name}.wav")


PUBLISHED = {
    "screen-callee-options": (3.3980, 3.6490, 4.1256, 3.7718),  # 18 s, 7 windows
    "vm-intro": (3.3979, 3.6192, 4.1766, 3.7594),
    "goodbye": (2.7659, 3.1544, 3.7328, 3.1510),
}
"""ovrl, sig, bak, p808."""


@pytest.mark.slow
def test_real_recordings_have_the_opinions_of_the_published_package() -> None:
    """`speechmos.dnsmos.run` 0.0.1.1 with librosa 0.11, of the same samples; the short clip repeated to one window."""
    rater, clip = _real()
    for name, expected in PUBLISHED.items():
        rated = rater.rate([clip(name)])[0]
        assert rated is not None
        assert [rated.ovrl, rated.sig, rated.bak, rated.p808] == pytest.approx(expected, abs=2e-3), name


@pytest.mark.slow
def test_what_sounds_worse_is_rated_lower() -> None:
    import torch
    import torchaudio

    rater, clip = _real()
    clean = [clip(name) for name in ("vm-intro", "pls-hold-while-try", "vm-undelete")]
    random = np.random.default_rng(0)
    noisy, robotic = [], []
    for wave in clean:
        noise = random.normal(size=len(wave)).astype(np.float32)
        noisy.append(wave + noise * np.sqrt((wave**2).mean() / 10 / (noise**2).mean()).astype(np.float32))
        torch.manual_seed(0)
        power = torchaudio.transforms.Spectrogram(400, hop_length=200)(torch.from_numpy(wave))
        mel = torchaudio.transforms.MelScale(40, 16_000, n_stft=201)(power)
        back = torchaudio.transforms.InverseMelScale(201, 40, 16_000)(mel)
        robotic.append(torchaudio.transforms.GriffinLim(400, hop_length=200, n_iter=32)(back).numpy())
    means = [mean_quality(rater.rate(clips)) for clips in (clean, noisy, robotic)]
    ovrl = [mean["ovrl"] for mean in means if mean]
    assert ovrl[0] > ovrl[1] + 0.3 and ovrl[1] > ovrl[2] + 0.1, ovrl
