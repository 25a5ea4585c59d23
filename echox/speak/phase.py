"""Finds the phases of a magnitude spectrum while it comes, in groups of frames with a look-ahead.

Griffin and Lim's iteration over a whole clip (1984) lets the last frame reach the first sample. Here each group of
frames is iterated with the frames in sight after it, those before it held, and then keeps its phases (RTISI-LA: Zhu,
Beauregard and Wyse 2007; momentum: Perraudin et al. 2013). Groups begin at fixed frames, so a sample does not depend on
how many frames came at a time. On 40 held-out sentences of the demo it comes as close to the spectrum (15.8 dB)
as 48 rounds over the whole (15.7 dB), and an ASR model hears as many words of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from echox.speak.blocks import joined

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

GROUP = 8
"""Frames that keep their phases together."""
LOOK_AHEAD = 16
"""Frames after them that are in sight."""
ITERATIONS = 32
MOMENTUM = 0.99
_LEAST = 1e-8


class PhaseStream:
    """Magnitudes of windowed frames to samples; frame t is centred on sample `t * hop`.

    Args:
        window_W: of analysis and synthesis; its length is a multiple of `2 * hop`.
        n_fft: points of a frame's transform; what is longer than the window is zeros.
        hop: samples between frames.
        iterations: rounds between spectrum and waveform of each group.
        group, look_ahead: frames, see the module.
    """

    def __init__(
        self,
        window_W: Tensor,
        n_fft: int,
        hop: int,
        *,
        iterations: int = ITERATIONS,
        group: int = GROUP,
        look_ahead: int = LOOK_AHEAD,
    ) -> None:
        self._window_W, self._n_fft, self._hop = window_W, n_fft, hop
        self._iterations, self._group, self._in_sight = iterations, group, group + look_ahead
        self._waiting_TF = torch.zeros(0, n_fft // 2 + 1)
        # The spectra of frames that were in sight of the last group are where their own iteration begins.
        self._begun_KF = torch.zeros(0, n_fft // 2 + 1, dtype=torch.complex64)
        # What the frames that have their phases add to the samples from the next frame's first one on; their windows.
        self._held_W = torch.zeros(len(window_W))
        self._weight_W = torch.zeros(len(window_W))
        self._before_first = len(window_W) // 2
        turn_F = torch.arange(n_fft // 2 + 1) * (-2 * torch.pi * (len(window_W) // 2) / n_fft)
        self._pulse_F = torch.polar(torch.ones_like(turn_F), turn_F)

    @torch.no_grad()
    def push(self, spectrum_TF: Tensor) -> Floats:
        """Samples that are known after more magnitudes `[T, n_fft / 2 + 1]`."""
        self._waiting_TF = torch.cat([self._waiting_TF, spectrum_TF])
        made = []
        while len(self._waiting_TF) >= self._in_sight:
            made.append(self._next_group())
        return joined(made)

    @torch.no_grad()
    def close(self) -> Floats:
        """All other samples, up to half a window after the centre of the last frame."""
        made = []
        while len(self._waiting_TF):
            made.append(self._next_group())
        return joined([*made, self._finished(self._held_W, self._weight_W)])

    def _next_group(self) -> Floats:
        seen_TF = self._waiting_TF[: self._in_sight]
        keeps, more = min(self._group, len(seen_TF)), (len(seen_TF) - 1) * self._hop
        held_L, squares_TW = F.pad(self._held_W, (0, more)), (self._window_W**2).expand(len(seen_TF), -1)
        scale_L = (F.pad(self._weight_W, (0, more)) + self._added(squares_TW)).clamp_min(_LEAST).reciprocal()
        spectrum_TF = self._iterated(self._begin(seen_TF, held_L), seen_TF, held_L, scale_L)
        self._waiting_TF, self._begun_KF = self._waiting_TF[keeps:], spectrum_TF[keeps:]
        done = keeps * self._hop
        kept_TW, squares_TW = self._frames(spectrum_TF[:keeps]), squares_TW[:keeps]
        parts = F.pad(self._held_W, (0, done)), F.pad(self._weight_W, (0, done))
        held_L, weight_L = (
            F.pad(self._added(frames_TW), (0, self._hop)) + part
            for frames_TW, part in zip((kept_TW, squares_TW), parts, strict=True)
        )
        self._held_W, self._weight_W = held_L[done:], weight_L[done:]
        return self._finished(held_L[:done], weight_L[:done])

    def _iterated(self, spectrum_TF: Tensor, seen_TF: Tensor, held_L: Tensor, scale_L: Tensor) -> Tensor:
        """The spectra after all rounds, written without temporary tensors: a round is a dozen small operators.

        Frames, padded to a transform, and waves are each written into one buffer; that of the waves has a line for each
        part of a window, moved by as many hops, so that their sum over the lines lays the frames over each other.
        """
        frames, size = len(seen_TF), len(self._window_W)
        parts = size // self._hop
        padded_TN = torch.zeros(frames, self._n_fft)
        lines_PL = torch.zeros(parts, len(held_L))
        laid_TPH = lines_PL.as_strided((frames, parts, self._hop), (self._hop, len(held_L) + self._hop, 1))
        window_PH, base_L = self._window_W.view(parts, self._hop), held_L * scale_L
        before_TF = torch.zeros_like(spectrum_TF)
        for _ in range(self._iterations):
            frames_TN = torch.fft.irfft(spectrum_TF, self._n_fft)
            torch.mul(frames_TN[:, :size].unflatten(1, (parts, self._hop)), window_PH, out=laid_TPH)
            wave_L = torch.addcmul(base_L, lines_PL.sum(0), scale_L)
            torch.mul(wave_L.unfold(0, size, self._hop), self._window_W, out=padded_TN[:, :size])
            found_TF = torch.fft.rfft(padded_TN)
            spectrum_TF = torch.sub(found_TF, before_TF, alpha=MOMENTUM / (1 + MOMENTUM))
            before_TF = found_TF
            # abs() of complex numbers writes complex ones first.
            squares_TF = torch.addcmul(spectrum_TF.real.square(), spectrum_TF.imag, spectrum_TF.imag)
            spectrum_TF.mul_(squares_TF.clamp_min_(_LEAST**2).rsqrt_().mul_(seen_TF))
        return spectrum_TF

    def _begin(self, seen_TF: Tensor, held_L: Tensor) -> Tensor:
        """Spectra to begin with: those of the last group's look-ahead, then what the wave so far has there.

        Where there is no wave yet, the phase is that of a pulse in the middle of the window.
        """
        begun = len(self._begun_KF)
        if begun:
            held_L = held_L + F.pad(self._added(self._frames(self._begun_KF)), (0, (len(seen_TF) - begun) * self._hop))
        found_TF = self._spectrum(held_L)
        size_TF = found_TF.abs()
        phase_TF = torch.where(size_TF > 1e-6, found_TF / size_TF.clamp_min(_LEAST), self._pulse_F)
        return torch.cat([self._begun_KF, (phase_TF * seen_TF)[begun:]])

    def _frames(self, spectrum_TF: Tensor) -> Tensor:
        frames_TW: Tensor = torch.fft.irfft(spectrum_TF, self._n_fft)[:, : len(self._window_W)]
        return frames_TW * self._window_W

    def _spectrum(self, wave_L: Tensor) -> Tensor:
        frames_TW = wave_L.unfold(0, len(self._window_W), self._hop) * self._window_W
        spectrum_TF: Tensor = torch.fft.rfft(frames_TW, self._n_fft)
        return spectrum_TF

    def _added(self, frames_TW: Tensor) -> Tensor:
        """Frames laid over each other, `[(T - 1) * hop + W]`."""
        parts_TPH = frames_TW.reshape(len(frames_TW), -1, self._hop)
        parts = parts_TPH.shape[1]
        sum_XH = frames_TW.new_zeros(len(frames_TW) + parts - 1, self._hop)
        for part in range(parts):
            sum_XH[part : part + len(frames_TW)] += parts_TPH[:, part]
        return sum_XH.reshape(-1)

    def _finished(self, wave_L: Tensor, weight_L: Tensor) -> Floats:
        """Samples to which nothing is added any more; those before the centre of the first frame are left out."""
        wave = (wave_L / weight_L.clamp_min(_LEAST)).numpy()
        out = min(self._before_first, len(wave))
        self._before_first -= out
        return np.asarray(wave[out:], dtype=np.float32)
