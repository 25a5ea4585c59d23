"""Parameter counts of the 3B and 8B recipes on the meta device, against the sizes of the released checkpoints."""

from __future__ import annotations

import pytest
import torch

from echox.builders.setup import ctc_tokens
from echox.builders.stages import build_echo_stage, build_s2t, build_t2c
from echox.config.load import load_recipe
from echox.release.pretrained import add_lora, load_causal_lm, load_whisper_encoder

MILLION = 1e6


@pytest.mark.parametrize(
    ("scale", "denoising", "t2c_body", "lora", "llm", "layers"),
    [("3b", 50.3, 25.2, 97.3, 3212.7, 28), ("8b", 117.5, 56.6, 167.8, 8030.3, 32)],
)
def test_parameter_counts(scale: str, denoising: float, t2c_body: float, lora: float, llm: float, layers: int) -> None:
    model = load_recipe(f"{scale}/echo").model
    assert model.speech_encoder is not None and model.t2c is not None
    with torch.device("meta"):
        base = load_causal_lm(model.llm.path, torch.bfloat16, random_init=True)
        encoder = load_whisper_encoder(model.speech_encoder.path, torch.bfloat16, random_init=True)
        llm_size = sum(p.numel() for p in base.parameters())
        table = base.get_input_embeddings()
        s2t = build_s2t(model, add_lora(base, model.llm.lora), base, encoder, ctc_tokens(len(table.weight), None))
        decoders = [build_t2c(model.t2c, words=7500, text_table=table) for _ in range(2)]
        stage = build_echo_stage(
            model.echo,
            s2t=s2t,
            teacher=decoders[0],
            echo=decoders[1],
            prefix=[1],
            header=[1],
            stop_token=13,
            end_token=2,
        )

    def size(prefix: str, part: str = "") -> float:
        return sum(p.numel() for n, p in stage.named_parameters() if n.startswith(prefix) and part in n) / MILLION

    assert llm_size / MILLION == pytest.approx(llm, rel=1e-3)
    assert size("s2t.llm.", "lora_") == pytest.approx(lora, rel=1e-3)
    assert size("denoising.") == pytest.approx(denoising, rel=2e-3)
    assert size("echo.body.") == pytest.approx(t2c_body, rel=2e-3)
    assert size("s2t.front_end.encoder.") == pytest.approx(637.0, rel=5e-3)
    assert base.config.num_hidden_layers == layers
    trainable = sum(p.numel() for p in stage.parameters() if p.requires_grad) / MILLION
    assert trainable == pytest.approx(size("s2t.llm.", "lora_") + size("denoising.") + size("echo."), rel=1e-6)
