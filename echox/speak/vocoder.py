"""Synthesises waveforms from units, as a whole or while they come: the unit-to-mel vocoder and a unit HiFi-GAN."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from echox.config.paths import cache_dir
from echox.errors import DataError, MissingModelError
from echox.speak.blocks import Block, Blocks, joined
from echox.speak.speakers import read_vocoder_config, speaker_row
from echox.units.identity import RECORD, UnitPart, check_same_unit_set, read_unit_set

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from echox.speak.unit_mel import UnitMel
    from echox.speak.unit_mel_stream import UnitMelStream

    Units = NDArray[np.uint16]
    Floats = NDArray[np.float32]

UNITS, FRAMES = 8, 32
"""Units, and frames of 20 ms, of a block of the unit HiFi-GAN."""


class VocoderStream(Protocol):
    """Speaks one unit sequence while it comes: the samples in all are those of the whole, however it was cut."""

    def push(self, units: Units) -> Floats:
        """Samples that are known after more units; there may be none.

        Raises:
            DataError: a unit the vocoder does not know.
        """
        ...

    def close(self) -> Floats:
        """All other samples; nothing may be pushed after that."""
        ...


class Vocoder(Protocol):
    """Speaks units in one voice."""

    sample_rate: int

    def stream(self) -> VocoderStream:
        """Begin one unit sequence, whose durations are predicted."""
        ...

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


class UnitMelVocoder:
    """The embedded vocoder: trained unit-to-mel networks, then phases.

    Args:
        model: trained networks.
    """

    sample_rate = 16_000

    def __init__(self, model: UnitMel) -> None:
        self.model = model

    @classmethod
    def load(cls, folder: str | Path) -> UnitMelVocoder:
        """Open a folder that `train_vocoder` wrote."""
        from echox.speak.unit_mel import UnitMel

        return cls(UnitMel.load(folder))

    def stream(self) -> VocoderStream:
        """Begin one unit sequence."""
        return _Checked(self._begin(), self.model.config.n_units)

    def __call__(self, units: Sequence[Units], durations: Sequence[Units] | None = None) -> list[Floats]:
        """Waveforms of unit sequences."""
        check_units(units, durations, self.model.config.n_units)
        return _spoken(self._begin, units, durations)

    def _begin(self) -> UnitMelStream:
        from echox.speak.unit_mel_stream import UnitMelStream

        return UnitMelStream(self.model)


class CodeHifiGan:
    """A unit HiFi-GAN with a duration predictor, in transformers' layout (`SeamlessM4TCodeHifiGan`).

    With `unit_hifi_gan_vocab_size` 1000, `unit_embed_dim` 128, `lang_embed_dim` and `spkr_embed_dim` 0, up-sampling
    5, 4, 4, 2, 2 with kernels 11, 8, 8, 4, 4 and 512 channels it has the shapes of the mHuBERT layer 11, km1000,
    vocoder.

    Args:
        model: the network, in eval mode.
        sample_rate: samples a second it makes.
        speaker: row of who speaks, in a model of several.
    """

    def __init__(self, model: Any, sample_rate: int, speaker: int = 0) -> None:
        self.model = model.eval()
        self.sample_rate = sample_rate
        self.speaker = speaker
        self._units = int(model.config.unit_hifi_gan_vocab_size)

    @classmethod
    def load(cls, folder: str | Path, speaker: int = 0) -> CodeHifiGan:
        """Open a folder with `config.json` (a SeamlessM4TConfig) and `model.safetensors`.

        `speaker` is the row of one of its voices.

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
            if min(config.vocoder_num_spkrs, config.vocoder_num_langs) < 1:
                raise ValueError("config.json describes a table of speakers or languages without a row")
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
        return cls(model, int(config.sampling_rate), speaker)

    def stream(self) -> VocoderStream:
        """Begin one unit sequence."""
        return _Checked(_HifiGanStream(self.model, self.speaker), self._units)

    def __call__(self, units: Sequence[Units], durations: Sequence[Units] | None = None) -> list[Floats]:
        """Waveforms of unit sequences."""
        check_units(units, durations, self._units)
        return _spoken(lambda: _HifiGanStream(self.model, self.speaker), units, durations)


class _HifiGanStream:
    """Durations of blocks of units, then the waveform of blocks of frames."""

    def __init__(self, model: Any, speaker: int) -> None:
        config = model.config
        self._model, self._speaker = model, speaker
        self._units = Blocks(UNITS, (config.variance_predictor_kernel_size - 1) // 2 + 1)
        self._frames = Blocks(FRAMES, sees_frames(config))
        self._hop = math.prod(config.upsample_rates)

    def push(self, units: Units) -> Floats:
        return joined([self._lasting(block) for block in self._units.push(units)])

    def push_frames(self, frames: Units) -> Floats:
        return joined([self._sounding(block) for block in self._frames.push(frames)])

    def close(self) -> Floats:
        made = [self._lasting(block) for block in self._units.close()]
        return joined([*made, *(self._sounding(block) for block in self._frames.close())])

    def _lasting(self, block: Block) -> Floats:
        import torch

        with torch.no_grad():
            log_1U = self._model.dur_predictor(self._model.unit_embedding(torch.from_numpy(block.items)[None]))
            frames_U = torch.clamp(torch.round(torch.expm1(log_1U)).long(), min=1)[0].numpy()
        return self.push_frames(np.repeat(block.items[block.own], frames_U[block.own]))

    def _sounding(self, block: Block) -> Floats:
        """The vector of the first language stands before the units, that of the speaker behind, if there are any."""
        import torch

        with torch.no_grad():
            parts = [self._model.unit_embedding(torch.from_numpy(block.items)[None]).transpose(1, 2)]
            speaker_D = self._model.speaker_embedding.weight[self._speaker]
            for vector_D, first in ((speaker_D, False), (self._model.language_embedding.weight[0], True)):
                if len(vector_D):
                    vector_1DT = vector_D[None, :, None].expand(-1, -1, len(block.items))
                    parts = [vector_1DT, *parts] if first else [*parts, vector_1DT]
            wave: Floats = self._model.hifi_gan(torch.cat(parts, dim=1)).reshape(-1).numpy()
        return wave[block.own.start * self._hop : block.own.stop * self._hop]


class _Checked:
    """A stream that refuses units it does not know."""

    def __init__(self, stream: _Stream, known: int) -> None:
        self._stream, self._known = stream, known

    def push(self, units: Units) -> Floats:
        check_units([units], None, self._known)
        return self._stream.push(units)

    def close(self) -> Floats:
        return self._stream.close()


class _Stream(VocoderStream, Protocol):
    def push_frames(self, frames: Units) -> Floats: ...


def _spoken(begin: Callable[[], _Stream], units: Sequence[Units], durations: Sequence[Units] | None) -> list[Floats]:
    """Each sequence pushed as a whole, with the durations that are given."""
    waves = []
    for index, sequence in enumerate(units):
        stream = begin()
        if durations is None:
            first = stream.push(sequence)
        else:
            first = stream.push_frames(np.repeat(sequence, durations[index].astype(np.int64)))
        waves.append(joined([first, stream.close()]))
    return waves


def sees_frames(config: Any) -> int:
    """Frames to either side on which a sample of a unit HiFi-GAN of this configuration depends, or some more."""
    reach = 3
    for rate, kernel in reversed(list(zip(config.upsample_rates, config.upsample_kernel_sizes, strict=True))):
        reach += max(
            sum((size - 1) // 2 * (dilation + 1) for dilation in dilations)
            for size, dilations in zip(config.resblock_kernel_sizes, config.resblock_dilation_sizes, strict=True)
        )
        reach = (reach + kernel - 1) // rate + 1
    return reach + 3


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


def default_vocoder(corpus: str = "demo") -> Path:
    """Folder of the vocoder that the demo's corpus, or another one in the cache, comes with."""
    return cache_dir() / "data" / corpus / "vocoder"


def load_vocoder(folder: str | Path, speaker: str | None = None) -> Vocoder:
    """Open a vocoder folder of either kind.

    Args:
        folder: with its `config.json`.
        speaker: name, or number from 0, of who speaks in a vocoder of several; None for the first.

    Raises:
        MissingModelError: no vocoder there.
        DataError: it has no such speaker.
    """
    from echox.speak.unit_mel import KIND

    config, row = read_vocoder_config(folder), speaker_row(folder, speaker)
    return UnitMelVocoder.load(folder) if config.get("kind") == KIND else CodeHifiGan.load(folder, row)
