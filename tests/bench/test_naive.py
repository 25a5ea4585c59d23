"""The naive loop computes the losses of the stages, and no technique that is switched off changes them."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch

from echox.bench.counting import Operators
from echox.bench.imposed import imposed, runs, words_of
from echox.bench.naive import naive_losses
from echox.bench.oracle import as_hugging_face, dynamic_greedy, generate_alone
from echox.bench.techniques import TECHNIQUES, Technique, technique
from echox.builders.stages import build_s2t_stage
from echox.models import chunked_heads, compiled, packed_attention
from echox.models.greedy import DecodeStep
from echox.models.lora import LoraInput
from echox.models.ragged import PaddedRows
from echox.models.step_graph import StepGraph
from echox.stream.batch import UnitBatch
from tests import tiny
from tests.models.test_t2c import _placing_text, _text, _text_of_characters


def unit_batch() -> UnitBatch:
    generator = torch.Generator().manual_seed(2)
    text_mask = torch.arange(7)[None, :] < torch.tensor([7, 3, 5, 4])[:, None]
    words_mask = torch.arange(9)[None, :] < torch.tensor([2, 9, 0, 6])[:, None]
    return UnitBatch(
        ids=list("abcd"),
        step=0,
        weight_B=torch.tensor([1.0, 1.0, 1.0, 0.0]),
        text_BT=torch.randint(0, tiny.VOCABULARY, (4, 7), generator=generator),
        text_mask_BT=text_mask,
        words_BM=torch.randint(0, tiny.WORDS, (4, 9), generator=generator),
        words_mask_BM=words_mask,
    )


def with_own_answers(batch: Any, most: int = 40) -> Any:
    generator = torch.Generator().manual_seed(3)
    mask = torch.arange(most)[None, :] < torch.tensor([most, 17, 31, 0])[:, None]
    own = torch.randint(12, tiny.VOCABULARY, (4, most), generator=generator)
    return replace(batch, own_BR=own.masked_fill(~mask, 0), own_mask_BR=mask)


def of(name: str) -> tuple[Any, Any]:
    """A stage in eval mode, and a batch one row of which has no weight."""
    batch = with_own_answers(tiny.speech_batch())
    batch.weight_B[2] = 0
    if name == "t2c":
        return tiny.t2c_stage().eval(), unit_batch()
    if name == "s2t":
        return build_s2t_stage(tiny.model_config(), tiny.s2t_model()).eval(), batch
    cut = {"mode": "fixed", "fixed_tokens": 9}
    stage = tiny.echo_stage(pseudo_text="reference" if name == "echo-reference" else "generated", segmentation=cut)
    return stage.eval(), batch


STAGES = ["t2c", "s2t", "echo", "echo-reference"]


def assert_same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found.keys() == wanted.keys() and found
    for name, term in wanted.items():
        assert int(found[name].count) == int(term.count) > 0, name
        assert found[name].total.item() == pytest.approx(term.total.item(), rel=1e-5), name


def gradients(stage: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in stage.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", STAGES)
def test_losses_and_gradients_are_those_of_the_stage(name: str) -> None:
    stage, batch = of(name)
    found = []
    for naive in (False, True):
        stage.zero_grad()
        # Where the encoder runs in the step, the naive loop hears 30 s, and the engine is to hear them too.
        whole = technique("trimmed audio").off(stage, batch) if name != "t2c" else nullcontext(batch)
        with whole as heard:
            terms = naive_losses(stage, heard) if naive else stage(replace(heard))
        torch.stack([term.total / term.count for term in terms.values()]).sum().backward()
        found.append((terms, gradients(stage)))
    assert_same(found[1][0], found[0][0])
    assert found[1][1].keys() == found[0][1].keys() and len(found[0][1]) > 5
    for parameter, gradient in found[0][1].items():
        rounding = max(1e-5, 5e-5 * float(gradient.abs().max()))
        torch.testing.assert_close(found[1][1][parameter], gradient, rtol=1e-3, atol=rounding, msg=parameter)


@pytest.mark.parametrize(("name", "each"), [(name, each) for name in ("t2c", "echo") for each in TECHNIQUES])
def test_what_is_switched_off_leaves_the_losses_and_comes_back(
    name: str, each: Technique, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "by_inductor", lambda function, dynamic: function)
    stage, batch = of(name)
    if name == "t2c" and each.name == "trimmed audio":
        assert not each.applies(stage, batch)
        return
    wanted = stage(replace(batch))
    with each.off(stage, replace(batch)) as given:
        terms = stage(given)
    if each.same_losses:
        assert_same(terms, wanted)
    else:
        assert terms["s2t"].total.item() != wanted["s2t"].total.item()
    with Operators() as again:
        stage(replace(batch))
    fresh, same = of(name)
    with Operators() as first:
        fresh(same)
    assert again.names == first.names


def seen(monkeypatch: pytest.MonkeyPatch, owner: Any, method: str) -> list[tuple[Any, ...]]:
    """The calls of a method from now on."""
    calls: list[tuple[Any, ...]] = []
    before = getattr(owner, method)

    def noted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return before(*args, **kwargs)

    monkeypatch.setattr(owner, method, noted)
    return calls


def test_every_switch_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    stage, batch = of("echo")
    encoded = seen(monkeypatch, type(stage.s2t.front_end.encoder), "_encode")
    monkeypatch.setattr(chunked_heads, "CHUNK_ELEMENTS", 1)
    chunks: list[Any] = []
    cut = chunked_heads._chunks
    monkeypatch.setattr(chunked_heads, "_chunks", lambda *sizes: (chunks.append(part) or part for part in cut(*sizes)))
    products = seen(monkeypatch, LoraInput, "reduced")
    steps, resized = seen(monkeypatch, DecodeStep, "__call__"), seen(monkeypatch, DecodeStep, "resize")
    flash = seen(monkeypatch, packed_attention, "_flash_takes")
    turned: list[Any] = []
    monkeypatch.setattr(
        compiled, "by_inductor", lambda function, dynamic: lambda *parts: turned.append(parts) or function(*parts)
    )

    def without(name: str) -> None:
        for calls in (encoded, chunks, products, steps, resized, flash, turned):
            calls.clear()
        with imposed(stage, 3.0), nullcontext(batch) if not name else technique(name).off(stage, batch) as given:
            stage(replace(given, targets=None))

    without("")
    whole, columns = len(chunks), encoded[0][1].shape[2]
    assert products and steps and flash and any(rows is not None for _, rows, _ in resized) and columns < 3000
    assert not turned
    packed = float(stage.metrics()["perf/padding_share"])
    without("packed rows")
    assert float(stage.metrics()["perf/padding_share"]) > packed == 0
    without("trimmed audio")
    assert encoded[0][1].shape[2] == 3000
    without("heads in chunks")
    assert 0 < len(chunks) < whole / 4
    without("fused LoRA")
    assert not products
    without("static decode")
    assert not steps
    without("rows leave the decode")
    assert steps and all(rows is None for _, rows, _ in resized)
    without("variable-length attention")
    assert not flash
    without("eager layers")
    assert len(turned) == 2 * (2 + 2 + 2), "two layers of the LLM, on prompts and answers, and two of Echo's"
    assert not technique("eager layers").applies(stage, batch), "on a CPU"


def test_without_its_graph_a_step_runs_on_a_gpu_too() -> None:
    done: list[int] = []
    graph = StepGraph(lambda: done.append(1), torch.device("cpu"))
    graph._place = pytest.fail  # type: ignore[assignment]  # as on a GPU: what a graph would be captured with
    with technique("graph").off(None, None):
        graph()
        graph()
    assert done == [1, 1]


def test_lengths_are_imposed_and_given_back() -> None:
    stage, batch = of("echo")
    state = {name: value.clone() for name, value in stage.state_dict().items()}
    with imposed(stage, 3.0):
        stage(replace(batch))
        rows = stage(replace(batch), lambda each: stage.s2t.encode_speech(each).rows.lengths_N)
        stage(found := replace(batch, targets=None))
    targets = found.targets
    assert rows.tolist() == [(frames // 4 - 1) * 7 // 25 + 1 for frames in batch.frames_B.tolist()]
    tokens_N = targets.rows.mask_NT.sum(1)
    assert targets.units.mask_NM.sum(1).tolist() == words_of(tokens_N, 3.0).tolist()
    assert targets.units.ended_N.all() and len(set(words_of(tokens_N, 3.0).tolist())) > 3
    assert stage.most_words(tokens_N).tolist() == (12 * tokens_N + 32).tolist()
    assert all(torch.equal(state[name], value) for name, value in stage.state_dict().items())
    assert stage.teacher.forward.__func__ is type(stage.teacher).forward


def test_imposed_labels_are_new_ones_so_many_times_a_second() -> None:
    labels = runs(PaddedRows(torch.tensor([25, 50]), 50), 7 / 25)
    assert len(set(labels[1].tolist())) == 14 and 0 not in labels


@pytest.mark.parametrize("placed", ["by columns", "by characters"])
def test_the_slow_decode_says_what_the_fast_one_says(placed: str) -> None:
    decoder, text = (
        (tiny.t2c_decoder(), _text()) if placed == "by columns" else (_placing_text(), _text_of_characters())
    )
    limit_N = torch.tensor([40, 3, 17, 0, 25, 60])
    fast = decoder.greedy(text.left_padded(), limit_N, text.starts_NS)
    slow = dynamic_greedy(decoder, text.left_padded(), limit_N, text.starts_NS)
    for found, wanted in zip(slow[:3], fast[:3], strict=True):
        assert torch.equal(found, wanted)
    if placed == "by columns":
        model, joined = as_hugging_face(decoder), text.left_padded()
        for row, limit in enumerate(limit_N.tolist()):
            said, ended = generate_alone(decoder, model, joined, row, limit)
            assert (said, ended) == (fast.words_NM[row][fast.mask_NM[row]].tolist(), bool(fast.ended_N[row]))


def test_techniques_have_names_of_their_own() -> None:
    assert len({each.name for each in TECHNIQUES}) == len({each.without for each in TECHNIQUES}) == len(TECHNIQUES)
