"""The released vocoder after import against fairseq's layers put together by hand, and bad ones refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from echox.release.echox_format.vocoder import read_vocoder, write_vocoder
from echox.speak.vocoder import load_vocoder

UNITS, WIDTH, CHANNELS = 12, 8, 16
RATES, KERNELS, BLOCKS, DILATIONS = [5, 4, 4, 2, 2], [11, 8, 8, 4, 4], [3, 7], [[1, 3, 5], [1, 3, 5]]


def write(folder: Path) -> dict[str, Tensor]:
    """`g_00500000` and `vocoder_config.json` as fairseq's training leaves them, weight-normed."""
    generator = torch.Generator().manual_seed(0)

    def some(*shape: int, scale: float = 0.2) -> Tensor:
        return scale * torch.randn(shape, generator=generator)

    state: dict[str, Tensor] = {"dict.weight": some(UNITS, WIDTH, scale=1.0)}
    for layer in (1, 2):
        state[f"dur_predictor.conv{layer}.0.weight"] = some(WIDTH, WIDTH, 3)
        state[f"dur_predictor.conv{layer}.0.bias"] = some(WIDTH)
        state[f"dur_predictor.ln{layer}.weight"] = 1 + some(WIDTH)
        state[f"dur_predictor.ln{layer}.bias"] = some(WIDTH)
    state["dur_predictor.proj.weight"], state["dur_predictor.proj.bias"] = some(1, WIDTH), torch.tensor([1.2])

    def normed(name: str, *shape: int, bias: int) -> None:
        state[f"{name}.weight_v"] = some(*shape)
        state[f"{name}.weight_g"] = 0.5 + some(shape[0], *[1] * (len(shape) - 1)).abs()
        state[f"{name}.bias"] = some(bias)

    normed("conv_pre", CHANNELS, WIDTH, 7, bias=CHANNELS)
    width = CHANNELS
    for up, kernel in enumerate(KERNELS):
        normed(f"ups.{up}", width, width // 2, kernel, bias=width // 2)
        width //= 2
        for block, size in enumerate(BLOCKS):
            for convs in ("convs1", "convs2"):
                for n in range(3):
                    normed(f"resblocks.{up * len(BLOCKS) + block}.{convs}.{n}", width, width, size, bias=width)
        if width == 1:
            break
    normed("conv_post", 1, width, 7, bias=1)
    state["conv_post.weight_g"] *= 10
    torch.save({"generator": state}, folder / "g_00500000")
    config = {
        "resblock": "1", "upsample_rates": RATES[: up + 1], "upsample_kernel_sizes": KERNELS[: up + 1],
        "upsample_initial_channel": CHANNELS, "resblock_kernel_sizes": BLOCKS, "resblock_dilation_sizes": DILATIONS,
        "num_embeddings": UNITS, "embedding_dim": WIDTH, "model_in_dim": WIDTH, "sampling_rate": 16000,
        "dur_predictor_params": {"encoder_embed_dim": WIDTH, "var_pred_hidden_dim": WIDTH, "var_pred_kernel_size": 3,
                                 "var_pred_dropout": 0.5},
    }  # fmt: skip
    (folder / "vocoder_config.json").write_text(json.dumps(config))
    return state


def spoken(state: dict[str, Tensor], units: list[int]) -> Tensor:
    """What fairseq's generator makes of units, with predicted durations."""

    def conv(name: str, x: Tensor, dilation: int = 1) -> Tensor:
        v, g = state[f"{name}.weight_v"], state[f"{name}.weight_g"]
        weight = g * v / v.norm(dim=(1, 2), keepdim=True)
        return F.conv1d(x, weight, state[f"{name}.bias"], padding=(v.shape[2] - 1) // 2 * dilation, dilation=dilation)

    part = "dur_predictor."
    x = state["dict.weight"][units].T[None]
    y = x
    for layer in (1, 2):
        y = F.relu(F.conv1d(y, state[f"{part}conv{layer}.0.weight"], state[f"{part}conv{layer}.0.bias"], padding=1))
        y = F.layer_norm(y.transpose(1, 2), (WIDTH,), state[f"{part}ln{layer}.weight"], state[f"{part}ln{layer}.bias"])
        y = y.transpose(1, 2)
    log = F.linear(y.transpose(1, 2), state[f"{part}proj.weight"], state[f"{part}proj.bias"])[0, :, 0]
    durations = torch.clamp(torch.round(torch.exp(log) - 1).long(), min=1)
    assert len(set(durations.tolist())) > 1
    x = conv("conv_pre", torch.repeat_interleave(x, durations, dim=2))
    for up in range(sum(name.startswith("ups.") and name.endswith("_v") for name in state)):
        v, g = state[f"ups.{up}.weight_v"], state[f"ups.{up}.weight_g"]
        weight = g * v / v.norm(dim=(1, 2), keepdim=True)
        x = F.conv_transpose1d(F.leaky_relu(x, 0.1), weight, state[f"ups.{up}.bias"], stride=RATES[up],
                               padding=(KERNELS[up] - RATES[up]) // 2)  # fmt: skip
        parts = []
        for block in range(len(BLOCKS)):
            z = x
            for n, dilation in enumerate(DILATIONS[block]):
                name = f"resblocks.{up * len(BLOCKS) + block}"
                inner = conv(f"{name}.convs1.{n}", F.leaky_relu(z, 0.1), dilation)
                z = z + conv(f"{name}.convs2.{n}", F.leaky_relu(inner, 0.1))
            parts.append(z)
        x = torch.stack(parts).mean(0)
    return torch.tanh(conv("conv_post", F.leaky_relu(x)))[0, 0]


def test_an_imported_vocoder_sounds_as_the_released_layers(tmp_path: Path) -> None:
    state = write(tmp_path)
    config, tensors, problems = read_vocoder(tmp_path)
    assert problems == []
    write_vocoder(config, tensors, tmp_path / "vocoder")
    units = [1, 5, 3, 11, 0, 7, 2, 2, 9]
    (wave,) = load_vocoder(tmp_path / "vocoder")([np.array(units, np.uint16)])
    wanted = spoken(state, units)
    assert len(wave) == len(wanted) > 1000 and float(wanted.std()) > 0.01
    np.testing.assert_allclose(wave, wanted.numpy(), rtol=0, atol=2e-5)


class Bomb:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("ran"),))


def config_key(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        content = json.loads((folder / "vocoder_config.json").read_text())
        (folder / "vocoder_config.json").write_text(json.dumps({**content, **changes}))

    return edit


def without(name: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        state = torch.load(folder / "g_00500000", weights_only=True)
        state["generator"].pop(name)
        torch.save(state, folder / "g_00500000")

    return edit


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: torch.save({"generator": Bomb()}, folder / "g_00500000"), "cannot be read as tensors alone"),
        (lambda folder: (folder / "g_00500000").write_bytes(b"PK\x03\x04"), "cannot be read as tensors alone"),
        (config_key(f0=True), "f0 is on"),
        (config_key(multispkr="x"), "multispkr is on"),
        (config_key(resblock="2"), "resblock is '2'"),
        (config_key(model_in_dim=9), "model_in_dim=9 is not embedding_dim=8"),
        (config_key(num_embeddings="many"), "not a size"),
        (config_key(dur_predictor_params=None), "vocoder_config.json cannot be read"),
        (without("conv_pre.bias"), "hifi_gan.conv_pre.bias is missing"),
        (without("conv_pre.weight_g"), "cannot be read as tensors alone"),
    ],
)
def test_a_bad_vocoder_is_refused_and_never_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], None], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path)
    damage(tmp_path)
    problems = read_vocoder(tmp_path)[2]
    assert len(problems) == 1 and said in problems[0], problems
    assert not (tmp_path / "ran").exists()
