"""Answers that the LLM makes while it trains are those it makes when asked, and cost one pass over the audio."""

from __future__ import annotations

import pytest
import torch

from echox.stages.echo import EchoStage, PseudoTargets
from tests import tiny


def stage(*, checkpointing: bool = False, lora_dropout: float = 0.0) -> EchoStage:
    made = tiny.echo_stage(pseudo_text="free_run", free_run_tokens=6, segmentation={"mode": "none"})
    if checkpointing:
        made.s2t.causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
    for name, module in made.s2t.llm.named_modules():
        if "lora_dropout.default" in name:
            # PEFT leaves an Identity where the rate is 0.
            name, _, key = name.rpartition(".")
            made.s2t.llm.get_submodule(name)[key] = torch.nn.Dropout(lora_dropout)
        elif "lora_B.default" in name:
            torch.nn.init.normal_(module.weight, std=0.5)  # it starts at zero, where LoRA does nothing
    return made


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_text_is_what_the_model_answers_when_asked(checkpointing: bool) -> None:
    batch = tiny.speech_batch(4)
    model = stage(checkpointing=checkpointing)
    expected = model.eval().s2t.generate(batch, tiny.END, 6, early_stop=False)
    with torch.no_grad():
        out = model.train().s2t(batch)
    found = model.pseudo_text(batch, out, None)
    assert torch.equal(found.tokens_BR, expected.tokens_BR) and torch.equal(found.spoken_BR, expected.mask_BR)
    assert model.s2t.llm.training, "the mode is the one before"


def test_dropout_does_not_change_the_text() -> None:
    batch = tiny.speech_batch(4)
    model = stage(lora_dropout=0.5).train()
    texts = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        with torch.no_grad():
            texts.append(model.pseudo_text(batch, model.s2t(batch), None).tokens_BR)
    assert torch.equal(*texts)


def test_the_audio_is_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = stage().train(), []
    encode = model.s2t.encode_speech
    monkeypatch.setattr(model.s2t, "encode_speech", lambda batch, **how: calls.append(1) or encode(batch, **how))
    model(tiny.speech_batch(4))
    assert calls == [1]


def test_what_was_found_without_dropout_is_what_training_learns() -> None:
    batch = tiny.speech_batch(4)
    model = stage().eval()
    with torch.no_grad():
        counted = {name: float(term.count) for name, term in model(batch).items()}
    assert isinstance(batch.targets, PseudoTargets)
    kept = batch.targets
    terms = model.train()(batch)
    assert {name: float(term.count) for name, term in terms.items()} == counted
    assert batch.targets is kept
