"""Describes a unit HiFi-GAN by its sizes, builds it from transformers' class, and writes it as a vocoder folder."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echox.files import write_atomically
from echox.units.identity import UnitSetIdentity, write_unit_set

if TYPE_CHECKING:
    from torch import Tensor

LARGEST = 1 << 16
"""Of any one size: what a configuration of someone else claims is checked before anything is built."""
MOST_LAYERS = 16
MOST_SPEAKERS = 1 << 20
SPEAKER_IDS = "speaker_id_map"
"""Field of `config.json`: the row of each speaker by name, as in the configuration of Piper's voices."""
DURATION_KERNEL = 3
"""The second convolution of the duration predictor is padded by 1 whatever its kernel, so only 3 keeps the length."""
SLOPE = 0.1
"""Of the leaky rectifiers inside; the one before the last convolution has torch's 0.01 (both as published)."""


@dataclass(frozen=True, kw_only=True)
class HifiGanShape:
    """Sizes of a unit HiFi-GAN (Kong et al. 2020, arXiv 2010.05646, V1; units: Polyak et al. 2021, arXiv 2104.00355).

    The defaults are those of the mHuBERT layer 11, km1000, vocoder.

    Attributes:
        units: number of units K.
        embedding: width of a unit's vector, and of the duration predictor.
        speaker: width of a speaker's vector, which stands behind the unit's; 0 for a model of one voice without one.
        speakers: rows of the table of these vectors.
        rates, kernels: of each transposed convolution; the product of the rates is the samples of a unit frame.
        channels: before the first of them; each halves it.
        resblock_kernels, resblock_dilations: of the residual blocks behind each of them, added up.
        dropout: of the duration predictor.
        sample_rate: samples a second.
    """

    units: int = 1000
    embedding: int = 128
    speaker: int = 0
    speakers: int = 1
    rates: tuple[int, ...] = (5, 4, 4, 2, 2)
    kernels: tuple[int, ...] = (11, 8, 8, 4, 4)
    channels: int = 512
    resblock_kernels: tuple[int, ...] = (3, 7, 11)
    resblock_dilations: tuple[tuple[int, ...], ...] = ((1, 3, 5), (1, 3, 5), (1, 3, 5))
    dropout: float = 0.5
    sample_rate: int = 16_000

    @property
    def hop(self) -> int:
        """Samples of a unit frame."""
        return math.prod(self.rates)

    def mistakes(self) -> Iterator[str]:
        """What of the sizes no such network can have, a clause each."""
        fields = asdict(self)
        for name in ("units", "embedding", "channels", "sample_rate"):
            if not _whole(fields[name], 1):
                yield f"{name} is {fields[name]!r:.40}, not a whole number from 1 to {LARGEST}"
        if not _whole(self.speaker, 0):
            yield f"speaker is {self.speaker!r:.40}, not a whole number from 0 to {LARGEST}"
        if not _whole(self.speakers, 1, MOST_SPEAKERS):
            yield f"speakers is {self.speakers!r:.40}, not a whole number from 1 to {MOST_SPEAKERS}"
        for name in ("rates", "kernels", "resblock_kernels"):
            if not _sizes(fields[name]):
                yield f"{name} is {fields[name]!r:.60}, not a list of 1 to {MOST_LAYERS} sizes"
        if not isinstance(self.resblock_dilations, tuple) or not all(map(_sizes, self.resblock_dilations)):
            yield f"resblock_dilations is {self.resblock_dilations!r:.60}, not a list of lists of sizes"
        if not isinstance(self.dropout, int | float) or not 0 <= self.dropout < 1:
            yield f"dropout is {self.dropout!r:.40}, not a share below 1"

    def misfits(self) -> Iterator[str]:
        """Sizes without a mistake of their own that do not go together, a clause each."""
        if len(self.rates) != len(self.kernels):
            yield f"there are {len(self.rates)} rates and {len(self.kernels)} kernels"
        for rate, kernel in zip(self.rates, self.kernels, strict=False):
            if kernel < rate or (kernel - rate) % 2:
                yield f"kernel {kernel} at rate {rate} does not make {rate} samples of one: the difference must be even"
        if len(self.resblock_kernels) != len(self.resblock_dilations):
            kernels, dilations = len(self.resblock_kernels), len(self.resblock_dilations)
            yield f"there are {kernels} resblock kernels and {dilations} lists of dilations"
        if any(kernel % 2 == 0 for kernel in self.resblock_kernels):
            yield f"the resblock kernels {list(self.resblock_kernels)} are not all odd"
        if self.channels % 2 ** len(self.rates):
            yield f"{self.channels} channels cannot be halved {len(self.rates)} times"

    def config(self) -> dict[str, Any]:
        """The fields of transformers' `SeamlessM4TConfig` that decide the network, for `config.json`."""
        return {
            "model_type": "seamless_m4t",
            "architectures": ["SeamlessM4TCodeHifiGan"],
            "unit_hifi_gan_vocab_size": self.units,
            "unit_embed_dim": self.embedding,
            "lang_embed_dim": 0,
            "spkr_embed_dim": self.speaker,
            "vocoder_num_langs": 1,
            "vocoder_num_spkrs": self.speakers,
            "upsample_rates": list(self.rates),
            "upsample_kernel_sizes": list(self.kernels),
            "upsample_initial_channel": self.channels,
            "resblock_kernel_sizes": list(self.resblock_kernels),
            "resblock_dilation_sizes": [list(each) for each in self.resblock_dilations],
            "leaky_relu_slope": SLOPE,
            "variance_predictor_kernel_size": DURATION_KERNEL,
            "var_pred_dropout": self.dropout,
            "sampling_rate": self.sample_rate,
        }

    def build(self, device: str = "cpu") -> Any:
        """A `SeamlessM4TCodeHifiGan` of these sizes; on `meta` its tensors have shapes and nothing else."""
        import torch
        from transformers import SeamlessM4TConfig
        from transformers.models.seamless_m4t.modeling_seamless_m4t import SeamlessM4TCodeHifiGan

        with torch.device(device):
            return SeamlessM4TCodeHifiGan(SeamlessM4TConfig(**self.config()))


def write_vocoder(
    folder: Path,
    shape: HifiGanShape,
    weights: Mapping[str, Tensor],
    unit_set: UnitSetIdentity | None,
    speakers: Sequence[str] = (),
) -> None:
    """Write a folder that `echox.speak.vocoder.load_vocoder` opens.

    Args:
        folder: made when absent; files of an earlier vocoder are replaced.
        shape: of the network.
        weights: state of `HifiGanShape.build`, without weight norm.
        unit_set: which units it speaks; None where that is not known.
        speakers: their names, in the order of the rows; none where they have numbers alone.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    write_unit_set(folder, None)  # Interrupted here, it is of unknown units rather than of those of an earlier one.
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")
    config = shape.config()
    if speakers:
        config[SPEAKER_IDS] = {name: row for row, name in enumerate(speakers)}
    write_atomically(folder / "config.json", json.dumps(config, indent=2) + "\n")
    write_unit_set(folder, unit_set)


def _whole(value: object, least: int, most: int = LARGEST) -> bool:
    return type(value) is int and least <= value <= most


def _sizes(value: object) -> bool:
    return isinstance(value, tuple) and 1 <= len(value) <= MOST_LAYERS and all(_whole(each, 1) for each in value)
