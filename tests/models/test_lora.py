"""Our LoRA against PEFT's own layers, which stay the oracle: outputs, gradients, names."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from echox.config.model_schema import LoraConfig
from echox.models.lora import FusedForward, without_lora
from echox.release import pretrained
from echox.release.pretrained import add_lora
from tests import tiny

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "phi3": {"pad_token_id": 0},
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "qwen2": {},
}
SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def built(family: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 64} if family == "gpt2" else SMALL
    config = AutoConfig.for_model(family, **{**sizes, **FAMILIES[family]})
    return AutoModelForCausalLM.from_config(config).requires_grad_(False)


def opened(wrapped: nn.Module) -> nn.Module:
    """With B that are not zero, so that every gradient path is open."""
    torch.manual_seed(1)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    return wrapped


def both(monkeypatch: pytest.MonkeyPatch, base: Any, config: LoraConfig) -> tuple[nn.Module, nn.Module]:
    """The model with our LoRA, and with PEFT's of the same weights."""
    torch.manual_seed(5)
    ours = opened(add_lora(copy.deepcopy(base), config))
    monkeypatch.setattr(pretrained, "fuse_lora", lambda wrapped: None)
    torch.manual_seed(5)
    return ours, opened(add_lora(copy.deepcopy(base), config))


def gradients(model: Any, work: Callable[[Any], Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    out = work(model)
    out.square().mean().backward()
    return out, {name: part.grad for name, part in model.named_parameters() if part.grad is not None}


def logits(model: Any) -> Tensor:
    found: Tensor = model(input_ids=torch.arange(21).view(3, 7), use_cache=False).logits
    return found


@pytest.mark.parametrize(("family", "checkpointing"), [*((family, False) for family in FAMILIES), ("llama", True)])
def test_outputs_and_gradients_are_pefts(family: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    base = built(family)
    if checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    config = LoraConfig(r=4, alpha=6.0, dropout=0.0, targets=("auto",))
    ours, peft = (model.train() for model in both(monkeypatch, base, config))
    assert any(isinstance(part, FusedForward) for part in ours.modules())
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in peft.named_parameters()]
    found, expected = gradients(ours, logits), gradients(peft, logits)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6)
    assert found[1].keys() == expected[1].keys() and any("lora_A" in name for name in found[1])
    for name, gradient in expected[1].items():
        torch.testing.assert_close(
            found[1][name], gradient, rtol=1e-4, atol=1e-8, msg=lambda text, n=name: f"{n}{text}"
        )
    with without_lora(ours), without_lora(peft):
        torch.testing.assert_close(logits(ours), logits(peft), rtol=0, atol=0)
        assert not torch.allclose(logits(ours), found[0], atol=1e-4)
    torch.testing.assert_close(logits(ours), found[0])


def test_what_peft_writes_of_ours_is_what_it_writes_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    ours, peft = both(monkeypatch, built("llama"), LoraConfig(r=4, alpha=6.0, dropout=0.1))
    for model, name in ((ours, "ours"), (peft, "peft")):
        model.save_pretrained(tmp_path / name)  # type: ignore[operator]
    files = sorted(path.name for path in (tmp_path / "ours").iterdir())
    assert "adapter_model.safetensors" in files
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "peft" / name).read_bytes()


class _Kernels(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and func is not torch.ops.aten._unsafe_view.default:
            self.seen[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_maps_that_read_the_same_vectors_share_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    base = built("llama")
    counts = []
    for wrapped in both(monkeypatch, base, LoraConfig(r=4, alpha=6.0, dropout=0.0)):
        layer = wrapped.get_base_model().model.layers[0]  # type: ignore[operator, union-attr]
        for part in layer.modules():
            if isinstance(part, FusedForward):
                part.lora_input.stacked = torch.cat([each.a.weight for each in part.lora_input.members]).detach()
        x = torch.randn(2, 3, 32)
        with _Kernels() as kernels, torch.no_grad():
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                layer.self_attn.get_submodule(name)(x)  # type: ignore[union-attr, operator]
            for name in ("gate_proj", "up_proj"):
                layer.mlp.get_submodule(name)(x)  # type: ignore[union-attr, operator]
            layer.mlp.down_proj(torch.randn(2, 3, 48))  # type: ignore[union-attr, operator]
        counts.append(sum(kernels.seen.values()) - 1)  # but for randn
    assert counts == [18, 35]


def test_dropout_is_drawn_once_for_a_shared_input_and_none_in_evaluation() -> None:
    base = built("llama")
    wrapped = opened(add_lora(base, LoraConfig(r=4, alpha=4.0, dropout=0.5))).train()
    attention = wrapped.get_base_model().model.layers[0].self_attn  # type: ignore[operator, union-attr]
    x = torch.randn(2, 3, 32)

    def seen(part: Any, y: Tensor) -> Tensor:
        """What B of the map was given: it is square here, so it can be inverted."""
        update = part(y) - part.base_layer(y)
        return torch.linalg.lstsq(part.b.weight, update.reshape(-1, update.shape[-1]).T).solution.T  # type: ignore[no-any-return]

    torch.manual_seed(3)
    q, k = seen(attention.q_proj, x), seen(attention.k_proj, x)
    torch.manual_seed(3)
    dropped = nn.functional.dropout(x, 0.5).reshape(-1, 32)
    for found, part in ((q, attention.q_proj), (k, attention.k_proj)):
        torch.testing.assert_close(found, dropped @ part.a.weight.T, rtol=1e-3, atol=1e-4)
    wrapped.eval()
    torch.testing.assert_close(
        seen(attention.q_proj, x), x.reshape(-1, 32) @ attention.q_proj.a.weight.T, rtol=1e-3, atol=1e-4
    )


def test_nothing_of_an_input_is_kept_once_all_have_taken_their_part() -> None:
    wrapped = add_lora(built("llama"), LoraConfig(r=4, alpha=4.0, dropout=0.0))
    logits(wrapped)
    inputs = [part.lora_input for part in wrapped.modules() if isinstance(part, FusedForward)]
    assert inputs and not any(each._parts or each._of for each in inputs)


def test_another_input_is_not_taken_for_the_one_that_was_computed() -> None:
    wrapped = opened(add_lora(tiny.causal_lm(), LoraConfig(r=4, alpha=4.0, dropout=0.0))).eval()
    attention = wrapped.get_base_model().model.layers[0].self_attn  # type: ignore[operator, union-attr]
    x, y = torch.randn(2, 3, 32), torch.randn(2, 3, 32)
    _, alone, _ = attention.q_proj(y), attention.k_proj(y), attention.v_proj(y)
    attention.q_proj(x)
    torch.testing.assert_close(attention.k_proj(y), alone)
