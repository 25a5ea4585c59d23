"""Speaks units with the embedded vocoder while they come: durations, mel and waveform block by block."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from echox.speak.blocks import Block, Blocks, joined
from echox.speak.phase import PhaseStream
from echox.speak.unit_mel import CONTEXT, HOP, N_FFT, WINDOW, mel_filters

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from echox.speak.unit_mel import UnitMel

    Units = NDArray[np.uint16]
    Floats = NDArray[np.float32]

UNITS = 4
"""Units of a block; their durations wait for as many and for the neighbours that the network sees."""
FRAMES = 4
"""Unit frames, of 20 ms, of a block of mel frames."""


class MelStream:
    """Log-mel amplitudes to a waveform: least-squares linear spectrum, then phases."""

    def __init__(self) -> None:
        self._inverse_MF = _inverse_filters()
        self._phases = PhaseStream(torch.hann_window(WINDOW), N_FFT, HOP)
        self._last_1F: Tensor | None = None
        self._left = 0

    def push(self, mel_TM: Tensor) -> Floats:
        """Samples that are known after more log-mel frames `[T, mels]`."""
        spectrum_TF = (mel_TM.exp() @ self._inverse_MF).clamp_min(1e-5)
        self._last_1F, self._left = spectrum_TF[-1:], self._left + len(mel_TM) * HOP
        return self._heard(self._phases.push(spectrum_TF))

    def close(self) -> Floats:
        """The others: 160 samples a frame in all."""
        if self._last_1F is None:
            return joined([])
        # The last frame once more stands for the end that a centred transform needs.
        return self._heard(joined([self._phases.push(self._last_1F), self._phases.close()]))

    def _heard(self, wave: Floats) -> Floats:
        wave = np.clip(wave[: self._left], -1.0, 1.0)
        self._left -= len(wave)
        return wave


class UnitMelStream:
    """Units to a waveform, see `VocoderStream`.

    Args:
        model: trained networks.
    """

    def __init__(self, model: UnitMel) -> None:
        self._model = model
        self._units = Blocks(UNITS, model.sees_units)
        self._frames = Blocks(FRAMES, CONTEXT)
        self._mel = MelStream()

    def push(self, units: Units) -> Floats:
        """Samples that are known after more units."""
        return joined([self._lasting(block) for block in self._units.push(units)])

    def push_frames(self, frames: Units) -> Floats:
        """The same for units that stand for 20 ms each, as often as they last."""
        return joined([self._sounding(block) for block in self._frames.push(frames)])

    def close(self) -> Floats:
        """All other samples."""
        made = [self._lasting(block) for block in self._units.close()]
        made += [self._sounding(block) for block in self._frames.close()]
        return joined([*made, self._mel.close()])

    def _lasting(self, block: Block) -> Floats:
        durations = self._model.durations(block.items.astype(np.uint16))
        return self.push_frames(np.repeat(block.items[block.own], durations[block.own]))

    def _sounding(self, block: Block) -> Floats:
        once = np.ones(len(block.items), np.uint16)
        mel_TM = self._model.spectrum(block.items.astype(np.uint16), once)
        return self._mel.push(mel_TM[2 * block.own.start : 2 * block.own.stop])


@cache
def _inverse_filters() -> Tensor:
    """Least-squares inverse of the mel filters, `[mels, N_FFT / 2 + 1]`."""
    inverse_MF: Tensor = torch.linalg.pinv(mel_filters())
    return inverse_MF
