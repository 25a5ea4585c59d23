"""Text written with LoRA merged and on the static cache, against transformers' forward with LoRA beside the weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from echox.config.model_schema import LoraConfig
from echox.models.lora import without_lora
from echox.models.s2t import S2TModel
from echox.models.static_llama import is_plain_llama
from echox.models.text_decode import StaticRows, TransformersRows
from echox.release.pretrained import add_lora
from tests import tiny
from tests.models.test_families import build
from tests.models.test_lora import opened

UNSEEN = 3
"""No random token."""


def model_of(family: str) -> S2TModel:
    """The tiny S2T model, with an LLM of a family and LoRA that is not zero."""
    torch.manual_seed(2)
    made = tiny.s2t_model().eval()
    base = build(family)
    wrapped = opened(add_lora(base, LoraConfig(r=4, alpha=8, dropout=0.0, targets=["auto"])))
    return S2TModel(made.front_end, wrapped, unseen_token=UNSEEN).eval().requires_grad_(False)


@pytest.mark.parametrize(("family", "static"), [("llama", True), ("qwen2", False), ("gpt2", False)])
def test_a_merged_model_writes_what_it_wrote(family: str, static: bool) -> None:
    model, batch = model_of(family), tiny.speech_batch(5)
    batch.before_BP[:, 1] = batch.after_BQ[1, 0] = UNSEEN  # places that count, and that nothing attends to
    apart = model.generate(batch, tiny.END, 80, early_stop=False)
    assert isinstance(model.cached_rows(), TransformersRows)
    model.merge()
    assert isinstance(model.cached_rows(), StaticRows) == static
    merged = model.generate(batch, tiny.END, 80, early_stop=False)
    # Greedy rows part for good where two tokens are as probable but for rounding.
    same = (merged.tokens_BR == apart.tokens_BR).cumprod(1).bool()
    assert same.float().mean() > 0.9 and same[:, :30].all()
    torch.testing.assert_close(merged.hidden_BRh[same], apart.hidden_BRh[same], rtol=1e-3, atol=1e-3)
    assert len(set(merged.tokens_BR.flatten().tolist())) > 8, "they say different things"


def test_a_merged_model_keeps_its_weights_once_and_its_own_forward() -> None:
    model = model_of("llama")
    updated = copy.deepcopy(model)
    tokens_BT = torch.arange(12).view(2, 6)
    wanted = updated.decoder(input_ids=tokens_BT, use_cache=False).last_hidden_state
    model.merge()
    assert model._static is not None
    maps = [module.base_layer for module in model.llm.modules() if hasattr(module, "base_layer")]
    kept = {each.weight.untyped_storage().data_ptr() for each in maps}
    for layer in model._static._layers:
        for name in ("query_key_value_ho", "attention_out_oh", "gate_up_hf", "down_fh"):
            assert getattr(layer, name).untyped_storage().data_ptr() in kept, name
    torch.testing.assert_close(model.decoder(input_ids=tokens_BT, use_cache=False).last_hidden_state, wanted)
    with pytest.raises(AssertionError, match="cannot be switched off"), without_lora(model.llm):
        pass
    with without_lora(updated.llm):
        plain = updated.decoder(input_ids=tokens_BT, use_cache=False).last_hidden_state
    assert (plain - wanted).abs().max() > 0.01, "LoRA matters"


@pytest.mark.parametrize(
    ("plain", "changed"),
    [
        (True, {}),
        (False, {"attention_bias": True}),
        (False, {"mlp_bias": True}),
        (False, {"hidden_act": "gelu"}),
        (False, {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
        (False, {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}),
    ],
)
def test_only_a_llama_without_additions_is_plain(plain: bool, changed: dict[str, Any]) -> None:
    assert is_plain_llama(build("llama", **changed).model) == plain


@pytest.mark.parametrize("family", ["mistral", "qwen2", "granite"])
def test_other_families_are_not_plain(family: str) -> None:
    assert not is_plain_llama(build(family).model)
