"""Vocoders of random weights: the embedded one, and a unit HiFi-GAN in transformers' layout."""

from __future__ import annotations

from pathlib import Path

import torch

from echox.speak.unit_mel import UnitMel, UnitMelConfig
from echox.speak.vocoder import UnitMelVocoder

RATE = 16_000


def write_hifi_gan(place: Path) -> Path:
    """A unit HiFi-GAN of 20 units and 320 samples a frame."""
    from safetensors.torch import save_file
    from transformers import SeamlessM4TConfig
    from transformers.models.seamless_m4t.modeling_seamless_m4t import SeamlessM4TCodeHifiGan

    torch.manual_seed(0)
    config = SeamlessM4TConfig(
        unit_hifi_gan_vocab_size=20, unit_embed_dim=16, lang_embed_dim=0, spkr_embed_dim=0, sampling_rate=RATE,
        upsample_rates=[5, 4, 4, 2, 2], upsample_kernel_sizes=[11, 8, 8, 4, 4], upsample_initial_channel=32,
        variance_predictor_kernel_size=3,
    )  # fmt: skip
    config.save_pretrained(place)
    model = SeamlessM4TCodeHifiGan(config)
    # Durations of about two frames rather than none, which the minimum of one would hide.
    model.dur_predictor.proj.bias.data.fill_(1.2)
    save_file(model.state_dict(), place / "model.safetensors")
    return place


def unit_mel(n_units: int) -> UnitMelVocoder:
    """An embedded vocoder whose units have different sounds and lengths."""
    torch.manual_seed(3)
    made = UnitMel(UnitMelConfig(n_units=n_units, width=16, blocks=2, max_duration=6)).eval()
    torch.nn.init.normal_(made.map_RM, std=0.3)
    torch.nn.init.normal_(made.head.weight, std=2.0)
    return UnitMelVocoder(made)
