"""Judges waveforms: HiFi-GAN's discriminators of periods and of scales (Kong et al. 2020, arXiv 2010.05646)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

PERIODS = (2, 3, 5, 7, 11)
SLOPE = 0.1


class Verdict(NamedTuple):
    """What one discriminator says of B waveforms.

    Attributes:
        score_BS: near 1 for what it takes for real, near 0 for what it takes for made.
        features: output of each layer, the last one without activation; each `[B, ...]`.
    """

    score_BS: Tensor
    features: list[Tensor]


class PeriodDiscriminator(nn.Module):
    """Sees every `period`-th sample: the waveform folded to `[B, 1, N / period, period]`, convolved along its columns.

    Args:
        period: of the folding.
        channels: of the widest layers.
    """

    def __init__(self, period: int, channels: int) -> None:
        super().__init__()
        self.period = period
        widths = [1, *(max(1, channels // part) for part in (32, 8, 2, 1, 1))]
        self.convs = nn.ModuleList(
            weight_norm(nn.Conv2d(into, out, (5, 1), (3 if place < 4 else 1, 1), padding=(2, 0)))
            for place, (into, out) in enumerate(zip(widths[:-1], widths[1:], strict=True))
        )
        self.last = weight_norm(nn.Conv2d(widths[-1], 1, (3, 1), padding=(1, 0)))

    def forward(self, wave_BN: Tensor) -> Verdict:
        """Judge waveforms, mirrored at the end to a whole number of periods."""
        missing = -wave_BN.shape[1] % self.period
        padded_BN = F.pad(wave_BN[:, None], (0, missing), mode="reflect")[:, 0] if missing else wave_BN
        return _judged(padded_BN.reshape(len(wave_BN), 1, -1, self.period), self.convs, self.last)


class ScaleDiscriminator(nn.Module):
    """Sees the waveform as it is, in groups of channels.

    Args:
        channels: of the widest layers.
        spectral: normalise by the largest singular value, as the one of the full rate does, in place of weight norm.
    """

    def __init__(self, channels: int, *, spectral: bool) -> None:
        super().__init__()
        norm = spectral_norm if spectral else weight_norm
        widths = [1, *(max(1, channels // part) for part in (8, 8, 4, 2, 1, 1, 1))]
        kernels, strides, groups = (15, 41, 41, 41, 41, 41, 5), (1, 2, 2, 4, 4, 1, 1), (1, 4, 16, 16, 16, 16, 1)
        self.convs = nn.ModuleList(
            norm(nn.Conv1d(into, out, kernel, stride, padding=kernel // 2, groups=math.gcd(group, into, out)))
            for into, out, kernel, stride, group in zip(widths[:-1], widths[1:], kernels, strides, groups, strict=True)
        )
        self.last = norm(nn.Conv1d(widths[-1], 1, 3, padding=1))

    def forward(self, wave_BN: Tensor) -> Verdict:
        """Judge waveforms."""
        return _judged(wave_BN[:, None], self.convs, self.last)


class Discriminators(nn.Module):
    """Five of periods, and three of scales: the waveform, and its means over 2 and 4 samples.

    Args:
        channels: of the widest layers; 1,024 as published.
    """

    def __init__(self, channels: int = 1024) -> None:
        super().__init__()
        self.periods = nn.ModuleList(PeriodDiscriminator(period, channels) for period in PERIODS)
        self.scales = nn.ModuleList(ScaleDiscriminator(channels, spectral=place == 0) for place in range(3))

    def forward(self, wave_BN: Tensor) -> list[Verdict]:
        """What each of the eight says of waveforms in [-1, 1]."""
        verdicts: list[Verdict] = [judge(wave_BN) for judge in self.periods]
        for place, judge in enumerate(self.scales):
            if place:
                wave_BN = F.avg_pool1d(wave_BN[:, None], 4, 2, padding=2)[:, 0]
            verdicts.append(judge(wave_BN))
        return verdicts


def halves(verdicts: list[Verdict], first: int) -> tuple[list[Verdict], list[Verdict]]:
    """Verdicts on the first so many waveforms of a batch, and on the others."""
    sides = (slice(None, first), slice(first, None))
    one, other = ([Verdict(v.score_BS[side], [f[side] for f in v.features]) for v in verdicts] for side in sides)
    return one, other


def _judged(x: Tensor, convs: nn.ModuleList, last: nn.Module) -> Verdict:
    features: list[Tensor] = []
    for conv in convs:
        x = F.leaky_relu(conv(x), SLOPE)
        features.append(x)
    features.append(last(x))
    return Verdict(torch.flatten(features[-1], 1), features)
