"""Layers with compiled parts compute what they did, in a few graphs for every batch; odd ones are left alone."""

from __future__ import annotations

import copy
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaMLP

from echox.config.model_schema import LoraConfig
from echox.models.compiled import by_inductor, compile_pointwise
from echox.models.lora import without_lora
from echox.models.norms import fuse_rms_norms
from echox.release.pretrained import add_lora
from tests import tiny
from tests.models.test_lora import SMALL, opened
from tests.regions import Regions

FAMILIES: dict[str, tuple[dict[str, Any], tuple[int, int]]] = {
    "llama": ({}, (2, 2)),
    "qwen2": ({}, (2, 2)),
    "qwen3": ({"head_dim": 8}, (2, 2)),
    "gemma2": ({"head_dim": 8, "pad_token_id": 0}, (2, 2)),  # GELU in place of SiLU
    "glm": ({"head_dim": 8, "pad_token_id": 0, "partial_rotary_factor": 0.5}, (2, 0)),  # turns half of a head
    "gpt2": ({"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}, (0, 0)),
}
"""Configuration, and how many of two layers have a compiled rotary embedding and gated activation."""


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def built(family: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "n_embd": 32, "n_head": 4, "n_layer": 2} if family == "gpt2" else SMALL
    config = AutoConfig.for_model(family, **{**sizes, **FAMILIES[family][0]})
    return AutoModelForCausalLM.from_config(config).requires_grad_(False).eval()


def adapted(base: Any) -> Any:
    torch.manual_seed(5)
    return opened(add_lora(base, LoraConfig(r=4, alpha=6.0, dropout=0.0, targets=("auto",))))


class Called:
    """In place of a compiler: counts the calls of each function, by its name."""

    def __init__(self, calls: Counter[str]) -> None:
        self._calls = calls

    def __call__(self, function: Any, dynamic: bool) -> Any:
        return lambda *parts: self._calls.update([function.__name__]) or function(*parts)


def logits(model: Any, rows: int = 3, length: int = 7, **options: Any) -> Tensor:
    found: Tensor = model(input_ids=torch.arange(rows * length).view(rows, length), use_cache=False, **options).logits
    return found


def trained(model: nn.Module, out: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    out.square().mean().backward()
    return {name: part.grad.clone() for name, part in model.named_parameters() if part.grad is not None}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys() and found
    for name, tensor in wanted.items():
        rounding = 1e-6 * float(tensor.abs().max())
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=rounding, msg=lambda text, n=name: f"{n}{text}")


@pytest.mark.parametrize(
    ("family", "graphs"),
    [
        *((family, False) for family in FAMILIES),
        *(pytest.param(family, True, marks=[pytest.mark.slow] * (family != "llama")) for family in FAMILIES),
    ],
)
def test_families_compute_what_they_did_with_lora_and_recomputed(family: str, graphs: bool) -> None:
    base = built(family)
    plain, ours = adapted(copy.deepcopy(base)), adapted(base)
    names, calls = [name for name, _ in ours.named_parameters()], Counter[str]()
    regions = Regions() if graphs else Called(calls)
    if family == "llama":
        fuse_rms_norms(ours)
        ours.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    kinds = [type(module).__name__ for module in ours.modules()]
    assert compile_pointwise(ours, regions) == FAMILIES[family][1]
    assert compile_pointwise(ours, regions) == (0, 0), "once is enough"
    assert [type(module).__name__ for module in ours.modules()] == kinds
    assert [name for name, _ in ours.named_parameters()] == names
    ours.train()
    found, wanted = logits(ours), logits(plain.train())
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert_same(trained(ours, found), trained(plain, wanted))
    recomputed, (rotary, gated) = 1 + (family == "llama"), FAMILIES[family][1]
    if isinstance(regions, Regions):
        kinds_of_graph = (rotary > 0) + (gated > 0)
        assert regions.graphs == Counter(forward=kinds_of_graph, backward=kinds_of_graph)
        assert regions.runs == Counter(forward=recomputed * (rotary + gated), backward=rotary + gated)
    else:
        assert calls == Counter({"apply_rotary_pos_emb": recomputed * rotary, "gated": recomputed * gated})
    with without_lora(ours), without_lora(plain), torch.no_grad():
        torch.testing.assert_close(logits(ours.eval()), logits(plain.eval()), rtol=1e-5, atol=1e-6)


SHAPES = [(3, 7), (1, 9), (5, 1), (4, 4), (8, 2), (2, 16), (1, 1), (6, 8), (2, 32)]


def test_graphs_hold_for_every_number_and_length_of_rows() -> None:
    """(1, 1) computes as before: sizes of 1 are compiled by themselves."""
    plain, ours, regions = adapted(built("llama")), adapted(built("llama")), Regions()
    compile_pointwise(ours, regions)
    for rows, length in SHAPES:
        found, wanted = logits(ours.train(), rows, length), logits(plain, rows, length)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
        assert_same(trained(ours, found), trained(plain, wanted))
        with torch.no_grad():
            torch.testing.assert_close(logits(ours.eval(), rows, length), wanted, rtol=1e-5, atol=1e-6)
    assert regions.graphs == {"forward": 2, "backward": 2, "without gradients": 2}
    left_padded = torch.ones(2, 6, dtype=torch.long)
    left_padded[0, :2] = 0
    others = {"attention_mask": left_padded, "position_ids": left_padded.cumsum(1) - 1}
    torch.testing.assert_close(logits(ours, 2, 6, **others), logits(plain, 2, 6, **others), rtol=1e-5, atol=1e-6)
    assert sum(regions.graphs.values()) == 6


def losses(stage: Any, batch: Any) -> tuple[Tensor, Tensor]:
    terms = stage(batch)
    return torch.stack([term.total for term in terms.values()]), torch.stack([term.count for term in terms.values()])


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_stage_three_trains_and_decodes_as_before_in_few_graphs(layout: str) -> None:
    plain, regions = tiny.echo_stage(layout=layout, pseudo_text="generated"), Regions()
    ours = copy.deepcopy(plain)
    assert compile_pointwise(ours, regions) == (6, 6)  # the LLM, the teacher and the Echo decoder
    first: dict[str, int] = {}
    for step, rows in enumerate((3, 1, 6, 4)):
        batch = tiny.speech_batch(rows, seed=step, step=step)
        batch.own_BR, batch.own_mask_BR = batch.response_BR, batch.response_mask_BR & (batch.response_BR != tiny.END)
        found = []
        for stage in (ours, plain):
            total, count = losses(stage.train(), replace(batch))
            stage.zero_grad()
            (total / count.clamp(min=1)).sum().backward()
            gradients = {name: part.grad for name, part in stage.named_parameters() if part.grad is not None}
            found.append({"losses": total.detach(), **gradients})
        assert_same(*found)
        first = first or dict(regions.graphs)
    # Rotary embedding of the LLM's heads and of the decoder's, and one activation.
    assert regions.graphs == first == {"forward": 3, "backward": 3}
    for rows in (1, 3):
        said = [stage.s2t.generate(tiny.speech_batch(rows), tiny.END, 6).tokens_BR for stage in (ours, plain)]
        assert torch.equal(*said)
    assert regions.graphs == {**first, "without gradients": 2}


def test_nothing_but_the_given_model_changes() -> None:
    rotary, forward = modeling_llama.apply_rotary_pos_emb, modeling_llama.LlamaAttention.forward
    other, ours, regions = built("llama"), built("llama"), Regions()
    state = torch.random.get_rng_state()
    compile_pointwise(ours, regions)
    assert torch.equal(state, torch.random.get_rng_state()), "no random number is drawn"
    logits(other)
    assert not regions.runs
    assert modeling_llama.apply_rotary_pos_emb is rotary and modeling_llama.LlamaAttention.forward is forward
    logits(ours)
    assert sum(regions.runs.values()) == 4


def small(kind: Any, **options: Any) -> Any:
    return kind(LlamaConfig(hidden_size=8, intermediate_size=12, num_attention_heads=2, **options))


def test_feed_forward_modules_of_another_kind_stay() -> None:
    class Halved(LlamaMLP):
        def forward(self, x: Tensor) -> Tensor:
            half: Tensor = super().forward(x) / 2
            return half

    class Softmax(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.softmax(-1)

    class Learned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.slope = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.slope

    whole_rows, learned, biased = small(LlamaMLP), small(LlamaMLP), small(LlamaMLP)
    whole_rows.act_fn, learned.act_fn = Softmax(), Learned()
    biased.bias = nn.Parameter(torch.zeros(8))
    others = nn.ModuleList([small(Halved), whole_rows, learned, biased, nn.Linear(2, 2)])
    before = [type(module) for module in others]
    assert compile_pointwise(others, Regions()) == (0, 0) and [type(module) for module in others] == before
    assert compile_pointwise(nn.ModuleList([small(LlamaMLP)]), Regions()) == (0, 1)


def test_activations_of_one_class_and_other_settings_are_told_apart() -> None:
    class Scaled(nn.Module):
        def __init__(self, by: float) -> None:
            super().__init__()
            self.by = by

        def forward(self, x: Tensor) -> Tensor:
            return x * self.by

    models, x = [small(LlamaMLP), small(LlamaMLP)], torch.ones(2, 3, 8)
    for number, model in enumerate(models):
        model.act_fn = Scaled(1.0 + number)
    wanted = [model(x) for model in models]
    assert compile_pointwise(nn.ModuleList(models), Regions()) == (0, 2)
    for model, expected in zip(models, wanted, strict=True):
        torch.testing.assert_close(model(x), expected)


def test_attention_whose_rotary_function_wants_rows_stays() -> None:
    def counts_rows(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        _, _, length, _ = q.shape
        return q * length, k

    def per_row(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return q * len(q), k

    for own in (counts_rows, per_row, None, torch.nn.Identity()):
        scope: dict[str, Any] = {"nn": nn, "apply_rotary_pos_emb": own}
        exec("class Turning(nn.Module):\n  def forward(self, q): return apply_rotary_pos_emb(q, q, q, q)", scope)
        assert compile_pointwise(scope["Turning"](), Regions()) == (0, 0)


class Graphs:
    """In place of `torch.compile`: what it is told, and how many graphs it makes, without Inductor."""

    def __init__(self) -> None:
        self.own, self.made, self.options = torch.compile, 0, dict[str, Any]()

    def __call__(self, function: Any, *, options: dict[str, Any], **more: Any) -> Any:
        self.options = options

        def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
            self.made += 1
            return graph.forward

        return self.own(function, backend=backend, **more)


def test_inductor_is_given_whole_functions_and_no_graph_for_every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = Graphs()
    monkeypatch.setattr(torch, "compile", graphs)

    def doubled(x: Tensor) -> Tensor:
        return 2 * x

    def broken(x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return 2 * x

    compiled = by_inductor(doubled, True)
    for size in (3, 7, 5):
        x = torch.arange(float(size))
        assert torch.equal(compiled(x), 2 * x)
    assert graphs.made == 1, "all sizes change"
    assert graphs.options == {"compile_threads": 1}
    torch._dynamo.reset()
    compiled = by_inductor(doubled, False)
    for rows, width in ((3, 4), (7, 4), (5, 4), (5, 6)):
        x = torch.arange(float(rows * width)).view(rows, width)
        torch._dynamo.maybe_mark_dynamic(x, 0)
        assert torch.equal(compiled(x), 2 * x)
    assert graphs.made == 1 + 2, "of what is not marked, each size has its own"
    with pytest.raises(torch._dynamo.exc.Unsupported):
        by_inductor(broken, True)(torch.ones(3))


def test_what_a_rotary_function_is_told_beside_its_four_tensors_is_heeded() -> None:
    """It then computes as before; and the defaults of an attention's forward stay."""

    def turned(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        return q * cos + q.roll(1, -1) * sin, k * cos + k.roll(1, -1) * sin

    plain: dict[str, Any] = {"nn": nn, "apply_rotary_pos_emb": turned}
    exec(
        "class Turning(nn.Module):\n"
        "  def forward(self, q, k, cos, sin, *more, times=3, **named):\n"
        "    q, k = apply_rotary_pos_emb(q, k, cos, sin, *more, **named)\n"
        "    return times * q, k\n",
        plain,
    )
    ours, other, regions = plain["Turning"](), plain["Turning"](), Regions()
    assert compile_pointwise(ours, regions) == (1, 0)
    cos, sin = torch.randn(2, 2, 3, 8)
    heads_first, heads_last = torch.randn(2, 2, 4, 3, 8), torch.randn(2, 2, 3, 4, 8)
    for (q, k), more, named in (
        (heads_first, (), {}),
        (heads_last, (2,), {}),
        (heads_last, (), {"unsqueeze_dim": 2}),
    ):
        for found, wanted in zip(
            ours(q, k, cos, sin, *more, **named), other(q, k, cos, sin, *more, **named), strict=True
        ):
            torch.testing.assert_close(found, wanted)
    assert sum(regions.runs.values()) == 1


def test_no_size_of_heads_and_no_activation_uses_up_the_graphs_of_another() -> None:
    class Scaled(nn.Module):
        def __init__(self, by: int) -> None:
            super().__init__()
            self.by = by

        def forward(self, x: Tensor) -> Tensor:
            return x * self.by

    attention, gates = modeling_llama.LlamaAttention, [small(LlamaMLP) for _ in range(4)]
    for number, gate in enumerate(gates):
        gate.act_fn = Scaled(number)
    turning = LlamaConfig(hidden_size=8, num_attention_heads=2)
    model = nn.ModuleList([attention(turning, 0), *gates])
    plain, regions = copy.deepcopy(model), Regions()
    assert compile_pointwise(model, regions) == (1, 4)
    rotary = type(model[0]).forward.__globals__["apply_rotary_pos_emb"]
    # Dynamo gives up on a function of which it has made so many graphs.
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=2):
        for heads in (1, 2, 3, 4):
            q, k, (cos, sin) = torch.randn(2, heads, 3, 4), torch.randn(2, heads, 3, 4), torch.randn(2, 2, 3, 4)
            torch.testing.assert_close(rotary(q, k, cos, sin), modeling_llama.apply_rotary_pos_emb(q, k, cos, sin))
        for ours, other in zip(model[1:], plain[1:], strict=True):
            torch.testing.assert_close(ours(x := torch.randn(2, 3, 8)), other(x))
    assert regions.graphs == {"without gradients": 8}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++, with which Inductor compiles for a CPU")
def test_inductor_writes_one_kernel_each_way() -> None:
    from torch._inductor import config, metrics

    plain, x_NTh = small(LlamaMLP), torch.linspace(-2, 3, 96).view(3, 4, 8)
    ours = copy.deepcopy(plain)
    compile_pointwise(nn.ModuleList([ours]))
    found = []
    metrics.reset()
    with config.patch(force_disable_caches=True):
        for model in (ours, plain):
            out = model(x_NTh)
            found.append({"out": out, **trained(model, out)})
    assert_same(*found)
    assert metrics.generated_kernel_count == 2
