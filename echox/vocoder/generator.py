"""Holds the generator while it trains: weight-normed, with waveform and durations of one forward."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

if TYPE_CHECKING:
    from echox.vocoder.shape import HifiGanShape


class Spoken(NamedTuple):
    """Waveforms `[B, N]`, and the predicted log(1 + frames) of units `[B, U]`."""

    wave_BN: Tensor
    logs_BU: Tensor


class Generator(nn.Module):
    """transformers' `SeamlessM4TCodeHifiGan` with weight norm, for batches.

    Args:
        shape: its sizes.
    """

    def __init__(self, shape: HifiGanShape) -> None:
        super().__init__()
        self.shape = shape
        self.net: Any = shape.build()
        self.net.train()
        _draw(self.net)
        self.net.apply_weight_norm()
        for table in (self.net.speaker_embedding, self.net.language_embedding):
            table.requires_grad_(table.embedding_dim > 0)

    def forward(self, frames_BT: Tensor, speakers_B: Tensor, units_BU: Tensor, mask_BU: Tensor) -> Spoken:
        """Speak segments, and predict the durations of whole clips.

        Args:
            frames_BT: the unit of each frame of 20 ms.
            speakers_B: row of each clip's speaker; 0 in a model of one voice.
            units_BU: units without consecutive duplicates.
            mask_BU: which of them are real.
        """
        return Spoken(self.speak(frames_BT, speakers_B), self.log_durations(units_BU, mask_BU))

    def speak(self, frames_BT: Tensor, speakers_B: Tensor) -> Tensor:
        """Waveforms `[B, T * hop]`; the speaker's vector, where there is one, stands behind that of each unit."""
        vectors_BTD = self.net.unit_embedding(frames_BT)
        if self.shape.speaker:
            speaker_BTD = self.net.speaker_embedding(speakers_B)[:, None].expand(-1, frames_BT.shape[1], -1)
            vectors_BTD = torch.cat([vectors_BTD, speaker_BTD], dim=2)
        wave_BN: Tensor = self.net.hifi_gan(vectors_BTD.transpose(1, 2))
        return wave_BN

    def log_durations(self, units_BU: Tensor, mask_BU: Tensor) -> Tensor:
        """log(1 + frames) `[B, U]`, of each clip as if it were alone: what is padded is 0 before each convolution.

        They are of the units alone, in fairseq as here: a speaker has a sound, and no tempo.
        """
        predictor, real_BU1 = self.net.dur_predictor, mask_BU[..., None]
        hidden_BUD = self.net.unit_embedding(units_BU)
        for conv, norm in ((predictor.conv1, predictor.ln1), (predictor.conv2, predictor.ln2)):
            hidden_BUD = conv((hidden_BUD * real_BU1).transpose(1, 2))
            hidden_BUD = predictor.dropout_module(norm(predictor.activation_function(hidden_BUD).transpose(1, 2)))
        logs_BU: Tensor = predictor.proj(hidden_BUD).squeeze(-1)
        return logs_BU

    def folded(self) -> dict[str, Tensor]:
        """The weights under transformers' names, without weight norm, on the CPU."""
        with torch.no_grad():
            state = {name: tensor for name, tensor in self.net.state_dict().items() if ".parametrizations." not in name}
            for name, module in self.net.named_modules():
                if parametrize.is_parametrized(module):
                    state[f"{name}.weight"] = module.weight
            return {name: tensor.detach().cpu().clone() for name, tensor in state.items()}


def _draw(net: Any) -> None:
    """torch's own new weights, in place of transformers', which are those of a language model.

    HiFi-GAN's code means to draw most of them with a deviation of 0.01, but does it after weight norm has taken their
    place, where it has no effect: the published vocoders began with torch's.
    """
    for module in net.modules():
        if isinstance(module, nn.Conv1d | nn.ConvTranspose1d | nn.Linear | nn.LayerNorm | nn.Embedding):
            module.reset_parameters()
