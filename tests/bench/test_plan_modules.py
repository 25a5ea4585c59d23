"""What `echox plan` takes for tensors, sizes and activations, against the real modules on the meta device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from echox.bench.plan import load, memory
from echox.bench.plan.load import stage_costs
from echox.bench.plan.memory import layer_bytes_per_token, state_bytes
from echox.bench.plan.shapes import stage_shape
from echox.builders.setup import TextTools, build_stage
from echox.config.load import load_recipe
from echox.models import chunked_heads
from echox.models.flops import flops_by_part, llm_costs
from echox.models.packed_attention import use_packed_attention
from echox.models.ragged import PackedRows
from echox.models.sizes import llm_size
from echox.release.pretrained import add_lora
from echox.release.shapes import SHAPES

LLAMA = {"3b": "meta-llama/Llama-3.2-3B-Instruct", "8b": "meta-llama/Llama-3.1-8B-Instruct"}


@pytest.fixture(autouse=True)
def no_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ECHOX_CACHE", str(tmp_path))


def _on_meta(name: str) -> tuple[Any, Any]:
    recipe = load_recipe(name, ["model.random_init=true", "engine.precision=bf16", "init.s2t=null", "init.t2c=null"])
    text = TextTools.load(recipe)
    with torch.device("meta"):
        return recipe, build_stage(recipe, text, transcripts=range(1000))


@pytest.mark.parametrize("name", ["demo/s2t", "demo/t2c", "demo/echo", "3b/echo", "8b/s2t"])
def test_tensors_sizes_and_costs_are_those_of_the_modules(name: str) -> None:
    recipe, stage = _on_meta(name)
    shape = stage_shape(recipe)
    parameters = list(stage.parameters())
    assert sorted(shape.trainable) == sorted(p.numel() for p in parameters if p.requires_grad)
    assert sorted(shape.frozen) == sorted(p.numel() for p in parameters if not p.requires_grad)
    planned = stage_costs(recipe, shape)
    own = {part: row for part, row in stage._costs.items() if part != "speech_encoder" or part in planned}
    assert planned == own
    if name == "demo/echo":
        trainable = [p for p in parameters if p.requires_grad]
        master = [nn.Parameter(torch.empty_like(p, dtype=torch.float32)) for p in trainable]
        adam = torch.optim.AdamW(master, foreach=False)
        for each in master:
            each.grad = torch.empty_like(each)
        adam.step()
        moments = [t for state in adam.state.values() for key, t in state.items() if key != "step"]
        found = state_bytes(recipe, shape, 1)
        assert found["frozen weights"] == _bytes(p for p in parameters if not p.requires_grad)
        assert found["trainable weights"] == _bytes(trainable)
        assert found["fp32 master weights"] == _bytes(master) == found["gradients"]
        assert found["Adam's moments"] == _bytes(moments)


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _llama(scale: str, layers: int, dropout: float) -> tuple[Any, Any]:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {**SHAPES[LLAMA[scale]], "num_hidden_layers": layers}
    shape.pop("model_type")
    lora = load_recipe(f"{scale}/echo").model.llm.lora.model_copy(update={"dropout": dropout})
    with torch.device("meta"):
        config = LlamaConfig(**shape)
        llm = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
        wrapped = add_lora(llm.requires_grad_(False), lora)
    use_packed_attention(llm)
    for module in wrapped.modules():
        for owner, attribute, members in getattr(module, "stacked_weights", tuple)():
            # Behind each other in memory, as the engine lays them.
            stacked = torch.cat([member.weight for member in members]).detach().requires_grad_()
            setattr(owner, attribute, stacked)
            module.register_buffer("stacked_weight", stacked, persistent=False)
    return llm, wrapped.train()


def _states(llm: Any, tokens: int) -> torch.Tensor:
    width = llm.config.hidden_size
    embedded = torch.empty(1, tokens, width, device="meta", dtype=torch.bfloat16, requires_grad=True)
    rows = PackedRows(torch.tensor([tokens], device="meta"), tokens, tokens)
    hidden: torch.Tensor = llm.model(inputs_embeds=embedded, use_cache=False, **rows.causal()).last_hidden_state
    return hidden


class _Flash(torch.autograd.Function):
    """Keeps what flash attention keeps; the meta device would compute all scores in fp32."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        out, sums = torch.empty_like(query), query.new_empty(query.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, sums)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return ctx.saved_tensors[:3]


@pytest.mark.parametrize("scale", ["3b", "8b"])
@pytest.mark.parametrize("dropout", [0.0, 0.05])
def test_activations_of_a_layer_are_what_its_tensors_save(
    scale: str, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda query, key, value, **_: _Flash.apply(query, key, value)
    )
    tokens = 512
    llm, _ = _llama(scale, 2, dropout)
    layers, sizes = llm.model.layers, []
    for count in (1, 2):
        llm.model.layers = layers[:count]
        sizes.append(_saved_bytes(llm, lambda: _states(llm, tokens)) / tokens)
    planned = stage_shape(load_recipe(f"{scale}/echo")).llm
    found = layer_bytes_per_token(planned, rank=64, dropout=dropout > 0)
    found += 2 * (2 * planned.width - 4)  # a norm that is not fused keeps its input in fp32
    if dropout:  # masks have the type of what they mask on this device, and a byte an element on a GPU
        found += 2 * planned.width + planned.heads * planned.head_width + planned.ffn
    assert found == pytest.approx(sizes[1] - sizes[0], rel=0.02)


def _saved_bytes(llm: Any, compute: Any) -> int:
    """Bytes of the distinct storages that a forward saves, weights left out."""
    seen: dict[int, torch.Tensor] = {}
    weights = {weight.untyped_storage()._cdata for weight in (*llm.parameters(), *llm.buffers())}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage()._cdata not in weights:
            seen[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = compute()
    del kept
    return sum(tensor.untyped_storage().nbytes() for tensor in seen.values())


def test_a_chunk_of_logits_is_as_large_as_the_heads_make_it() -> None:
    assert memory.CHUNK_ELEMENTS == chunked_heads.CHUNK_ELEMENTS
    recipe = load_recipe("3b/s2t")
    shape, rows = stage_shape(recipe), load.rows_of(recipe, load.Sample())
    few, many = (memory.activation_bytes(recipe, shape, rows, samples) for samples in (1, 64))
    assert few["a chunk of logits"] < many["a chunk of logits"] == memory.CHUNK_ELEMENTS * memory.LOGIT_BYTES


@pytest.mark.parametrize("scale", ["3b", "8b"])
def test_the_llm_costs_what_torch_counts_at_true_shapes(scale: str) -> None:
    tokens = 64
    llm, _ = _llama(scale, SHAPES[LLAMA[scale]]["num_hidden_layers"], 0.0)
    with FlopCounterMode(display=False) as counted:
        _states(llm, tokens).sum().backward()
    pairs = tokens * (tokens + 1) / 2
    counts = {"llm": tokens, "llm_live": tokens, "llm_pairs": pairs, "llm_live_pairs": pairs}
    found = sum(flops_by_part(llm_costs(llm_size(llm), inputs_live=True), counts).values())
    assert found == pytest.approx(counted.get_total_flops(), rel=0.01)
