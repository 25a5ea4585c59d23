"""Log-mel frames against the feature extractor of transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import WhisperFeatureExtractor

from echox.audio.features import WINDOW, LogMel


def clips() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = [(1.37, 0.3), (2.9, 0.01), (0.6, 0.1)]
    return [
        (scale * rng.standard_normal(int(s * 16_000)) * np.hanning(int(s * 16_000))).astype(np.float32)
        for s, scale in shapes
    ]


def batch(waves: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    lengths = torch.tensor([len(w) for w in waves])
    audio = torch.zeros(len(waves), int(lengths.max()))
    for row, wave in zip(audio, waves, strict=True):
        row[: len(wave)] = torch.from_numpy(wave)
    return audio, lengths


@pytest.mark.parametrize("n_mels", [80, 128])
def test_30_s_frames_equal_transformers(n_mels: int) -> None:
    waves = clips()
    expected = WhisperFeatureExtractor(feature_size=n_mels)(waves, sampling_rate=16_000, return_tensors="np")
    mel, _ = LogMel(n_mels, input_mode="pad_30s")(*batch(waves))
    assert mel.shape == (3, n_mels, 3000)
    assert np.abs(mel.numpy() - expected.input_features).max() < 1e-5


def test_trimmed_frames_are_the_start_of_the_30_s_frames() -> None:
    audio, lengths = batch(clips())
    whole, _ = LogMel(input_mode="pad_30s")(audio, lengths)
    trimmed, frames = LogMel(input_mode="trim", margin_s=0.5, stack=2)(audio, lengths)
    assert trimmed.shape[-1] % 4 == 0 and trimmed.shape[-1] == int(frames.max())
    assert torch.allclose(trimmed, whole[..., : trimmed.shape[-1]], atol=1e-5)
    content = lengths + 8000
    assert (frames % 4 == 0).all() and (frames * 160 >= content).all() and (frames * 160 - content < 640).all()


@pytest.mark.parametrize("margin_s", [0.0, 0.3])
def test_a_clip_does_not_depend_on_its_batch(margin_s: float) -> None:
    waves = clips()
    mel = LogMel(margin_s=margin_s)
    together, frames = mel(*batch(waves))
    for index, wave in enumerate(waves):
        alone, count = mel(*batch([wave]))
        assert int(count[0]) == int(frames[index])
        valid = int(count[0])
        assert torch.allclose(alone[0, :, :valid], together[index, :, :valid], atol=1e-5)


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    """Loud at first and soft later, so that the windows of a clip have different floors."""
    samples = int(seconds * 16_000)
    fading = np.geomspace(0.3, 1e-5, samples)
    return (fading * np.random.default_rng(seed).standard_normal(samples)).astype(np.float32)


def test_windows_of_30_s_equal_transformers_on_each_window() -> None:
    wave = noise(65.0)
    windows = [wave[at : at + WINDOW] for at in range(0, len(wave), WINDOW)]
    expected = WhisperFeatureExtractor(feature_size=80)(windows, sampling_rate=16_000, return_tensors="np")
    mel, frames = LogMel(80, input_mode="pad_30s")(*batch([wave, *clips()]))
    assert mel.shape == (4, 80, 9000) and frames.tolist()[0] == 6552  # 65 s, and a margin of 0.5 s in whole stacks
    assert np.abs(mel[0].numpy() - np.concatenate(list(expected.input_features), axis=1)).max() < 1e-5


def test_all_frames_of_30_s_count_where_the_silence_does() -> None:
    audio, lengths = batch([noise(40.0), *clips()])
    padded, _ = LogMel(80, input_mode="pad_30s")(audio, lengths)
    mel, frames = LogMel(80, input_mode="all_30s")(audio, lengths)
    assert torch.equal(mel, padded) and frames.tolist() == [6000, *[3000] * len(clips())]
    alone, frames = LogMel(80, input_mode="all_30s")(*batch(clips()[:1]))
    assert alone.shape[2] == 3000 and frames.tolist() == [3000]


@pytest.mark.parametrize("input_mode", ["trim", "pad_30s"])
@pytest.mark.parametrize("stack", [2, 8])
def test_frames_of_a_long_clip_are_those_of_its_windows_end_to_end(input_mode: str, stack: int) -> None:
    mel = LogMel(input_mode=input_mode, stack=stack)  # type: ignore[arg-type]
    waves = [noise(61.3), clips()[0], noise(33.0, seed=1), noise(60.0, seed=2)]
    together, frames = mel(*batch(waves))
    assert frames.tolist() == {2: [6180, 188, 3352, 6000], 8: [6192, 192, 3360, 6000]}[stack]
    assert together.shape[2] == (9000 if input_mode == "pad_30s" else int(frames.max()))
    for row, wave in enumerate(waves):
        windows = [wave[at : at + WINDOW] for at in range(0, len(wave), WINDOW)]
        alone = torch.cat([LogMel(input_mode="pad_30s")(*batch([window]))[0][0] for window in windows], dim=1)
        valid = int(frames[row])
        assert torch.allclose(together[row, :, :valid], alone[:, :valid], atol=1e-5)


@pytest.mark.parametrize("input_mode", ["trim", "pad_30s"])
@pytest.mark.parametrize(("seconds", "expected"), [(29.9, 3000), (30.0, 3000), (59.9, 6000), (60.0, 6000)])
def test_the_margin_opens_no_window_of_its_own(input_mode: str, seconds: float, expected: int) -> None:
    mel = LogMel(input_mode=input_mode, margin_s=0.5)  # type: ignore[arg-type]
    for beside in ([], [noise(31.0)]):
        _, frames = mel(*batch([noise(seconds), *beside]))
        assert int(frames[0]) == expected
