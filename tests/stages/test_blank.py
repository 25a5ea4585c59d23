"""A micro-batch that lost all its samples counts nothing, and every parameter stays in the graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from echox.audio.features import LogMel
from echox.builders.stages import build_s2t_stage
from echox.stream.collate import PromptTokens, SpeechCollate, UnitCollate
from tests import tiny

PROMPT = PromptTokens(before=[13], after=[14, 15], after_asr=[16, 14, 15], end=tiny.END)


def speech_collate(width: int | None = None) -> SpeechCollate:
    return SpeechCollate(lambda text: [12 + len(text) % 30], PROMPT, LogMel(8), 16_000, precomputed=width)


def stage_and_blank(name: str, layout: str) -> tuple[Any, Any]:
    config = tiny.model_config(layout=layout)
    if name == "t2c":
        return tiny.t2c_stage(config), UnitCollate(lambda text: [12], tiny.Words()).blank(3)
    stage = tiny.echo_stage(layout=layout) if name == "echo" else build_s2t_stage(config, tiny.s2t_model(config))
    return stage, speech_collate().blank(3)


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("name", ["s2t", "t2c", "echo"])
def test_a_blank_micro_batch_counts_nothing_and_reaches_every_parameter(name: str, layout: str) -> None:
    stage, blank = stage_and_blank(name, layout)
    assert blank.ids == [] and blank.step == 3
    stage.train()
    terms = stage(blank)
    assert terms and {term.count.item() for term in terms.values()} == {0.0}
    assert {term.total.item() for term in terms.values()} == {0.0}
    assert not any(stage.known_counts(blank).values())
    sum(term.total for term in terms.values()).backward()
    for key, parameter in stage.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and not parameter.grad.any(), key


def test_a_blank_of_precomputed_features_has_their_width() -> None:
    blank = speech_collate(width=16).blank(0)
    assert blank.features_BTd is not None and blank.features_BTd.shape[2] == 16
    assert not torch.any(blank.weight_B)
