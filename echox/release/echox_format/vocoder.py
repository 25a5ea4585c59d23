"""Turns the released vocoder, fairseq's code HiFi-GAN, into a folder that our unit HiFi-GAN loads; the sound stays."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echox.files import read_json
from echox.release.folders import belongs

if TYPE_CHECKING:
    from torch import Tensor

CONFIG, WEIGHTS = "vocoder_config.json", "g_00500000"
FOLDER = "vocoder"
"""Of an imported folder."""
_OURS = {"dict.": "unit_embedding.", "ups.": "hifi_gan.upsampler.", "dur_predictor.": "dur_predictor."}
_IN_HIFI_GAN = ("conv_pre.", "conv_post.", "resblocks.")
_NUMBERS = {
    "num_embeddings": "unit_hifi_gan_vocab_size",
    "embedding_dim": "unit_embed_dim",
    "sampling_rate": "sampling_rate",
    "upsample_initial_channel": "upsample_initial_channel",
}
_LISTS = ("upsample_rates", "upsample_kernel_sizes", "resblock_kernel_sizes", "resblock_dilation_sizes")


def is_there(release: Path) -> bool:
    """Whether a release has a vocoder."""
    return all((release / name).is_file() and belongs(release, release / name) for name in (CONFIG, WEIGHTS))


def read_vocoder(release: Path) -> tuple[dict[str, Any], dict[str, Tensor], list[str]]:
    """Configuration and weights in transformers' layout (`SeamlessM4TCodeHifiGan`), and what is wrong with them."""
    try:
        given = read_json(release / CONFIG)
        if not isinstance(given, dict):
            raise TypeError("no JSON object")
        config, problems = _config(given)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return {}, {}, [f"{CONFIG} cannot be read: {error!r:.100}"]
    try:
        state = _state(release / WEIGHTS)
        tensors = _tensors(state)
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, EOFError, pickle.UnpicklingError) as error:
        said = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        return config, {}, [*problems, f"{WEIGHTS} cannot be read as tensors alone: {said}"]
    return config, tensors, [*problems, *([] if problems else _unfit(config, tensors))]


def write_vocoder(config: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write the folder of a unit HiFi-GAN."""
    from safetensors.torch import save_file
    from transformers import SeamlessM4TConfig

    folder.mkdir()
    SeamlessM4TConfig(**config).save_pretrained(folder)
    save_file(dict(tensors), folder / "model.safetensors")


def _config(given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    duration = given["dur_predictor_params"]
    problems = [f"{CONFIG}: {name} is on, which our vocoder has not" for name in ("f0", "multispkr") if given.get(name)]
    problems += [f"{CONFIG}: embedder_params are given, which our vocoder has not"] * bool(given.get("embedder_params"))
    if str(given.get("resblock", "1")) != "1":
        problems.append(f"{CONFIG}: resblock is {given['resblock']!r:.20}, not '1'")
    width = given["embedding_dim"]
    for what, value in (
        ("var_pred_hidden_dim", duration.get("var_pred_hidden_dim", width)),
        ("model_in_dim", given.get("model_in_dim", width)),
    ):
        if value != width:
            problems.append(f"{CONFIG}: {what}={value!r:.20} is not embedding_dim={width!r:.20}")
    config = {ours: given[theirs] for theirs, ours in _NUMBERS.items()} | {name: given[name] for name in _LISTS}
    config["variance_predictor_kernel_size"] = duration["var_pred_kernel_size"]
    problems += [
        f"{CONFIG}: {name} is {value!r:.40}, not a size"
        for name, value in config.items()
        if name not in _LISTS and (type(value) is not int or not 0 < value < 1 << 20)
    ]
    return {
        **config,
        "lang_embed_dim": 0,
        "spkr_embed_dim": 0,
        "vocoder_num_langs": 1,
        "vocoder_num_spkrs": 1,
    }, problems


def _state(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint; nothing in it is executed."""
    import torch

    state = torch.load(path, map_location="cpu", weights_only=True)["generator"]
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError("its generator is no set of tensors")
    return state


def _tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Under our names, with weight norm folded: g v / |v|, over all dimensions but the first."""
    import torch

    folded: dict[str, Tensor] = {}
    for name, value in state.items():
        base, _, last = name.rpartition(".")
        if last == "weight_v":
            gain = state[f"{base}.weight_g"].float()
            folded[f"{base}.weight"] = torch._weight_norm(value.float(), gain, 0)
        elif last != "weight_g":
            folded[name] = value.float()
    ours = {_named(name): value.contiguous() for name, value in folded.items()}
    # Without languages and speakers their tables are empty, and must be there.
    return ours | {f"{part}_embedding.weight": torch.zeros(1, 0) for part in ("language", "speaker")}


def _named(name: str) -> str:
    for theirs, ours in _OURS.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs).replace("conv1.0.", "conv1.").replace("conv2.0.", "conv2.")
    return f"hifi_gan.{name}" if name.startswith(_IN_HIFI_GAN) else name


def _unfit(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> list[str]:
    """Tensors that the configuration does not ask for, or asks for in another shape."""
    import torch
    from transformers import SeamlessM4TConfig
    from transformers.models.seamless_m4t.modeling_seamless_m4t import SeamlessM4TCodeHifiGan

    try:
        with torch.device("meta"):
            wanted = SeamlessM4TCodeHifiGan(SeamlessM4TConfig(**config)).state_dict()
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        return [f"{CONFIG} describes no vocoder: {error!s:.100}"]
    shapes = {name: tuple(value.shape) for name, value in wanted.items()}
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    problems = [
        f"{WEIGHTS}: {name} is {found.get(name, 'missing')}, {CONFIG} makes it {shapes.get(name, 'nothing')}"
        for name in sorted(shapes.keys() | found.keys())
        if shapes.get(name) != found.get(name)
    ]
    bad = [name for name, value in tensors.items() if not bool(value.isfinite().all())]
    return problems + [f"{WEIGHTS}: {name} holds numbers that are not finite" for name in bad]
