from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from echox.errors import RecipeError
from echox.models.packed_attention import packed_attention, use_packed_attention
from echox.models.ragged import Layout, PackedRows, Rows, join, padding_share, rows_of
from tests import tiny

LENGTHS = [[5, 1, 3, 7, 2], [1], [6], [1, 1, 1], [4, 4, 4], [3, 0, 2, 0]]
BOTH = pytest.mark.parametrize("layout", ["packed", "padded"])
RAGGED = pytest.mark.parametrize("lengths", LENGTHS, ids=str)


def _packed(lengths: list[int], device: str = "cpu") -> PackedRows:
    return PackedRows(torch.tensor(lengths, device=device), max(lengths), sum(lengths))


def _rows(values: Tensor, lengths: list[int]) -> list[Tensor]:
    """The real part of each padded row."""
    return [row[:length] for row, length in zip(values, lengths, strict=True)]


@BOTH
@RAGGED
def test_rows_enter_a_layout_and_leave_it_as_they_were(lengths: list[int], layout: Layout) -> None:
    padded = torch.randn(len(lengths), max(lengths) + 2, 3)
    rows = rows_of(torch.tensor(lengths), max(lengths) + 2, layout)
    inside = rows.from_padded(padded)
    torch.testing.assert_close(inside[rows.real], torch.cat(_rows(padded, lengths)), rtol=0, atol=0)
    assert inside.shape[:2].numel() == rows.computed
    for back, row in zip(_rows(rows.to_padded(inside), lengths), _rows(padded, lengths), strict=True):
        assert torch.equal(back, row)
    assert rows.positions[rows.real].tolist() == [place for length in lengths for place in range(length)]
    names = rows.broadcast(torch.arange(len(lengths))).expand(rows.positions.shape)
    assert names[rows.real].tolist() == [row for row, length in enumerate(lengths) for _ in range(length)]
    share = 1 - sum(lengths) / (len(lengths) * rows.size)
    assert float(padding_share(rows)) == pytest.approx(0.0 if layout == "packed" else share, abs=1e-6)


def test_starts_are_what_attention_kernels_call_cu_seqlens() -> None:
    rows = _packed([5, 1, 3])
    assert rows.starts_N1.tolist() == [0, 5, 6, 9]
    assert rows.starts_N1.dtype == torch.int32
    assert rows.row_L.tolist() == [0, 0, 0, 0, 0, 1, 2, 2, 2]
    assert rows.positions.tolist() == [[0, 1, 2, 3, 4, 0, 0, 1, 2]]
    assert rows.causal()["position_ids"] is rows.positions


def test_lengths_known_to_the_host_give_the_same_rows() -> None:
    lengths = torch.tensor([5, 1, 3])
    found, known = rows_of(lengths, 5, "packed"), rows_of(lengths, 5, "packed", lengths.clone())
    assert torch.equal(found.positions, known.positions) and found.computed == known.computed == 9


def test_rows_of_nothing_stay_in_the_graph() -> None:
    linear = torch.nn.Linear(4, 4)
    rows = PackedRows(torch.tensor([0, 0]), 3, 0)
    rows.to_padded(linear(rows.from_padded(torch.randn(2, 3, 4)))).sum().backward()
    assert linear.weight.grad is not None and not linear.weight.grad.any()


@BOTH
@RAGGED
def test_counting_and_keeping_equal_a_row_by_row_reading(lengths: list[int], layout: Layout) -> None:
    torch.manual_seed(0)
    rows = rows_of(torch.tensor(lengths), max(lengths), layout)
    keep_NS = torch.rand(len(lengths), max(lengths)) > 0.5
    keep_NS[:, 0] = True
    keep = rows.from_padded(keep_NS)
    expected = [kept.nonzero().flatten().tolist() for kept in _rows(keep_NS, lengths)]
    assert rows.count(keep).tolist() == [len(positions) for positions in expected]
    kept_rows, positions = rows.subset(keep)
    padded = _rows(kept_rows.to_padded(positions), kept_rows.lengths_N.tolist())
    assert [row.tolist() for row in padded] == expected
    values = torch.randn(len(lengths), max(lengths), 2)
    taken = kept_rows.to_padded(rows.gather(rows.from_padded(values), positions, kept_rows))
    for row, want in enumerate(expected):
        assert torch.equal(taken[row, : len(want)], values[row, want])


@BOTH
@pytest.mark.parametrize("open_end", [False, True])
def test_join_equals_concatenating_each_row_by_itself(layout: Layout, open_end: bool) -> None:
    torch.manual_seed(0)
    blocks = [torch.randn(5, size, 3, requires_grad=True) for size in (2, 4, 3)]
    masks = [torch.rand(5, size) > 0.4 for size in (2, 4)]
    masks[0][:, 0] = True
    last = [3, 0, 1, 2, 0]
    masks.append(torch.arange(3)[None, :] < torch.tensor(last)[:, None])
    joined = join(blocks, masks, layout, open_end=open_end)
    padded, before = joined.rows.to_padded(joined.values), joined.targets.to_padded(joined.predicting(joined.values))
    assert joined.targets.lengths_N.tolist() == [length + open_end for length in last]
    for row in range(5):
        expected = torch.cat([block[row][mask[row]] for block, mask in zip(blocks, masks, strict=True)])
        assert int(joined.rows.lengths_N[row]) == len(expected)
        assert torch.equal(padded[row, : len(expected)], expected)
        predicting = expected[len(expected) - last[row] - 1 : len(expected) - 1 + open_end]
        assert torch.equal(before[row, : len(predicting)], predicting)
    joined.values[joined.rows.real].sum().backward()
    for block, mask in zip(blocks, masks, strict=True):
        assert torch.equal(block.grad, mask[..., None].expand_as(block).float())


def _one_by_one(
    query: Tensor, key: Tensor, value: Tensor, rows: list[int], memory: list[int], allowed: Any, scale: float
) -> Tensor:
    """Softmax attention written out, row by row."""
    out = []
    groups = query.shape[1] // key.shape[1]
    for q, k, v in zip(query.split(rows), key.split(memory), value.split(memory), strict=True):
        scores = torch.einsum("lhd,thd->hlt", q, k.repeat_interleave(groups, 1)) * scale
        age = torch.arange(len(q))[:, None] - torch.arange(len(k))
        weights = scores.masked_fill(~allowed(age), -torch.inf).softmax(-1)
        out.append(torch.einsum("hlt,thd->lhd", weights, v.repeat_interleave(groups, 1)))
    return torch.cat(out)


SIGHT = {
    "both ways": ({"causal": False}, lambda age: torch.ones_like(age, dtype=torch.bool)),
    "causal": ({"causal": True}, lambda age: age >= 0),
    "window": ({"causal": True, "window": 3}, lambda age: (age >= 0) & (age < 3)),
}


@pytest.mark.parametrize("sight", SIGHT)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("lengths", LENGTHS[:-1], ids=str)
def test_packed_attention_equals_attention_row_by_row(
    lengths: list[int], dtype: torch.dtype, tolerance: float, sight: str
) -> None:
    torch.manual_seed(0)
    options, allowed = SIGHT[sight]
    inputs = [torch.randn(sum(lengths), heads, 8).to(dtype).requires_grad_() for heads in (4, 2, 2)]
    exact = [x.detach().float().requires_grad_() for x in inputs]
    rows = _packed(lengths)
    mixed = packed_attention(*inputs, rows, rows, scale=0.3, **options)
    expected = _one_by_one(*exact, lengths, lengths, allowed, 0.3)
    torch.testing.assert_close(mixed.float(), expected, rtol=tolerance, atol=tolerance)
    weight = torch.randn_like(expected)
    (mixed.float() * weight).sum().backward()
    (expected * weight).sum().backward()
    for ours, theirs in zip(inputs, exact, strict=True):
        torch.testing.assert_close(ours.grad.float(), theirs.grad, rtol=2 * tolerance, atol=2 * tolerance)


def test_rows_may_look_at_a_memory_of_other_lengths() -> None:
    torch.manual_seed(0)
    lengths, memory = [2, 1, 3], [4, 5, 1]
    query, key, value = torch.randn(6, 2, 8), torch.randn(10, 2, 8), torch.randn(10, 2, 8)
    mixed = packed_attention(query, key, value, _packed(lengths), _packed(memory), causal=False)
    expected = _one_by_one(query, key, value, lengths, memory, SIGHT["both ways"][1], 8**-0.5)
    torch.testing.assert_close(mixed, expected, rtol=1e-5, atol=1e-5)


def test_empty_rows_leave_their_neighbours_and_the_gradients_finite() -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(5, 2, 8, requires_grad=True) for _ in range(3)]
    gradients = []
    for lengths in ([3, 0, 2, 0], [3, 2]):
        mixed = packed_attention(*inputs, _packed(lengths), _packed(lengths), causal=False)
        gradients.append([mixed.detach(), *torch.autograd.grad(mixed.square().sum(), inputs)])
    for with_empty, without in zip(*gradients, strict=True):
        torch.testing.assert_close(with_empty, without)


def _llm(rows: Rows, padded_NSh: Tensor, model: Any) -> Tensor:
    hidden = model(inputs_embeds=rows.from_padded(padded_NSh), use_cache=False, **rows.causal()).last_hidden_state
    return rows.to_padded(hidden)


def _other_llm(name: str) -> Any:
    """A random body of another family: sliding windows, biases, norms on queries and keys."""
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.for_model(
        name,
        vocab_size=8,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=3,
    )
    torch.manual_seed(0)
    return AutoModel.from_config(config).eval()


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_packed_llm_sees_each_row_as_if_it_were_alone(family: str) -> None:
    model = tiny.causal_lm().model if family == "llama" else _other_llm(family)
    use_packed_attention(model)
    lengths = [5, 1, 9, 9, 2]
    padded = torch.randn(5, 9, 32)
    together = _llm(rows_of(torch.tensor(lengths), 9, "packed"), padded, model)
    for row, length in enumerate(lengths):
        alone = model(inputs_embeds=padded[row : row + 1, :length], use_cache=False).last_hidden_state[0]
        torch.testing.assert_close(together[row, :length], alone, rtol=1e-5, atol=1e-5)


def test_nothing_leaks_between_neighbours() -> None:
    model = tiny.causal_lm().model
    use_packed_attention(model)
    rows = rows_of(torch.tensor([5, 3, 9, 4]), 9, "packed")
    padded = torch.randn(4, 9, 32)
    before = _llm(rows, padded, model)
    padded[1] += 3.0
    after = _llm(rows, padded, model)
    for row, length in ((0, 5), (2, 9), (3, 4)):
        assert torch.equal(after[row, :length], before[row, :length])
    assert not torch.allclose(after[1, :3], before[1, :3])


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = tiny.s2t_model()
        if checkpointing:
            model.causal_lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        model.head(model(tiny.speech_batch(4)).states.hidden).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 20
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=lambda text, name=name: f"{name}: {text}")


def test_a_model_that_loses_the_rows_or_caps_its_scores_is_refused() -> None:
    model = tiny.causal_lm().model
    use_packed_attention(model)
    rows = _packed([2, 3])
    without = {key: value for key, value in rows.causal().items() if key != "rows"}
    with pytest.raises(RecipeError, match="was not told of its rows.*model.layout: padded"):
        model(inputs_embeds=torch.randn(1, 5, 32), use_cache=False, **without)
    with pytest.raises(RecipeError, match="wants softcap"):
        model(inputs_embeds=torch.randn(1, 5, 32), use_cache=False, softcap=30.0, **rows.causal())


@pytest.mark.gpu
@pytest.mark.parametrize("sight", SIGHT)
def test_flash_attention_on_the_gpu_equals_attention_row_by_row(sight: str) -> None:
    torch.manual_seed(0)
    options, allowed = SIGHT[sight]
    lengths = [5, 1, 130, 64, 2]
    inputs = [
        torch.randn(sum(lengths), heads, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for heads in (6, 2, 2)
    ]
    exact = [x.detach().float().cpu().requires_grad_() for x in inputs]
    rows = _packed(lengths, "cuda")
    mixed = packed_attention(*inputs, rows, rows, **options)
    expected = _one_by_one(*exact, lengths, lengths, allowed, 64**-0.5)
    torch.testing.assert_close(mixed.float().cpu(), expected, rtol=3e-2, atol=3e-2)
    mixed.float().sum().backward()
    expected.sum().backward()
    for ours, theirs in zip(inputs, exact, strict=True):
        torch.testing.assert_close(ours.grad.float().cpu(), theirs.grad, rtol=5e-2, atol=5e-2)


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu_where_the_lengths_are_known() -> None:
    host = torch.tensor([5, 1, 30])
    lengths, padded = host.cuda(), torch.randn(3, 30, 64, device="cuda", dtype=torch.bfloat16)
    heads = torch.randn(36, 2, 32, device="cuda", dtype=torch.bfloat16)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        rows = rows_of(lengths, 30, "packed", host)
        assert isinstance(rows, PackedRows)
        rows.to_padded(rows.gather(rows.from_padded(padded), rows.positions, rows))
        packed_attention(heads, heads, heads, rows, rows, causal=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
