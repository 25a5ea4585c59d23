"""Computes the losses of HiFi-GAN, each a number per clip (Kong et al. 2020, arXiv 2010.05646, section 2.3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from echox.vocoder.discriminators import Verdict

N_FFT, HOP, BINS = 1024, 256, 80
FLOOR = 1e-5
"""Least mel amplitude before the logarithm."""


class LogMel(nn.Module):
    """Log-mel amplitudes as HiFi-GAN compares them: 80 Slaney bins, windows of 1,024 at every 256 samples.

    The bins go up to half the sample rate, as in the released code (`fmax_for_loss` is null): what lies above the last
    one would be judged by the discriminators alone.

    Args:
        sample_rate: samples a second.
    """

    filters_FM: Tensor
    window_W: Tensor

    def __init__(self, sample_rate: int) -> None:
        super().__init__()
        import torchaudio

        filters_FM = torchaudio.functional.melscale_fbanks(
            N_FFT // 2 + 1, 0.0, sample_rate / 2, BINS, sample_rate, norm="slaney", mel_scale="slaney"
        )
        self.register_buffer("filters_FM", filters_FM, persistent=False)
        self.register_buffer("window_W", torch.hann_window(N_FFT), persistent=False)

    def forward(self, wave_BN: Tensor) -> Tensor:
        """`[B, 80, N / 256]`; the waveform is mirrored at both ends by 384 samples."""
        edge = (N_FFT - HOP) // 2
        padded_BN = F.pad(wave_BN[:, None], (edge, edge), mode="reflect")[:, 0]
        spectrum_BFT = torch.stft(padded_BN, N_FFT, HOP, window=self.window_W, center=False, return_complex=True)
        # The root has no gradient at 0.
        amplitude_BFT = (spectrum_BFT.real.square() + spectrum_BFT.imag.square() + 1e-9).sqrt()
        return (self.filters_FM.T @ amplitude_BFT).clamp_min(FLOOR).log()


def discriminator_loss(real: Sequence[Verdict], made: Sequence[Verdict]) -> Tensor:
    """Least squares (Eq. 1), added up over the discriminators: real waveforms are to score 1, made ones 0; `[B]`."""
    pairs = zip(real, made, strict=True)
    return _added([(1 - r.score_BS).square().mean(1) + m.score_BS.square().mean(1) for r, m in pairs])


def adversarial_loss(made: Sequence[Verdict]) -> Tensor:
    """Least squares (Eq. 2), added up over the discriminators: made waveforms are to score 1; `[B]`."""
    return _added([(1 - verdict.score_BS).square().mean(1) for verdict in made])


def feature_loss(real: Sequence[Verdict], made: Sequence[Verdict]) -> Tensor:
    """L1 between what each layer sees of real and of made waveforms (Eq. 4), added up over all layers; `[B]`."""
    layers = [
        (f.detach() - g).abs().flatten(1).mean(1)
        for r, m in zip(real, made, strict=True)
        for f, g in zip(r.features, m.features, strict=True)
    ]
    return _added(layers)


def mel_loss(real_BMT: Tensor, made_BMT: Tensor) -> Tensor:
    """L1 of log-mel (Eq. 3); `[B]`."""
    return (real_BMT - made_BMT).abs().mean((1, 2))


def duration_loss(logs_BU: Tensor, durations_BU: Tensor, mask_BU: Tensor) -> Tensor:
    """Squared error of log(1 + frames), added up over the real units: what is spoken is exp(p) - 1 frames; `[B]`."""
    return ((logs_BU - durations_BU.to(logs_BU.dtype).log1p()).square() * mask_BU).sum(1)


def _added(parts: list[Tensor]) -> Tensor:
    return torch.stack(parts).sum(0)
