"""Loading an LLM: which attention it gets, which of its maps get an adapter, and what is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from echox.config.model_schema import LoraConfig
from echox.errors import RecipeError
from echox.release.pretrained import add_lora, load_causal_lm
from tests import tiny

SMALL = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}


def built(family: str, **more: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**SMALL, **more}))


def adapted(model: Any) -> set[str]:
    """Names of the linear maps with an adapter, without their layer."""
    names = {name.partition(".lora_A")[0] for name, _ in model.named_parameters() if "lora_A" in name}
    return {name.rpartition(".")[2] for name in names}


def test_a_name_that_no_layer_has_is_listed_with_what_the_layers_have() -> None:
    llm = built("phi3")
    with pytest.raises(RecipeError) as caught:
        add_lora(llm, LoraConfig())
    text = str(caught.value)
    assert "does not match every layer of Phi3ForCausalLM" in text
    for name in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"):
        assert f"{name} in none of 2 layers" in text
    assert "o_proj in" not in text and "down_proj in" not in text
    assert "[o_proj, qkv_proj, gate_up_proj, down_proj], or to auto" in text
    assert adapted(llm) == set()


def test_the_names_of_the_advice_work_and_auto_finds_them_itself() -> None:
    named = add_lora(built("phi3"), LoraConfig(targets=("qkv_proj", "gate_up_proj", "o_proj", "down_proj")))
    itself = add_lora(built("phi3"), LoraConfig(targets=("auto",)))
    assert adapted(named) == adapted(itself) == {"qkv_proj", "gate_up_proj", "o_proj", "down_proj"}


def test_a_name_that_only_some_layers_have_is_refused() -> None:
    llm = tiny.causal_lm()
    del llm.model.layers[1].mlp.up_proj
    llm.model.layers[1].mlp.up_proj = torch.nn.Identity()
    with pytest.raises(RecipeError, match=r"up_proj in 1 of 2 layers\. Fix: .*, gate_proj, down_proj\], or to auto"):
        add_lora(llm, LoraConfig())


def test_part_of_a_name_is_no_match() -> None:
    with pytest.raises(RecipeError, match="proj in none of 2 layers"):
        add_lora(tiny.causal_lm(), LoraConfig(targets=("proj",)))
    wrapped = add_lora(tiny.causal_lm(), LoraConfig(targets=("self_attn.q_proj",)))
    assert adapted(wrapped) == {"q_proj"}


def test_auto_is_the_default_of_a_llama() -> None:
    default, auto = LoraConfig(), LoraConfig(targets=("auto",))
    assert adapted(add_lora(tiny.causal_lm(), default)) == adapted(add_lora(tiny.causal_lm(), auto))


def test_auto_leaves_routers_of_experts_alone() -> None:
    wrapped = add_lora(built("phimoe", num_local_experts=4, num_experts_per_tok=2), LoraConfig(targets=("auto",)))
    assert adapted(wrapped) == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_what_peft_cannot_adapt_is_a_mistake_of_the_recipe() -> None:
    llm = built("mamba", state_size=4)
    with pytest.raises(RecipeError, match=r"model\.llm\.lora\.targets cannot all be adapted: .*out_proj"):
        add_lora(llm, LoraConfig(targets=("auto",)))


@pytest.mark.parametrize(("family", "attention"), [("gemma2", "eager"), ("gpt_oss", "eager"), ("llama", "sdpa")])
def test_a_model_gets_the_attention_that_its_class_has(family: str, attention: str, tmp_path: Path) -> None:
    more = {"num_local_experts": 2} if family == "gpt_oss" else {}
    built(family, **more).save_pretrained(tmp_path)
    llm = load_causal_lm(str(tmp_path), torch.float32)
    assert llm.config._attn_implementation == attention
    assert not any(parameter.requires_grad for parameter in llm.parameters())


def test_what_is_no_llm_of_text_is_refused_by_name(tmp_path: Path) -> None:
    from transformers import AutoConfig

    (tmp_path / "model.safetensors").touch()
    AutoConfig.for_model("whisper").save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match=r"\(whisper\) is an encoder with a decoder\. Fix: use a causal LM of text"):
        load_causal_lm(str(tmp_path), torch.float32)
    AutoConfig.for_model("fuyu").save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match=r"\(fuyu\) is multimodal"):
        load_causal_lm(str(tmp_path), torch.float32)
    AutoConfig.for_model("clip").save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match=r"\(clip\) is no causal LM that transformers has a class for"):
        load_causal_lm(str(tmp_path), torch.float32)
