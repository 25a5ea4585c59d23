"""Converts the Whisper weights of a CTranslate2 `model.bin` to an ordinary Hugging Face folder.

CTranslate2 binary, version 6: u32 version, string specification, u32 revision, u32 count, then per tensor: name, u8
rank, u32 dimensions, u8 type, u32 bytes, data; at the end u32 count of aliases (two names each). A string is a u16
length that counts its closing zero byte.
"""

from __future__ import annotations

import json
import re
import shutil
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from echox.errors import AlteredModelError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

_TYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
_HEAD_WIDTH = 64
"""Width of an attention head in every Whisper size."""


class _Cursor:
    """A place in the file that moves on as values are taken."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = memoryview(path.read_bytes())
        self.at = 0

    def take(self, size: int) -> memoryview:
        if self.at + size > len(self.data):
            raise AlteredModelError(
                f"CTranslate2 file ends at byte {len(self.data)} inside a record", where=str(self.path)
            )
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, code: str) -> int:
        return int(struct.unpack("<" + code, self.take(struct.calcsize(code)))[0])

    def text(self) -> str:
        return bytes(self.take(self.number("H"))).rstrip(b"\0").decode()


def read_ct2(path: Path) -> dict[str, Array]:
    """Every tensor of a CTranslate2 model file by its name; aliases are left out.

    Raises:
        AlteredModelError: not a Whisper model, an unknown version or tensor type, or a truncated file.
    """
    cursor = _Cursor(path)
    version, specification = cursor.number("I"), cursor.text()
    if version != 6 or specification != "WhisperSpec":
        raise AlteredModelError(
            f"Expected a CTranslate2 version 6 WhisperSpec, found version {version} {specification!r}", where=str(path)
        )
    cursor.number("I")
    tensors: dict[str, Array] = {}
    for _ in range(cursor.number("I")):
        name = cursor.text()
        shape = [cursor.number("I") for _ in range(cursor.number("B"))]
        kind = cursor.number("B")
        if kind not in _TYPES:
            raise AlteredModelError(f"Tensor {name} has the unknown type number {kind}", where=str(path))
        raw = cursor.take(cursor.number("I"))
        tensors[name] = np.frombuffer(raw, dtype=_TYPES[kind]).reshape(shape)
    for _ in range(2 * cursor.number("I")):
        cursor.text()
    if cursor.at != len(cursor.data):
        raise AlteredModelError(f"{len(cursor.data) - cursor.at} bytes follow the end of the model", where=str(path))
    return tensors


class _Tensors(dict[str, "Array"]):
    """Tensors that are taken out one by one; an absent one is an error by name."""

    def __missing__(self, name: str) -> Array:
        raise AlteredModelError(f"The CTranslate2 model has no tensor {name}")

    def take(self, name: str) -> Array:
        value = self[name]
        del self[name]
        return value


def _norm(tensors: _Tensors, source: str) -> dict[str, Array]:
    return {"weight": tensors.take(f"{source}/gamma"), "bias": tensors.take(f"{source}/beta")}


def _attention(tensors: _Tensors, source: str, cross: bool) -> dict[str, Array]:
    """Split fused projections: linear_0 is q, k, v (self) or q (cross; linear_1 is k, v); the last is the output."""
    if cross:
        weights = [tensors.take(f"{source}/linear_0/weight"), *np.split(tensors.take(f"{source}/linear_1/weight"), 2)]
        biases = [tensors.take(f"{source}/linear_0/bias"), *np.split(tensors.take(f"{source}/linear_1/bias"), 2)]
    else:
        weights = np.split(tensors.take(f"{source}/linear_0/weight"), 3)
        biases = np.split(tensors.take(f"{source}/linear_0/bias"), 3)
    last = "linear_2" if cross else "linear_1"
    if np.any(biases[1]):
        raise AlteredModelError(f"{source} has a key bias, which Whisper does not have")
    return {
        "q_proj.weight": weights[0],
        "q_proj.bias": biases[0],
        "k_proj.weight": weights[1],
        "v_proj.weight": weights[2],
        "v_proj.bias": biases[2],
        "out_proj.weight": tensors.take(f"{source}/{last}/weight"),
        "out_proj.bias": tensors.take(f"{source}/{last}/bias"),
    }


def _prefixed(prefix: str, tensors: dict[str, Array]) -> dict[str, Array]:
    return {f"{prefix}.{name}": value for name, value in tensors.items()}


def to_hf_state(tensors: dict[str, Array]) -> dict[str, Array]:
    """Hugging Face names and layouts (of `WhisperForConditionalGeneration`, without the tied `proj_out`) in fp32.

    Raises:
        AlteredModelError: a tensor is absent, or a float tensor of the source has no place in the target.
    """
    left = _Tensors(tensors)
    state: dict[str, Array] = {}
    for name in ("conv1", "conv2"):
        for part in ("weight", "bias"):
            state[f"model.encoder.{name}.{part}"] = left.take(f"encoder/{name}/{part}")
    state["model.decoder.embed_tokens.weight"] = left.take("decoder/embeddings/weight")
    for side in ("encoder", "decoder"):
        state[f"model.{side}.embed_positions.weight"] = left.take(f"{side}/position_encodings/encodings")
        state.update(_prefixed(f"model.{side}.layer_norm", _norm(left, f"{side}/layer_norm")))
        for layer in range(count_layers(tensors, side)):
            source, target = f"{side}/layer_{layer}", f"model.{side}.layers.{layer}"
            blocks = {"self_attn": _attention(left, f"{source}/self_attention", cross=False)}
            blocks["self_attn_layer_norm"] = _norm(left, f"{source}/self_attention/layer_norm")
            if side == "decoder":
                blocks["encoder_attn"] = _attention(left, f"{source}/attention", cross=True)
                blocks["encoder_attn_layer_norm"] = _norm(left, f"{source}/attention/layer_norm")
            blocks["final_layer_norm"] = _norm(left, f"{source}/ffn/layer_norm")
            for ours, theirs in (("fc1", "linear_0"), ("fc2", "linear_1")):
                blocks[ours] = {part: left.take(f"{source}/ffn/{theirs}/{part}") for part in ("weight", "bias")}
            for block, values in blocks.items():
                state.update(_prefixed(f"{target}.{block}", values))
    extra = [name for name, value in left.items() if value.dtype.kind == "f"]
    if extra:
        raise AlteredModelError(f"Tensors without a place in Whisper: {', '.join(extra)}")
    return {name: np.array(value, dtype=np.float32, order="C") for name, value in state.items()}


def count_layers(tensors: dict[str, Array], side: str) -> int:
    """Number of layers of the "encoder" or the "decoder"."""
    found = {match[1] for name in tensors if (match := re.match(rf"{side}/layer_(\d+)/", name))}
    return len(found)


def _configs(
    tensors: dict[str, Array], ct2: dict[str, Any], tokens: dict[str, int]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Model and generation configuration, all from shapes, the token table and the CTranslate2 side file."""
    width, mels, _ = tensors["encoder/conv1/weight"].shape
    shared = {
        "bos_token_id": tokens["<|endoftext|>"],
        "eos_token_id": tokens["<|endoftext|>"],
        "pad_token_id": tokens["<|endoftext|>"],
        "decoder_start_token_id": tokens["<|startoftranscript|>"],
    }
    model: dict[str, Any] = {
        "vocab_size": tensors["decoder/embeddings/weight"].shape[0],
        "num_mel_bins": mels,
        "d_model": width,
        "max_source_positions": tensors["encoder/position_encodings/encodings"].shape[0],
        "max_target_positions": tensors["decoder/position_encodings/encodings"].shape[0],
        **shared,
    }
    for side in ("encoder", "decoder"):
        model[f"{side}_layers"] = count_layers(tensors, side)
        model[f"{side}_attention_heads"] = int(tensors.get(f"{side}/num_heads", np.array(width // _HEAD_WIDTH)))
        model[f"{side}_ffn_dim"] = tensors[f"{side}/layer_0/ffn/linear_0/weight"].shape[0]
    languages = {token: number for token, number in tokens.items() if number in set(ct2.get("lang_ids", ()))}
    generation = {
        **shared,
        "alignment_heads": ct2.get("alignment_heads", []),
        "suppress_tokens": ct2.get("suppress_ids", []),
        "begin_suppress_tokens": ct2.get("suppress_ids_begin", []),
        "is_multilingual": bool(languages),
        "lang_to_id": languages,
        "task_to_id": {name: tokens[f"<|{name}|>"] for name in ("transcribe", "translate")},
        "no_timestamps_token_id": tokens["<|notimestamps|>"],
        "max_initial_timestamp_index": 50,
        "max_length": model["max_target_positions"],
        "return_timestamps": False,
    }
    return model, generation


def convert(source: Path, target: Path) -> None:
    """Write a Hugging Face Whisper folder.

    Args:
        source: folder with `model.bin`, `config.json` and `tokenizer.json` of CTranslate2.
        target: empty folder that gets `model.safetensors` (fp32) and the configuration, generation configuration,
            tokenizer and feature extractor files.

    Raises:
        AlteredModelError: a key of the Hugging Face model is missing, or one is left over.
    """
    import torch
    from transformers import (
        GenerationConfig,
        PreTrainedTokenizerFast,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
    )
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    tensors = read_ct2(source / "model.bin")
    ct2 = json.loads((source / "config.json").read_text(encoding="utf-8"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(source / "tokenizer.json"),
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        model_max_length=1024,
    )
    model_config, generation = _configs(tensors, ct2, tokenizer.get_vocab())
    config = WhisperConfig(**model_config)
    with torch.device("meta"):
        model = WhisperForConditionalGeneration(config)
    state = {name: torch.from_numpy(value) for name, value in to_hf_state(tensors).items()}
    state["proj_out.weight"] = state["model.decoder.embed_tokens.weight"]
    missing, extra = model.load_state_dict(state, strict=False, assign=True)
    if missing or extra:
        raise AlteredModelError(f"Whisper conversion misses {missing} and has left over {extra}", where=str(source))
    model.tie_weights()
    model.generation_config = GenerationConfig(**generation)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    settings_path = target / "tokenizer_config.json"
    settings = json.loads(settings_path.read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "WhisperTokenizer"
    settings_path.write_text(json.dumps(settings, indent=2), encoding="utf-8")
    shutil.copyfile(source / "tokenizer.json", target / "tokenizer.json")
    WhisperFeatureExtractor(feature_size=config.num_mel_bins).save_pretrained(target)
