"""Losses do not depend on what a tokenizer pads with: nothing, the token that ends a turn, or the unknown token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from echox.builders.setup import TextTools, build_speech_collate, build_stage
from echox.config.load import load_recipe
from echox.stages.s2t import S2TStage

PADS: dict[str, str | None] = {"none": None, "end": "<|im_end|>", "unk": "<unk>"}
SPECIAL = ["<|im_start|>", "<|im_end|>", "<unk>"]


def save_tokenizer(folder: Path, pad: str | None) -> Any:
    """A byte-level tokenizer; its prompt and its answers hold every special token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(letters)}
    bpe = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(SPECIAL)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", unk_token="<unk>", **({"pad_token": pad} if pad else {})
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One LLM under three names that differ in the pad token alone, and an encoder; tiny and random."""
    from transformers import LlamaConfig, LlamaForCausalLM, WhisperConfig, WhisperModel

    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=264,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
    )
    llm = LlamaForCausalLM(config)
    for name, pad in PADS.items():
        tokenizer = save_tokenizer(folder / name, pad)
        llm.config.pad_token_id = tokenizer.pad_token_id
        llm.save_pretrained(folder / name)
    sizes = {"d_model": 16, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_mel_bins": 8}
    layers = {f"{side}_{part}": 2 for side in ("encoder", "decoder") for part in ("layers", "attention_heads")}
    tokens = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 0)
    WhisperModel(WhisperConfig(**sizes, **layers, vocab_size=32, **tokens)).save_pretrained(folder / "whisper")
    return folder


def losses(models: Path, name: str, layout: str) -> dict[str, tuple[Tensor, int]]:
    """Sums and counts of Stage I on rows of very different lengths."""
    recipe = load_recipe(
        "demo/s2t",
        [
            f"model.llm.path={models / name}",
            f"model.speech_encoder.path={models / 'whisper'}",
            f"model.layout={layout}",
            "model.speech_encoder.precomputed=false",
            "model.ctc={vocabulary: llm}",
            "engine.precision=fp32",
        ],
    )
    text = TextTools.load(recipe)
    torch.manual_seed(1)
    stage = build_stage(recipe, text).eval()
    assert isinstance(stage, S2TStage)
    assert stage.s2t.causal_lm.config.pad_token_id == text.tokenizer.pad_token_id
    noise = np.random.default_rng(2)
    collate = build_speech_collate(recipe, text)
    collate.tokenize = text.tokenize_template  # no text of the data holds these tokens, but the LLM's own answers may
    batch = collate.from_audio(
        [noise.standard_normal(size).astype(np.float32) for size in (16000, 5000, 9000)],
        ["sqa", "asr", "sqa"],
        ["ab", "c", "<unk>"],
        ["a long answer<|im_end|>with an end in it", "b", "two <unk> three"],
        ids=["0", "1", "2"],
        weights=[1.0, 1.0, 1.0],
    )
    assert {text.prompt.end, *text.tokenize_template("<unk>")} < set(batch.response_BR.flatten().tolist())
    with torch.no_grad():
        return {key: (term.total, int(term.count)) for key, term in stage(batch).items()}


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_losses_do_not_depend_on_the_pad_token(models: Path, layout: str) -> None:
    without = losses(models, "none", layout)
    assert without["s2t"][1] == (13 + 1 + 17 + 1) + (1 + 1) + (4 + 1 + 6 + 1), "every token of the answers counts"
    for name in ("end", "unk"):
        found = losses(models, name, layout)
        assert {key: count for key, (_, count) in found.items()} == {key: count for key, (_, count) in without.items()}
        for key, (total, _) in found.items():
            assert torch.equal(total, without[key][0]), key
