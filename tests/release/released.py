"""Writes tiny releases of random weights in the layout of the published models, from its description alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

H, HEADS, FFN, LAYERS, A = 32, 4, 48, 2, 16
"""LLM width, heads of queries and keys, feed-forward, layers; width of the Whisper encoder."""
V, EOT, PATCH = 128_257, 128_009, 128_256
WORDS = ["▁0", "▁1_2", "▁3", "_4", "5", "▁6_1", "▁2"]
"""Bodies of the unit tokens: pieces over words, one of which begins inside a number."""
ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192}  # fmt: skip


def config(*, tied: bool, words: list[str], **changes: Any) -> dict[str, Any]:
    """`config.json`, as transformers 4 wrote it."""
    return {
        "architectures": ["EchoXForCausalLM"], "model_type": "EchoX", "vocab_size": V, "hidden_size": H,
        "intermediate_size": FFN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS, "head_dim": H // HEADS, "hidden_act": "silu", "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0, "rope_scaling": ROPE, "max_position_embeddings": 131072,
        "tie_word_embeddings": tied, "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009],
        "pad_token_id": EOT, "torch_dtype": "float16", "use_cache": False, "audio_tower": "../whisper",
        "adapter_size": A, "unit_output": "finetune_kd_online", "unit_model": "large", "unit_vocab_size": len(words),
        "unit_vocab": "vocab.txt", "audio_token_len": 1, **changes,
    }  # fmt: skip


def tensors(*, tied: bool, words: int, seed: int = 0, text_table: str = "head") -> dict[str, Tensor]:
    """All tensors, float16. `text_table`: head, input or own."""
    generator = torch.Generator().manual_seed(seed)

    def some(*shape: int, scale: float = 0.3) -> Tensor:
        return (scale * torch.randn(shape, generator=generator)).half()

    def ones(size: int) -> Tensor:
        return (1 + 0.2 * torch.randn(size, generator=generator)).half()

    found: dict[str, Tensor] = {"model.embed_tokens.weight": some(V, H, scale=1.0)}

    def llama(prefix: str, layers: int, width: int, ffn: int) -> None:
        for n in range(layers):
            at = f"{prefix}layers.{n}."
            for part in "qkvo":
                found[f"{at}self_attn.{part}_proj.weight"] = some(width, width)
            found[f"{at}mlp.gate_proj.weight"] = some(ffn, width)
            found[f"{at}mlp.up_proj.weight"] = some(ffn, width)
            found[f"{at}mlp.down_proj.weight"] = some(width, ffn)
            found[f"{at}input_layernorm.weight"] = ones(width)
            found[f"{at}post_attention_layernorm.weight"] = ones(width)
        found[f"{prefix}norm.weight"] = ones(width)

    def attention(name: str) -> None:
        found[f"{name}.in_proj_weight"], found[f"{name}.in_proj_bias"] = some(3 * H, H), some(3 * H)
        found[f"{name}.out_proj.weight"], found[f"{name}.out_proj.bias"] = some(H, H), some(H)

    def affine(name: str, weight: Tensor) -> None:
        found[f"{name}.weight"], found[f"{name}.bias"] = weight, some(len(weight))

    llama("model.", LAYERS, H, FFN)
    if not tied:
        found["lm_head.weight"] = some(V, H, scale=1.0)
    affine("model.mm_projector1", some(H, 2 * A))
    attention("model.asr_transformer_encoder.layers.0.self_attn")
    affine("model.asr_transformer_encoder.layers.0.norm1", ones(H))
    affine("model.asr_transformer_encoder.layers.0.norm2", ones(H))
    affine("model.asr_transformer_encoder.layers.0.linear1", some(2 * H, H))
    affine("model.asr_transformer_encoder.layers.0.linear2", some(H, 2 * H))
    affine("model.out_norm", ones(H))
    found["model.audio_feature_head.weight"] = some(V, H)
    attention("model.lbm.encoder_attn")
    affine("model.lbm.atten_layer_norm", ones(H))
    tables = {"input": "model.embed_tokens.weight", "head": "lm_head.weight"}
    own = text_table if not (tied and text_table == "head") else "input"
    found["unit_translator.model.embed_tokens.weight"] = found[tables[own]].clone() if own in tables else some(V, H)
    found["unit_translator.unit_embedding.weight"] = some(words, H, scale=1.0)
    affine("unit_translator.adapter", some(H, H))
    llama("unit_translator.model.", 2, H, FFN)
    found["unit_translator.lm_head.weight"] = some(V + words, H)
    # As trained: words, and the end from time to time; no text, which is never the most probable as a mean of words.
    head = found["unit_translator.lm_head.weight"]
    head[:V] = head[V:].float().mean(0).half()
    head[EOT] = some(H)
    affine("unit_translator.aligner_MLP.0", some(FFN, H))
    affine("unit_translator.aligner_MLP.3", some(H, FFN))
    return found


def tokenizer(folder: Path, words: list[str] | None) -> None:
    """Llama 3's numbers where the templates and the released code name them, on a vocabulary of whole words.

    Without `words` it is stock: no placeholder of speech, no units.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    own = {"\n": 198, " arrested": 12800, "speaker": 65576, "system": 9125, "user": 882, "assistant": 78191, ".": 13}
    by_number = {number: text for text, number in own.items()}
    vocabulary = {by_number.get(number, f"w{number}"): number for number in range(128_000)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n| ?[^\s<]+"), "isolated")
    made.decoder = decoders.Fuse()
    special = {128_000: "<|begin_of_text|>", EOT: "<|eot_id|>"}
    special |= {128_006: "<|start_header_id|>", 128_007: "<|end_header_id|>"}
    made.add_special_tokens([special.get(n, f"<|reserved_{n}|>") for n in range(128_000, PATCH)])
    if words is not None:
        made.add_tokens(["<audio_patch>"])
    made.add_tokens([AddedToken(f"<|unit_{word}|>", normalized=False) for word in words or []])
    made.save(str(folder / "tokenizer.json"))
    content = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin_of_text|>",
               "eos_token": "<|eot_id|>", "pad_token": "<|eot_id|>", "clean_up_tokenization_spaces": False}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(content))


def whisper(folder: Path) -> None:
    """The encoder it was trained with: 30 s, width A, 8 mel bands."""
    from transformers import WhisperConfig, WhisperModel

    torch.manual_seed(1)
    made = WhisperConfig(
        d_model=A, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=32, decoder_layers=1,
        decoder_attention_heads=2, decoder_ffn_dim=32, num_mel_bins=8, init_std=0.2, vocab_size=60, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    WhisperModel(made).save_pretrained(folder)


def write(
    folder: Path,
    *,
    tied: bool,
    words: list[str] | None = None,
    text_table: str = "head",
    shards: int = 1,
    change: Callable[[dict[str, Tensor]], object] = lambda weights: None,
    keys: Mapping[str, Any] | None = None,
    tokenizer_from: Path | None = None,
) -> dict[str, Tensor]:
    """A whole release; returns its tensors. `tokenizer_from`: another of the same words, whose tokenizer is taken."""
    words = WORDS if words is None else words
    folder.mkdir(parents=True)
    weights = tensors(tied=tied, words=len(words), text_table=text_table)
    change(weights)
    (folder / "config.json").write_text(json.dumps(config(tied=tied, words=words, **(keys or {}))))
    if tokenizer_from is None:
        tokenizer(folder, words)
    else:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(tokenizer_from / name, folder / name)
    names = sorted(weights)
    parts = [names[n::shards] for n in range(shards)]
    files = [f"model-{n + 1:05d}-of-{shards:05d}.safetensors" for n in range(shards)]
    files = ["model.safetensors"] if shards == 1 else files
    for file, part in zip(files, parts, strict=True):
        save_file({name: weights[name].contiguous() for name in part}, folder / file, metadata={"format": "pt"})
    if shards > 1:
        where = {name: file for file, part in zip(files, parts, strict=True) for name in part}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return weights
