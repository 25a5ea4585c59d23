"""Tiny random networks of the real classes, for tests that need shapes and arithmetic rather than knowledge."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from echox.builders.stages import build_echo_stage, build_s2t, build_t2c, build_t2c_stage
from echox.config.model_schema import LoraConfig, ModelConfig
from echox.errors import DataError
from echox.models.s2t import S2TModel
from echox.models.t2c import T2CDecoder
from echox.release.pretrained import add_lora
from echox.stages.echo import EchoStage
from echox.stages.t2c import T2CStage
from echox.stream.batch import SpeechBatch

VOCABULARY = 48
END = 2
WORDS = 12
PREFIX, HEADER = [5, 6], [7, 8, 9]


def model_config(*, layout: str = "packed", **echo: Any) -> ModelConfig:
    """Recipe section of the tiny models: no dropout anywhere."""
    return ModelConfig.model_validate(
        {
            "layout": layout,
            "llm": {
                "path": "tiny",
                "lora": {"r": 4, "alpha": 8, "dropout": 0.0},
                "prompt": {"before": "a", "after": "b", "end": "c"},
            },
            "speech_encoder": {"path": "tiny"},
            "alignment": {"dropout": 0.0},
            "shrink": {"dropout": 0.0},
            "t2c": {
                "layers": 2, "width": 16, "heads": 2, "ffn": 32, "max_positions": 128,
                "prefix": "p", "unit_header": "h", "unit_language": "u",
            },
            "echo": {"pseudo_text": "argmax_teacher_forced", "denoising": {"dropout": 0.0, "ffn": 24}, **echo},
        }
    )  # fmt: skip


def causal_lm(seed: int = 0) -> Any:
    """A random Llama of width 32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def whisper_encoder(seed: int = 1) -> Any:
    """A random Whisper encoder of width 16 and 8 mel bands."""
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    torch.manual_seed(seed)
    config = WhisperConfig(
        d_model=16,
        encoder_layers=2,
        encoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_layers=1,
        decoder_attention_heads=2,
        num_mel_bins=8,
        init_std=0.2,
        attn_implementation="sdpa",
    )
    return WhisperEncoder(config).eval().requires_grad_(False)


def s2t_model(config: ModelConfig | None = None) -> S2TModel:
    """A tiny S2T model with LoRA whose B matrices are not zero, so that every gradient path is open."""
    config = config or model_config()
    base = causal_lm()
    wrapped = add_lora(base, LoraConfig(r=4, alpha=8, dropout=0.0))
    tokens = torch.tensor([VOCABULARY, *range(VOCABULARY)])
    torch.manual_seed(3)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return build_s2t(config, wrapped, base, whisper_encoder(), tokens)


def t2c_decoder(config: ModelConfig | None = None, *, width: int = 32, seed: int = 4) -> T2CDecoder:
    """A tiny T2C decoder whose greedy output varies and ends."""
    config = config or model_config()
    assert config.t2c is not None
    torch.manual_seed(seed)
    table = torch.nn.Embedding(VOCABULARY, width)
    torch.nn.init.normal_(table.weight, std=1.0)
    decoder = build_t2c(config.t2c, words=WORDS, text_table=table, layout=config.layout)
    for parameter in decoder.body.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.5)
    torch.nn.init.normal_(decoder.head.weight, std=0.5)
    return decoder.eval()


def t2c_stage(config: ModelConfig | None = None) -> T2CStage:
    """A tiny Stage II."""
    torch.manual_seed(6)
    return build_t2c_stage(t2c_decoder(config), torch.nn.Embedding(VOCABULARY, 32), PREFIX, HEADER)


def echo_stage(**echo: Any) -> EchoStage:
    """A tiny Stage III with the Echo decoder initialised from the teacher."""
    config = model_config(**echo)
    teacher, student = t2c_decoder(config), t2c_decoder(config)
    student.load_state_dict(teacher.state_dict())
    return build_echo_stage(
        config.echo,
        s2t=s2t_model(config),
        teacher=teacher,
        echo=student,
        prefix=PREFIX,
        header=HEADER,
        stop_token=11,
        end_token=END,
    )


def speech_batch(rows: int = 4, *, seed: int = 5, step: int = -1) -> SpeechBatch:
    """Random spoken turns of uneven lengths."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(size: int) -> torch.Tensor:
        return torch.randint(12, VOCABULARY, (rows, size), generator=generator)

    frames = torch.tensor([8 * (4 + 3 * row) for row in range(rows)])
    lengths = torch.tensor([4 + 2 * (row % 3) for row in range(rows)])
    response = tokens(int(lengths.max()))
    mask = torch.arange(response.shape[1])[None, :] < lengths[:, None]
    response = response.masked_fill(~mask, 0)
    response[torch.arange(rows), lengths - 1] = END
    spoken = torch.tensor([1 + row % 3 for row in range(rows)])
    return SpeechBatch(
        ids=[str(row) for row in range(rows)],
        step=step,
        weight_B=torch.ones(rows),
        mel_BMT=torch.randn(rows, 8, int(frames.max()), generator=generator),
        frames_B=frames,
        before_BP=tokens(1)[:1].expand(rows, 3).clone(),
        after_BQ=tokens(2),
        after_mask_BQ=torch.ones(rows, 2, dtype=torch.bool),
        response_BR=response,
        response_mask_BR=mask,
        transcript_BC=tokens(3),
        transcript_lengths_B=spoken,
    )


def rows_of(batch: SpeechBatch, rows: Sequence[int]) -> SpeechBatch:
    """Some rows of a batch, with the padding they have there."""
    names = [name for name, value in vars(batch).items() if isinstance(value, torch.Tensor)]
    picked = {name: getattr(batch, name)[list(rows)] for name in names}
    return replace(batch, ids=[batch.ids[row] for row in rows], **picked)


def one_row(batch: SpeechBatch, row: int) -> SpeechBatch:
    """Row `row` alone, cut to its own lengths."""
    frames = int(batch.frames_B[row])
    length = int(batch.response_mask_BR[row].sum())
    after = int(batch.after_mask_BQ[row].sum())
    pick = slice(row, row + 1)
    return SpeechBatch(
        ids=[batch.ids[row]],
        step=batch.step,
        weight_B=batch.weight_B[pick],
        mel_BMT=batch.mel_BMT[pick, :, :frames],
        frames_B=batch.frames_B[pick],
        before_BP=batch.before_BP[pick],
        after_BQ=batch.after_BQ[pick, :after],
        after_mask_BQ=batch.after_mask_BQ[pick, :after],
        response_BR=batch.response_BR[pick, :length],
        response_mask_BR=batch.response_mask_BR[pick, :length],
        transcript_BC=batch.transcript_BC[pick],
        transcript_lengths_B=batch.transcript_lengths_B[pick],
    )


@dataclass(frozen=True)
class Words:
    """A unit language of which each unit is a word: `each` of it, and units from `known` on are unknown."""

    each: Callable[[np.ndarray], np.ndarray] = lambda units: units
    known: int = 1 << 16

    def check(self, units: np.ndarray) -> None:
        if units.size and units.max() >= self.known:
            raise DataError(f"Unit {units.max()} is outside 0 to {self.known - 1}")

    def encode_batch(self, sequences: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [self.each(np.asarray(units)) for units in sequences]
