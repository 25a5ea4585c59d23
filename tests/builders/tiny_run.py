"""Writes what a recipe names, at tiny size: LLM and tokenizer, Whisper, unit language, and runs of each stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from echox.builders.unit_sets import LANGUAGE
from echox.config.schema import Recipe
from echox.engine.checkpoint.manifest import MANIFEST, WEIGHTS, checkpoints_folder, step_name, write_manifest
from echox.files import sha256_file
from echox.units.language import UnitLanguage
from tests import tiny

N_UNITS = 7
STOP = 11
"""Token of the full stop."""


def write_models(folder: Path) -> None:
    """`llm`, `whisper` and `language.json`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, WhisperConfig, WhisperModel

    tiny.causal_lm().save_pretrained(folder / "llm")
    words = {("." if token == STOP else f"w{token}"): token for token in range(tiny.VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder / "llm")

    encoder = tiny.whisper_encoder()
    config = WhisperConfig(**{**encoder.config.to_dict(), "decoder_ffn_dim": 32, "vocab_size": 60, "pad_token_id": 0,
                              "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1})  # fmt: skip
    whisper = WhisperModel(config)
    whisper.encoder.load_state_dict(encoder.state_dict())
    whisper.save_pretrained(folder / "whisper")

    random = np.random.default_rng(3)
    pieces = [random.integers(0, N_UNITS, size) for size in (2, 3, 3, 4)]
    corpus = [np.concatenate([pieces[place] for place in random.integers(0, 4, 6)]) for _ in range(30)]
    UnitLanguage.fit(corpus, N_UNITS, vocab_size=N_UNITS + 5).save(folder / "language.json")


def make_recipe(folder: Path, stage: str, **changes: Any) -> Recipe:
    """A recipe on the models in `folder`, in which no option has its default where that could hide a mistake.

    Args:
        folder: of `write_models`.
        stage: of the recipe.
        changes: `echo`, `lora`, `ctc` and `random_init` of the model, `init` of the recipe, in place of those here.
    """
    model = {
        "llm": {
            "path": str(folder / "llm"),
            "lora": {"r": 4, "alpha": 6, "dropout": 0.0, **changes.get("lora", {})},
            "prompt": {"before": "w5 w6", "after": "w7 w8", "end": "w2"},
        },
        "speech_encoder": {"path": str(folder / "whisper"), "margin_s": 0.1},
        "alignment": {"dropout": 0.0},
        "shrink": {"dropout": 0.0},
        "ctc": {"weight": 0.4, **changes.get("ctc", {})},
        "t2c": {
            "layers": 2, "width": 16, "heads": 2, "ffn": 32, "max_positions": 128,
            "prefix": "w3 w4", "unit_header": "w9 w10 w1", "unit_language": str(folder / "language.json"),
        },
        "echo": {
            "segmentation": {"min_tokens": 2, "max_wait": 4, "threshold": 0.05, "look_ahead": 1},
            "units_per_token": 2, "s2t_weight": 0.6, "denoising": {"dropout": 0.0, "ffn": 24},
            **changes.get("echo", {}),
        },
        "random_init": changes.get("random_init", False),
    }  # fmt: skip
    return Recipe.model_validate(
        {
            "name": f"tiny-{stage}",
            "stage": stage,
            "scale": "tiny",
            "model": model,
            "init": changes.get("init", {}),
            "data": {"train": [{"path": "nowhere", "task": "tts" if stage == "t2c" else "sqa"}]},
            "optim": {"steps": 1},
            "engine": {"deepspeed": "ds_configs/cpu.json", "precision": "fp32"},
        }
    )


def randomise(module: nn.Module, seed: int) -> None:
    """Other values for all that trains, as training would leave them: none is what a builder makes by itself."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            if parameter.dim() > 1:
                scale = 0.05 if "lora_" in name else 0.5
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
            else:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def trained(module: nn.Module) -> dict[str, torch.Tensor]:
    """What a checkpoint holds: all that trains, and the tokens of the CTC classes."""
    kept = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}
    return kept | {n: b.clone() for n, b in module.named_buffers() if n.endswith("ctc_head.tokens")}


def write_run(
    run: Path,
    recipe: Recipe,
    tensors: dict[str, torch.Tensor],
    language: UnitLanguage | None = None,
    step: int | None = None,
) -> Path:
    """A run with one checkpoint, which records and keeps its unit language where one is given; its folder.

    The checkpoint is of the last step, unless another is named.
    """
    step = recipe.optim.steps if step is None else step
    checkpoint = checkpoints_folder(run) / step_name(step)
    checkpoint.mkdir(parents=True)
    save_file(tensors, checkpoint / WEIGHTS)
    entry = {"bytes": (checkpoint / WEIGHTS).stat().st_size, "sha256": sha256_file(checkpoint / WEIGHTS)}
    contents: Any = {"recipe": recipe.model_dump(mode="json"), "step": step, "updates": step}
    if language is not None:
        language.save(run / LANGUAGE)
        contents["run_files"] = {LANGUAGE: {"sha256": language.sha256, "about": {"unit_set": None}}}
    write_manifest(checkpoint, contents, {WEIGHTS: entry})
    assert (checkpoint / MANIFEST).is_file()
    return run
