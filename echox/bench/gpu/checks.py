"""Checks that a device computes what a CPU does: the first cells of `echox bench gpu`, and the tests marked `gpu`.

Every check is a function of the device. It returns a sentence with the number it found, and raises AssertionError with
another where that is not good enough. On a CPU each compares two paths as well.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from echox.bench.gpu.build import build, vocabulary_of
from echox.bench.gpu.sizes import SIZES, STAGES
from echox.bench.imposed import imposed
from echox.bench.micro_batch import micro_batch
from echox.bench.naive import naive_losses
from echox.bench.optimizer import PlainAdamW, total_loss
from echox.bench.oracle import dynamic_greedy
from echox.bench.teacher import random_teacher, random_text
from echox.bench.techniques import technique
from echox.models import packed_attention
from echox.models.ragged import PackedRows
from echox.models.rotary import keep_rotary_float32

CPU = torch.device("cpu")
BF16 = 0.03
"""Largest relative difference of a loss, or of a gradient's norm, between bf16 and float32."""
_NO_DROPOUT = {"model__llm__lora__dropout": 0.0, "model__alignment__dropout": 0.0, "model__shrink__dropout": 0.0}


def toy(stage: str, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    """A toy stage with the same weights wherever it is, and its batch; both without dropout."""
    extra: dict[str, Any] = {}
    if stage == "echo":  # and cut where no rounding moves the cut
        extra = {"model__echo__denoising__dropout": 0.0, "model__echo__segmentation__mode": "fixed"}
        extra["model__echo__segmentation__fixed_tokens"] = 5
    recipe, size = SIZES["toy"].recipe(stage, **_NO_DROPOUT, **extra), SIZES["toy"]
    made = build(recipe, CPU, torch.float32)
    batch = micro_batch(recipe, vocabulary_of(recipe), size.load, torch.float32)
    return made.to(device, dtype).train(), batch.to(device)


def device_equals_cpu(device: torch.device) -> str:
    """Losses and gradients of all stages in bf16 on the device are those of a CPU in float32, but for rounding."""
    worst = 0.0
    for stage in STAGES:
        (wanted, norms), (found, others) = (
            _losses_and_norms(stage, where, dtype) for where, dtype in ((CPU, torch.float32), (device, torch.bfloat16))
        )
        gaps = [abs(found[name] - value) / max(abs(value), 0.1) for name, value in wanted.items()]
        gaps.append(abs(norms - others) / norms)
        assert max(gaps) <= BF16, f"stage {stage}: {found} on {device} in bf16, {wanted} on a CPU in float32"
        worst = max(worst, *gaps)
    return f"losses and gradient norms differ by {worst:.1e} at most"


def naive_equals_engine(device: torch.device) -> str:
    """The naive loop has the losses of the stages, in float32."""
    worst = 0.0
    for stage in STAGES:
        made, batch = toy(stage, device, torch.float32)
        with imposed(made, 3.0), torch.no_grad():
            made.eval()
            if stage == "t2c":
                wanted, found = made(batch), naive_losses(made, batch, limit_ends=True)
            else:
                with technique("trimmed audio").off(made, batch) as heard:
                    found = naive_losses(made, heard, limit_ends=True)
                    wanted = made(heard)
        for name, term in wanted.items():
            gap = abs(float(found[name].total) - float(term.total)) / max(abs(float(term.total)), 1e-6)
            assert gap <= 1e-4, f"stage {stage}: {name} differs by {gap:.1e}"
            worst = max(worst, gap)
    return f"losses differ by {worst:.1e} at most"


def graph_equals_eager(device: torch.device) -> str:
    """Words of replayed steps are those of steps that run one by one, and in float32 those of transformers."""
    compared = 0
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        config: Any = SIZES["toy"].recipe("t2c").model.t2c
        decoder = random_teacher(config, 64, 500, torch.float32).to(device, dtype)
        text, tokens_N = random_text(decoder, 6, 12)
        limit_N = tokens_N * 7
        with technique("graph").off(None, None):
            eager = decoder.greedy(text, limit_N)
        for _ in range(2):
            again = decoder.greedy(text, limit_N)
            same = torch.equal(again.words_NM, eager.words_NM)
            assert same, f"in {dtype} a graph says other words than its steps"
        if dtype == torch.float32:
            slow = dynamic_greedy(decoder, text, limit_N)
            assert torch.equal(slow.words_NM, eager.words_NM), "static steps say other words than transformers"
        compared += int(eager.mask_NM.sum())
    return f"{compared} words, token for token"


def resumes(device: torch.device) -> str:
    """A run that is saved and loaded in its midst ends as one that was not."""
    straight = _train(device, save_at=None)
    resumed = _train(device, save_at=2)
    gap = max(float((a - b).abs().max()) for a, b in zip(straight, resumed, strict=True))
    # A GPU adds gradients in any order (atomics), so that "bit for bit" is promised on a CPU.
    limit = 0.0 if device.type == "cpu" else 1e-4
    assert gap <= limit, f"weights differ by {gap:.1e} after a resume, {limit:g} is allowed"
    return f"weights after four steps differ by {gap:.1e}"


def rotary_stays_float32(device: torch.device) -> str:
    """Rotary angles of a decoder cast to bf16 are right at position 600."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(hidden_size=64, num_attention_heads=1)
    rotary: Any = torch.nn.ModuleList([LlamaRotaryEmbedding(config)])
    keep_rotary_float32(rotary)
    rotary = rotary.to(device, torch.bfloat16)[0]
    cos, _ = rotary(torch.zeros(1, 1, 64, device=device), torch.tensor([[600]], device=device))
    turns = 1.0 / (10000.0 ** (torch.arange(0, 64, 2, dtype=torch.float64) / 64))
    gap = float((cos[0, 0, :32].cpu().double() - (600 * turns).cos()).abs().max())
    assert rotary.inv_freq.dtype == torch.float32 and gap < 1e-3, f"cosines at position 600 are off by {gap:.2g}"
    return f"cosines at position 600 are off by {gap:.1e}"


def packed_equals_masked(device: torch.device) -> str:
    """Attention within packed rows, and its gradient, is that of each row alone."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    lengths = [70, 1, 33, 128]
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(sum(lengths), heads, 64, generator=generator) for heads in (8, 2, 2)]
    rows = PackedRows(torch.tensor(lengths, device=device), max(lengths), sum(lengths))
    worst = 0.0
    for causal in (True, False):
        found = _attended(parts, device, dtype, lambda q, k, v, c=causal: _packed(q, k, v, rows, c))
        wanted = _attended(parts, CPU, torch.float32, lambda q, k, v, c=causal: _alone(q, k, v, lengths, c))
        gaps = [
            float((one.float().cpu() - other).norm() / other.norm()) for one, other in zip(found, wanted, strict=True)
        ]
        limit = 0.02 if dtype == torch.bfloat16 else 1e-5
        assert max(gaps) <= limit, f"packed attention is off by {max(gaps):.1e}, causal: {causal}"
        worst = max(worst, *gaps)
    return f"output and gradients differ by {worst:.1e} at most"


CHECKS: dict[str, Callable[[torch.device], str]] = {
    "device = CPU within bf16": device_equals_cpu,
    "naive loop = engine": naive_equals_engine,
    "graph = eager": graph_equals_eager,
    "resume": resumes,
    "rotary in float32": rotary_stays_float32,
    "packed attention = rows alone": packed_equals_masked,
}


def _losses_and_norms(stage: str, device: torch.device, dtype: torch.dtype) -> tuple[dict[str, float], float]:
    made, batch = toy(stage, device, dtype)
    with imposed(made, 3.0):
        if stage == "echo":  # where two words are nearly as probable, bf16 may say the other one
            _fix_words(made)
        terms = made(batch)
        total_loss(made, terms).backward()
    squares = [float(p.grad.float().pow(2).sum()) for p in made.parameters() if p.grad is not None]
    means = {name: float(term.total.detach() / term.count) for name, term in terms.items()}
    return means, float(torch.tensor(squares).sum().sqrt())


def _fix_words(stage: Any) -> None:
    """Let the teacher say the same words wherever it is, after it has computed its own."""
    say = stage.teacher.forward

    def fixed(text_BLh: Tensor, mask_BL: Tensor, limit_N: Tensor, starts_BS: Tensor | None = None) -> Any:
        said = say(text_BLh, mask_BL, limit_N, starts_BS)
        numbers = torch.arange(said.words_NM.numel(), device=limit_N.device).view_as(said.words_NM)
        return said._replace(words_NM=torch.where(said.mask_NM, numbers * 7919 % 7500, said.words_NM))

    stage.teacher.forward = fixed


def _train(device: torch.device, save_at: int | None) -> list[Tensor]:
    """Trainable weights after four steps of Stage II."""
    stage, batch = toy("t2c", device, torch.float32)
    optimizer = PlainAdamW(stage, lr=1e-3)
    for step in range(4):
        if step == save_at:
            saved = copy.deepcopy((stage.state_dict(), optimizer.state()))
            stage, batch = toy("t2c", device, torch.float32)
            stage.load_state_dict(saved[0])
            optimizer = PlainAdamW(stage, lr=1e-3)
            optimizer.load(saved[1])
        total_loss(stage, stage(batch)).backward()
        optimizer.step()
    return [weight.detach().cpu() for weight in optimizer.weights]


def _attended(
    parts: list[Tensor], device: torch.device, dtype: torch.dtype, attend: Callable[..., Tensor]
) -> list[Tensor]:
    """The output, and the gradients of a fixed sum of it."""
    given = [part.to(device, dtype).requires_grad_() for part in parts]
    out = attend(*given)
    weights = torch.linspace(-1, 1, out.numel(), device=device).view_as(out).to(out.dtype)
    (out * weights).sum().backward()
    return [out.detach(), *(part.grad for part in given if part.grad is not None)]


def _packed(query: Tensor, key: Tensor, value: Tensor, rows: PackedRows, causal: bool) -> Tensor:
    return packed_attention.packed_attention(query, key, value, rows, rows, causal=causal)


def _alone(query: Tensor, key: Tensor, value: Tensor, lengths: list[int], causal: bool) -> Tensor:
    """Softmax attention by hand, row by row."""
    outs = []
    for q, k, v in zip(*(part.split(lengths) for part in (query, key, value)), strict=True):
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[2] ** 0.5
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
        outs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v))
    return torch.cat(outs)
