"""The CTranslate2 reader and converter on a tiny made-up Whisper, against the Hugging Face model it was made from."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, WhisperConfig, WhisperForConditionalGeneration

from echox.errors import AlteredModelError
from echox.release.whisper_ct2 import convert, count_layers, read_ct2

SPECIAL = [
    "<|endoftext|>",
    "<|startoftranscript|>",
    "<|en|>",
    "<|de|>",
    "<|translate|>",
    "<|transcribe|>",
    "<|notimestamps|>",
]


def tiny_model() -> WhisperForConditionalGeneration:
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=20 + len(SPECIAL),
        d_model=64,
        encoder_layers=2,
        decoder_layers=3,
        encoder_attention_heads=1,
        decoder_attention_heads=1,
        encoder_ffn_dim=96,
        decoder_ffn_dim=80,
        max_source_positions=50,
        max_target_positions=12,
        pad_token_id=20,
        bos_token_id=20,
        eos_token_id=20,
        decoder_start_token_id=21,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    model = WhisperForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def fused(model: WhisperForConditionalGeneration) -> dict[str, np.ndarray]:
    """The same weights under CTranslate2's names."""
    state = {name: value.detach().numpy() for name, value in model.state_dict().items()}
    out: dict[str, np.ndarray] = {"decoder/embeddings/weight": state["model.decoder.embed_tokens.weight"]}

    def norm(source: str, target: str) -> None:
        out[f"{target}/gamma"], out[f"{target}/beta"] = state[f"{source}.weight"], state[f"{source}.bias"]

    def linear(source: str, target: str) -> None:
        out[f"{target}/weight"], out[f"{target}/bias"] = state[f"{source}.weight"], state[f"{source}.bias"]

    def attention(source: str, target: str, cross: bool) -> None:
        q, k, v = (state[f"{source}.{name}_proj.weight"] for name in "qkv")
        bq, bv = state[f"{source}.q_proj.bias"], state[f"{source}.v_proj.bias"]
        zero = np.zeros_like(bq)
        if cross:
            out[f"{target}/linear_0/weight"], out[f"{target}/linear_0/bias"] = q, bq
            out[f"{target}/linear_1/weight"], out[f"{target}/linear_1/bias"] = (
                np.concatenate([k, v]),
                np.concatenate([zero, bv]),
            )
        else:
            out[f"{target}/linear_0/weight"] = np.concatenate([q, k, v])
            out[f"{target}/linear_0/bias"] = np.concatenate([bq, zero, bv])
        linear(f"{source}.out_proj", f"{target}/linear_{2 if cross else 1}")

    for side in ("encoder", "decoder"):
        out[f"{side}/position_encodings/encodings"] = state[f"model.{side}.embed_positions.weight"]
        out[f"{side}/num_heads"] = np.array(1, np.int16)
        norm(f"model.{side}.layer_norm", f"{side}/layer_norm")
        for index in range(2 if side == "encoder" else 3):
            source, target = f"model.{side}.layers.{index}", f"{side}/layer_{index}"
            attention(f"{source}.self_attn", f"{target}/self_attention", cross=False)
            norm(f"{source}.self_attn_layer_norm", f"{target}/self_attention/layer_norm")
            if side == "decoder":
                attention(f"{source}.encoder_attn", f"{target}/attention", cross=True)
                norm(f"{source}.encoder_attn_layer_norm", f"{target}/attention/layer_norm")
            norm(f"{source}.final_layer_norm", f"{target}/ffn/layer_norm")
            linear(f"{source}.fc1", f"{target}/ffn/linear_0")
            linear(f"{source}.fc2", f"{target}/ffn/linear_1")
    linear("model.encoder.conv1", "encoder/conv1")
    linear("model.encoder.conv2", "encoder/conv2")
    return out


def write_ct2(path: Path, tensors: dict[str, np.ndarray], version: int = 6) -> None:
    codes = {np.dtype(np.float32): 0, np.dtype(np.int16): 2, np.dtype(np.float16): 4}

    def text(value: str) -> bytes:
        return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"

    data = struct.pack("<I", version) + text("WhisperSpec") + struct.pack("<II", 3, len(tensors))
    for name, value in tensors.items():
        data += text(name) + struct.pack("<B", value.ndim) + b"".join(struct.pack("<I", n) for n in value.shape)
        data += struct.pack("<BI", codes[value.dtype], value.nbytes) + value.tobytes()
    data += struct.pack("<I", 1) + text("decoder/projection/weight") + text("decoder/embeddings/weight")
    path.write_bytes(data)


def write_source(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    folder.mkdir()
    write_ct2(folder / "model.bin", tensors)
    (folder / "config.json").write_text(
        json.dumps({"lang_ids": [22, 23], "suppress_ids": [1], "suppress_ids_begin": [2], "alignment_heads": [[0, 0]]})
    )
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(20)}, unk_token="w0"))
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(folder / "tokenizer.json"))


def test_every_type_and_shape_is_read(tmp_path: Path) -> None:
    tensors: dict[str, Any] = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.array(7, np.int16),
        "c": np.ones((2, 1, 2), np.float16),
    }
    write_ct2(tmp_path / "m.bin", tensors)
    got = read_ct2(tmp_path / "m.bin")
    assert list(got) == list(tensors)
    assert all(np.array_equal(got[name], tensors[name]) and got[name].dtype == tensors[name].dtype for name in tensors)


def test_ten_or_more_layers_are_counted() -> None:
    names = {f"encoder/layer_{i}/ffn/linear_0/weight": np.zeros(1) for i in range(12)} | {
        "encoder/layer_norm/gamma": np.zeros(1)
    }
    assert count_layers(names, "encoder") == 12


def test_converted_model_computes_what_the_original_does(tmp_path: Path) -> None:
    original = tiny_model()
    write_source(tmp_path / "ct2", fused(original))
    convert(tmp_path / "ct2", tmp_path / "hf")
    model, info = WhisperForConditionalGeneration.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    mel, tokens = torch.randn(2, 80, 100), torch.tensor([[21, 3, 4], [21, 5, 6]])
    with torch.no_grad():
        expected = original(input_features=mel, decoder_input_ids=tokens).logits
        got = model.eval()(input_features=mel, decoder_input_ids=tokens).logits
    assert torch.allclose(got, expected, atol=1e-5)
    assert model.generation_config.lang_to_id == {"<|en|>": 22, "<|de|>": 23}
    assert model.generation_config.task_to_id == {"translate": 24, "transcribe": 25}
    assert model.generation_config.no_timestamps_token_id == 26
    assert (model.config.encoder_layers, model.config.decoder_layers, model.config.decoder_ffn_dim) == (2, 3, 80)
    assert AutoTokenizer.from_pretrained(tmp_path / "hf").convert_tokens_to_ids("<|en|>") == 22


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[: len(data) // 2], "ends at byte"),
        (lambda data: data + b"x", "follow the end"),
        (lambda data: struct.pack("<I", 5) + data[4:], "version 5"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, damage: Any, message: str) -> None:
    write_ct2(tmp_path / "m.bin", {"a": np.ones(8, np.float32)})
    (tmp_path / "m.bin").write_bytes(damage((tmp_path / "m.bin").read_bytes()))
    with pytest.raises(AlteredModelError, match=message):
        read_ct2(tmp_path / "m.bin")


def test_left_over_and_missing_tensors_are_refused(tmp_path: Path) -> None:
    tensors = fused(tiny_model())
    write_source(tmp_path / "extra", tensors | {"encoder/gate": np.ones(2, np.float32)})
    with pytest.raises(AlteredModelError, match="encoder/gate"):
        convert(tmp_path / "extra", tmp_path / "hf1")
    biased = tensors | {"encoder/layer_0/self_attention/linear_0/bias": np.ones(192, np.float32)}
    write_source(tmp_path / "biased", biased)
    with pytest.raises(AlteredModelError, match="key bias"):
        convert(tmp_path / "biased", tmp_path / "hf2")
    lacking = {name: value for name, value in tensors.items() if name != "encoder/conv2/weight"}
    write_source(tmp_path / "lacking", lacking)
    with pytest.raises(AlteredModelError, match="encoder/conv2/weight"):
        convert(tmp_path / "lacking", tmp_path / "hf3")
