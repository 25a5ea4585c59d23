"""Synthesises waveforms from units: the unit-to-mel vocoder with Griffin-Lim, and a unit HiFi-GAN, by one interface."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from echox.errors import DataError, MissingModelError
from echox.files import read_json
from echox.units.identity import RECORD, UnitPart, check_same_unit_set, read_unit_set

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from echox.speak.unit_mel import UnitMel

    Units = NDArray[np.uint16]
    Floats = NDArray[np.float32]

ITERATIONS = 48
MOMENTUM = 0.99
"""Fast Griffin-Lim (Perraudin et al. 2013)."""


class Vocoder(Protocol):
    """Speaks units in one voice."""

    sample_rate: int

    def __call__(self, units: Sequence[Units], durations: Sequence[Units] | None = None) -> list[Floats]:
        """Waveforms of unit sequences.

        Args:
            units: consecutive duplicates removed, one array a clip.
            durations: frames of 20 ms of each unit; None lets the vocoder predict them.

        Returns:
            float32 [samples] at `sample_rate`, one a clip; no samples for no units.

        Raises:
            DataError: a unit the vocoder does not know, or durations that do not fit the units.
        """
        ...


class GriffinLim:
    """Log-mel to a waveform without any training: least-squares linear spectrum, then phase by iteration.

    Args:
        iterations: rounds between spectrum and waveform.
    """

    def __init__(self, iterations: int = ITERATIONS) -> None:
        import torch
        import torchaudio

        from echox.speak.unit_mel import HOP, N_FFT, WINDOW, mel_filters

        self._inverse_FM: Tensor = torch.linalg.pinv(mel_filters().T)
        # Starting from zero phase rather than a random one makes the waveform a function of the spectrum.
        self._invert: Any = torchaudio.transforms.GriffinLim(
            N_FFT, iterations, WINDOW, HOP, power=1.0, momentum=MOMENTUM, rand_init=False
        )

    def __call__(self, mel_TM: Tensor) -> Floats:
        """Waveform of log-mel amplitudes `[T, mels]`; T times 160 samples."""
        from echox.speak.unit_mel import HOP

        spectrum_FT = (self._inverse_FM @ mel_TM.exp().T).clamp_min(1e-5)
        # A last frame of silence stands for the end that a centred transform needs.
        spectrum_FT = repeat_last(spectrum_FT)
        wave: Floats = self._invert(spectrum_FT).numpy()
        return np.ascontiguousarray(np.clip(wave[: mel_TM.shape[0] * HOP], -1.0, 1.0), dtype=np.float32)


def repeat_last(spectrum_FT: Tensor) -> Tensor:
    """Repeat the last frame once."""
    import torch

    return torch.cat([spectrum_FT, spectrum_FT[:, -1:]], dim=1)


class UnitMelVocoder:
    """The embedded vocoder: trained unit-to-mel networks, then Griffin-Lim.

    Args:
        model: trained networks.
    """

    sample_rate = 16_000

    def __init__(self, model: UnitMel) -> None:
        self.model = model
        self._griffin_lim = GriffinLim()

    @classmethod
    def load(cls, folder: str | Path) -> UnitMelVocoder:
        """Open a folder that `train_vocoder` wrote."""
        from echox.speak.unit_mel import UnitMel

        return cls(UnitMel.load(folder))

    def __call__(self, units: Sequence[Units], durations: Sequence[Units] | None = None) -> list[Floats]:
        """Waveforms of unit sequences."""
        check_units(units, durations, self.model.config.n_units)
        waves: list[Floats] = []
        for index, sequence in enumerate(units):
            if len(sequence) == 0:
                waves.append(np.zeros(0, np.float32))
                continue
            frames = self.model.durations(sequence) if durations is None else durations[index]
            waves.append(self._griffin_lim(self.model.spectrum(sequence, frames)))
        return waves


class CodeHifiGan:
    """A unit HiFi-GAN with a duration predictor, in transformers' layout (`SeamlessM4TCodeHifiGan`).

    With `unit_hifi_gan_vocab_size` 1000, `unit_embed_dim` 128, `lang_embed_dim` and `spkr_embed_dim` 0, up-sampling
    5, 4, 4, 2, 2 with kernels 11, 8, 8, 4, 4 and 512 channels it has the shapes of the mHuBERT layer 11, km1000,
    vocoder.

    Args:
        model: the network, in eval mode.
        sample_rate: samples a second it makes.
    """

    def __init__(self, model: Any, sample_rate: int) -> None:
        self.model = model.eval()
        self.sample_rate = sample_rate
        self._units = int(model.config.unit_hifi_gan_vocab_size)

    @classmethod
    def load(cls, folder: str | Path) -> CodeHifiGan:
        """Open a folder with `config.json` (a SeamlessM4TConfig) and `model.safetensors`.

        Raises:
            MissingModelError: a file is absent, or weights and configuration do not fit each other.
        """
        import torch
        from huggingface_hub.errors import StrictDataclassError
        from safetensors import SafetensorError
        from safetensors.torch import load_file
        from transformers import SeamlessM4TConfig
        from transformers.models.seamless_m4t.modeling_seamless_m4t import SeamlessM4TCodeHifiGan

        folder, unfit = Path(folder), (OSError, RuntimeError, ValueError, TypeError, AttributeError)
        try:
            config = SeamlessM4TConfig.from_pretrained(folder)
            with torch.device("meta"):
                wanted = sum(weight.numel() for weight in SeamlessM4TCodeHifiGan(config).parameters())
            if wanted > (folder / "model.safetensors").stat().st_size:
                raise ValueError(f"config.json describes {wanted:,} weights, more than there are")
            model = SeamlessM4TCodeHifiGan(config)
            model.load_state_dict(load_file(folder / "model.safetensors"))
        except (*unfit, SafetensorError, StrictDataclassError) as error:
            raise MissingModelError(
                f"Cannot load the unit HiFi-GAN: {error}",
                where=str(folder),
                fix="Give a folder with config.json and model.safetensors of one SeamlessM4TCodeHifiGan.",
            ) from error
        return cls(model, int(config.sampling_rate))

    def __call__(self, units: Sequence[Units], durations: Sequence[Units] | None = None) -> list[Floats]:
        """Waveforms of unit sequences, one at a time: the network repeats each row's units by its own durations."""
        import torch

        check_units(units, durations, self._units)
        waves: list[Floats] = []
        for index, sequence in enumerate(units):
            if len(sequence) == 0:
                waves.append(np.zeros(0, np.float32))
                continue
            units_1U = torch.from_numpy(sequence.astype(np.int64))[None]
            with torch.no_grad():
                embedded_1UD = self.model.unit_embedding(units_1U)
                if durations is None:
                    log_1U = self.model.dur_predictor(embedded_1UD)
                    frames_1U = torch.clamp(torch.round(torch.expm1(log_1U)).long(), min=1)
                else:
                    frames_1U = torch.from_numpy(durations[index].astype(np.int64))[None]
                spread_1DT = embedded_1UD.transpose(1, 2).repeat_interleave(frames_1U.view(-1), dim=2)
                waves.append(self._waveform(spread_1DT))
        return waves

    def _waveform(self, spread_1DT: Tensor) -> Floats:
        """Speaker and language vectors of index 0, where the model has them, stand before and after the units."""
        import torch

        parts = [spread_1DT]
        for table, first in ((self.model.speaker_embedding, False), (self.model.language_embedding, True)):
            if table.embedding_dim:
                vector_1DT = table.weight[:1, :, None].expand(-1, -1, spread_1DT.shape[2])
                parts = [vector_1DT, *parts] if first else [*parts, vector_1DT]
        wave: Floats = self.model.hifi_gan(torch.cat(parts, dim=1)).reshape(-1).numpy()
        return wave


def check_units(units: Sequence[Units], durations: Sequence[Units] | None, known: int) -> None:
    """Refuse units a vocoder was not trained on, and durations that belong to other units.

    Raises:
        DataError: either is the case.
    """
    for sequence in units:
        if len(sequence) and int(sequence.max()) >= known:
            raise DataError(
                f"Unit {int(sequence.max())} is unknown to a vocoder of {known} units",
                fix="Use the vocoder that was trained on these units.",
            )
    if durations is not None and [len(row) for row in units] != [len(row) for row in durations]:
        raise DataError("Durations do not fit the units: one is needed for each unit")


def check_vocoder(folder: str | Path, parts: Sequence[UnitPart]) -> None:
    """Refuse a vocoder for other units than it is given: by the record in its folder, which its training writes.

    Args:
        folder: the vocoder.
        parts: what gives it units.

    Raises:
        DataError: it was trained on another unit set than one of them has.
    """
    check_same_unit_set(
        [UnitPart(f"the vocoder {folder}", read_unit_set(folder)), *parts],
        fix=f"name the vocoder of these units by --vocoder; for a published one, copy their {RECORD} into its folder",
    )


def load_vocoder(folder: str | Path) -> Vocoder:
    """Open a vocoder folder of either kind.

    Raises:
        MissingModelError: no vocoder there.
    """
    from echox.speak.unit_mel import KIND

    path = Path(folder) / "config.json"
    try:
        config = dict(read_json(path))
    except (OSError, ValueError, TypeError) as error:
        raise MissingModelError(
            "There is no vocoder in the folder",
            where=str(folder),
            fix="Name a vocoder folder, or build the demo corpus.",
        ) from error
    return UnitMelVocoder.load(folder) if config.get("kind") == KIND else CodeHifiGan.load(folder)
