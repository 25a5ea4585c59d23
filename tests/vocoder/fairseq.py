"""fairseq's code HiFi-GAN, written down again as arithmetic on its own tensors: the oracle of the conversion."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

SMALL: dict[str, Any] = {
    "resblock": "1",
    "num_embeddings": 20,
    "embedding_dim": 16,
    "model_in_dim": 16,
    "upsample_rates": [5, 4, 4, 2, 2],
    "upsample_kernel_sizes": [11, 8, 8, 4, 4],
    "upsample_initial_channel": 64,
    "resblock_kernel_sizes": [3, 7, 11],
    "resblock_dilation_sizes": [[1, 3, 5], [1, 3, 5], [1, 3, 5]],
    "sampling_rate": 16000,
    "code_hop_size": 320,
    "dur_predictor_params": {
        "encoder_embed_dim": 16,
        "var_pred_hidden_dim": 16,
        "var_pred_kernel_size": 3,
        "var_pred_dropout": 0.5,
    },
    "f0": None,
    "multispkr": None,
    "lambda_commit": 0.02,
    "segment_size": 8960,
}
TRUE = {
    **SMALL,
    "num_embeddings": 1000,
    "embedding_dim": 128,
    "model_in_dim": 128,
    "upsample_initial_channel": 512,
    "dur_predictor_params": {"encoder_embed_dim": 128, "var_pred_hidden_dim": 128, "var_pred_kernel_size": 3},
}
AT_24K = {
    **SMALL,
    "sampling_rate": 24000,
    "code_hop_size": 480,
    "upsample_rates": [5, 4, 4, 3, 2],
    "upsample_kernel_sizes": [11, 8, 8, 7, 4],
}
SPEAKERS = {**SMALL, "multispkr": "_", "num_speakers": 7, "model_in_dim": 32}


def random_state(config: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Tensors as fairseq names them, of a size that keeps the sound neither silent nor clipped."""
    chance = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=chance) * std

    def conv(name: str, out: int, into: int, kernel: int, gain: float = 1.0, fold: bool = False) -> None:
        if fold:
            state[f"{name}.weight"] = normal(out, into, kernel, std=(into * kernel) ** -0.5)
        else:
            state[f"{name}.weight_v"] = normal(out, into, kernel)
            state[f"{name}.weight_g"] = gain * (1 + 0.3 * normal(out, 1, 1))
        state[f"{name}.bias"] = normal(out, std=0.1)

    width, channels = config["embedding_dim"], config["upsample_initial_channel"]
    state["dict.weight"] = normal(config["num_embeddings"], width)
    if config["multispkr"]:
        state["spkr.weight"] = normal(config["num_speakers"], width)
    for layer in (1, 2):
        conv(f"dur_predictor.conv{layer}.0", width, width, 3, fold=True)
        state[f"dur_predictor.ln{layer}.weight"] = 1 + 0.2 * normal(width)
        state[f"dur_predictor.ln{layer}.bias"] = normal(width, std=0.2)
    state["dur_predictor.proj.weight"] = normal(1, width, std=0.5 * width**-0.5)
    state["dur_predictor.proj.bias"] = torch.tensor([1.0])
    conv("conv_pre", channels, config["model_in_dim"], 7)
    for number, kernel in enumerate(config["upsample_kernel_sizes"]):
        channels //= 2
        # A transposed convolution has its input channels first, and its norm is over the others.
        conv(f"ups.{number}", 2 * channels, channels, kernel, gain=1.2)
        state[f"ups.{number}.bias"] = normal(channels, std=0.1)
        for place, size in enumerate(config["resblock_kernel_sizes"]):
            block = f"resblocks.{number * len(config['resblock_kernel_sizes']) + place}"
            for step in range(3):
                conv(f"{block}.convs1.{step}", channels, channels, size, gain=0.5)
                conv(f"{block}.convs2.{step}", channels, channels, size, gain=0.5)
    conv("conv_post", 1, channels, 7, gain=0.8)
    return state


def write(folder: Path, config: dict[str, Any], state: Any) -> tuple[Path, Path]:
    """A `g_*` file and its configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"generator": state}, folder / "g_00500000")
    (folder / "config.json").write_text(json.dumps(config))
    return folder / "g_00500000", folder / "config.json"


def durations(state: dict[str, Tensor], units_U: Tensor) -> Tensor:
    """Frames of each unit: max(1, round(exp(p) - 1)) of the duration predictor's p."""
    hidden_1DU = state["dict.weight"][units_U].T[None]
    for layer in (1, 2):
        name = f"dur_predictor.conv{layer}.0"
        hidden_1DU = F.conv1d(hidden_1DU, state[f"{name}.weight"], state[f"{name}.bias"], padding=1).relu()
        centred = hidden_1DU - hidden_1DU.mean(1, keepdim=True)
        hidden_1DU = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()
        scale, shift = (state[f"dur_predictor.ln{layer}.{part}"][:, None] for part in ("weight", "bias"))
        hidden_1DU = hidden_1DU * scale + shift
    logs_U = state["dur_predictor.proj.weight"][0] @ hidden_1DU[0] + state["dur_predictor.proj.bias"]
    return (logs_U.exp() - 1).round().long().clamp_min(1)


def speak(config: dict[str, Any], state: dict[str, Tensor], units_U: Tensor, speaker: int | None = None) -> Tensor:
    """The waveform of deduplicated units with predicted durations."""

    def weight(name: str) -> Tensor:
        v = state[f"{name}.weight_v"]
        norm = torch.stack([row.square().sum().sqrt() for row in v])[:, None, None]
        return state[f"{name}.weight_g"] * (v / norm)

    def conv(x: Tensor, name: str, dilation: int = 1) -> Tensor:
        w = weight(name)
        reach = (w.shape[-1] - 1) * dilation
        return F.conv1d(F.pad(x, (reach // 2, reach // 2)), w, state[f"{name}.bias"], dilation=dilation)

    frames_T = units_U.repeat_interleave(durations(state, units_U))
    x = state["dict.weight"][frames_T].T[None]
    if speaker is not None:
        x = torch.cat([x, state["spkr.weight"][speaker][None, :, None].expand(-1, -1, x.shape[-1])], 1)
    x = conv(x, "conv_pre")
    kernels = len(config["resblock_kernel_sizes"])
    for number, rate in enumerate(config["upsample_rates"]):
        w = weight(f"ups.{number}")
        x = F.leaky_relu(x, 0.1)
        x = F.conv_transpose1d(x, w, state[f"ups.{number}.bias"], stride=rate, padding=(w.shape[-1] - rate) // 2)
        outs = []
        for place in range(kernels):
            y = x
            for step, dilation in enumerate(config["resblock_dilation_sizes"][place]):
                block = f"resblocks.{number * kernels + place}"
                inner = conv(F.leaky_relu(y, 0.1), f"{block}.convs1.{step}", dilation)
                y = y + conv(F.leaky_relu(inner, 0.1), f"{block}.convs2.{step}")
            outs.append(y)
        x = sum(outs[1:], outs[0]) / kernels
    return conv(F.leaky_relu(x, 0.01), "conv_post").tanh().reshape(-1)
