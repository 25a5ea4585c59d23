"""Log-mel frames against the feature extractor of transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import WhisperFeatureExtractor

from echox.audio.features import LogMel


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
    assert np.abs(mel.numpy() - expected.input_features).max() < 1e-4


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


@pytest.mark.parametrize("input_mode", ["trim", "pad_30s"])
def test_more_than_30_s_is_cut_to_what_the_encoder_holds(input_mode: str) -> None:
    audio = torch.randn(1, 35 * 16_000)
    mel, frames = LogMel(input_mode=input_mode)(audio, torch.tensor([audio.shape[1]]))  # type: ignore[arg-type]
    assert mel.shape[-1] == 3000 and int(frames) == 3000
