"""Greedy decoding on a static cache: words against Hugging Face and whole forwards; kernels, shapes, host syncs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from echox.models import step_graph
from echox.models.greedy import BLOCK, DecodedUnits, DecodeStep, Draft, capacity, repeats
from echox.models.ragged import JoinedRows
from echox.models.step_graph import StepGraph
from echox.models.t2c import T2CDecoder, Teacher
from tests import tiny
from tests.counters import WAITS, Kernels
from tests.models.test_t2c import _as_hugging_face, _placing_text, _text, _text_of_characters


def decoder_of_layers(layers: int, **others: Any) -> T2CDecoder:
    sizes = {"words": 12, "text_width": 32, "width": 32, "heads": 4, "ffn": 48, "max_positions": 512}
    return T2CDecoder(**{**sizes, "layers": layers, **others}).eval().requires_grad_(False)


def step_of(decoder: T2CDecoder, columns: int = 64) -> DecodeStep:
    text = _text().left_padded()
    places = decoder._positions(text.mask_BL, None)
    return DecodeStep(decoder, text, places, places[:, -1:] + 1, columns)


@pytest.mark.parametrize(("layers", "most", "decomposed"), [(6, 97, 162), (8, 125, 210)])
def test_a_decode_step_of_the_published_models_has_few_kernels(layers: int, most: int, decomposed: int) -> None:
    step = step_of(decoder_of_layers(layers))
    with torch.no_grad(), Kernels() as kernels:
        step()
    norms = kernels.count("aten.rsqrt.default")
    assert norms == 2 * layers + 1
    # Six operators on a CPU, one kernel on a GPU.
    assert (len(kernels.noted) - 5 * norms, len(kernels.noted)) == (most, decomposed)


@pytest.mark.parametrize("placed", ["by columns", "by characters", "within a window"])
def test_two_steps_in_a_row_have_the_same_operators_and_shapes_and_wait_for_nothing(placed: str) -> None:
    decoder = decoder_of_layers(2)
    if placed != "by columns":
        decoder.word_units_U = torch.arange(14, dtype=torch.float32)
        decoder.window_units = 20.0 if placed == "within a window" else None
    step, noted = step_of(decoder), []
    with torch.no_grad():
        for _ in range(3):
            with Kernels() as kernels:
                step()
            noted.append(kernels.noted)
            assert kernels.count(*WAITS) == 0
    assert noted[0] == noted[1] == noted[2]


def test_a_decode_waits_for_the_device_once_a_block() -> None:
    decoder, text = decoder_of_layers(2), _text().left_padded()
    torch.nn.init.zeros_(decoder.head.weight[decoder.end])  # a row of random words in which the end is not the best
    for most in (15, 160, 400):
        with Kernels() as kernels:
            found = decoder.greedy(text, torch.full((6,), most))
        assert found.words_NM.shape[1] == most
        assert kernels.count(*WAITS) <= 3 + most / BLOCK


def by_hugging_face(decoder: T2CDecoder, text: JoinedRows, limits: list[int]) -> list[tuple[list[int], bool]]:
    """Words of each row, decoded alone, and whether it ended: the end may come as the word after the last."""
    stock, rows = _as_hugging_face(decoder), []
    for row, limit in enumerate(limits):
        prompt = decoder.projection(text.values_BLh[row][text.mask_BL[row]])[None]
        said = stock.generate(
            inputs_embeds=prompt, max_new_tokens=limit + 1, do_sample=False, eos_token_id=decoder.end,
            pad_token_id=decoder.end, suppress_tokens=[decoder.pad],
        )[0].tolist()  # fmt: skip
        ended = said[-1] == decoder.end
        rows.append((said[:-1] if ended else said[:limit], ended))
    return rows


def rows_of(found: DecodedUnits) -> list[tuple[list[int], bool]]:
    said = [words[mask].tolist() for words, mask in zip(found.words_NM, found.mask_NM, strict=True)]
    return list(zip(said, found.ended_N.tolist(), strict=True))


def test_rows_that_end_apart_are_hugging_faces_own_while_the_cache_grows_and_rows_leave(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes: set[tuple[int, int]] = set()
    resize = DecodeStep.resize

    def noted(step: DecodeStep, rows_n: Tensor | None, columns: int) -> None:
        resize(step, rows_n, columns)
        sizes.add(tuple(step.words_NK.shape))

    monkeypatch.setattr(DecodeStep, "resize", noted)
    limits, ended = [100, 30, 17, 16, 15, 70], 0
    for seed in range(3):
        decoder, text = tiny.t2c_decoder(seed=seed), _text().left_padded()
        found = rows_of(decoder.greedy(text, torch.tensor(limits)))
        assert found == by_hugging_face(decoder, text, limits)
        ended += sum(end for _, end in found)
    assert 0 < ended < 18
    assert {rows for rows, _ in sizes} >= {1, 2, 4} and {columns for _, columns in sizes} == {64, 128}


@pytest.mark.parametrize("window", [None, 9.0])
def test_over_several_blocks_words_are_what_training_predicts(window: float | None) -> None:
    decoder, text = _placing_text("padded"), _text_of_characters()
    decoder.window_units = window
    torch.nn.init.zeros_(decoder.head.weight[decoder.end])
    own = decoder.greedy(text.left_padded(), torch.tensor([60, 20, 35, 70, 16, 17]), text.starts_NS)
    logits = decoder(text, own.words_NM, own.mask_NM)
    logits[..., decoder.pad] = -torch.inf
    for row, (said, ended) in enumerate(rows_of(own)):
        said = said + ([decoder.end] if ended else [])
        assert logits[row, : len(said)].argmax(-1).tolist() == said
    assert own.mask_NM.sum() > 100


@pytest.mark.parametrize("placed", ["by columns", "by a stride", "by characters", "within a window"])
def test_drafts_change_no_word_and_save_the_steps_of_those_that_were_right(
    placed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_characters = placed in ("by characters", "within a window")
    decoder = _placing_text("padded") if by_characters else tiny.t2c_decoder(seed=1)
    text = _text_of_characters() if by_characters else _text()
    decoder.text_stride = 2.5 if placed == "by a stride" else None
    decoder.window_units = 9.0 if placed == "within a window" else None
    steps = []
    says = DecodeStep.__call__
    monkeypatch.setattr(DecodeStep, "__call__", lambda step: steps.append(says(step)))
    limits = torch.tensor([60, 20, 35, 70, 16, 17])

    def said(draft: Draft | None) -> DecodedUnits:
        steps.clear()
        return decoder.greedy(text.left_padded(), limits, text.starts_NS, draft=draft)

    alone, needed = said(None), len(steps)
    words, mask = alone.words_NM, alone.mask_NM
    whole = said(Draft(words, mask))
    assert rows_of(whole) == rows_of(alone) and whole.drafted_N is not None
    assert whole.drafted_N.tolist() == mask.sum(1).tolist() and len(steps) == 1 < needed
    # The whole row, half of it, none, one with a wrong word, one that goes on for too long, and words of another row.
    wrong, have = words.clone(), mask.clone()
    have[1, mask[1].sum() // 2 :] = False
    have[2] = False
    wrong[3, 2] = (words[3, 2] + 1) % tiny.WORDS
    have[4], wrong[4] = True, torch.where(mask[4], words[4], 3)
    wrong[5], have[5] = words[0], mask[0]
    some = said(Draft(wrong, have))
    assert rows_of(some) == rows_of(alone) and some.drafted_N is not None
    assert some.drafted_N[:4].tolist() == [mask[0].sum(), mask[1].sum() // 2, 0, 2]
    assert some.drafted_N[4] >= mask[4].sum()
    over = decoder.greedy(text.left_padded(), 2 * limits, text.starts_NS)
    assert (over.mask_NM.sum(1) > limits).any() or placed == "by a stride"  # whose rows all end before
    assert rows_of(said(Draft(over.words_NM, over.mask_NM))) == rows_of(alone), "no row says more than it may"


def test_a_teachers_row_that_repeats_itself_stops_early_and_stays_rejected() -> None:
    stopped = 0
    for seed in range(4):
        decoder, text = tiny.t2c_decoder(seed=seed), _text().left_padded()
        limit_N = torch.full((6,), 110)
        whole = decoder.greedy(text, limit_N)
        short = Teacher(decoder)(text.values_BLh, text.mask_BL, limit_N)
        loops = repeats(whole.words_NM, whole.mask_NM)
        # A loop within the first words of a row that ends is a loop too.
        assert repeats(short.words_NM, short.mask_NM).tolist() == loops.tolist()
        for row, (words, ended) in enumerate(rows_of(short)):
            if loops[row]:
                assert words == rows_of(whole)[row][0][: len(words)]
                stopped += not ended and len(words) < 110
            else:
                assert (words, ended) == rows_of(whole)[row]
    assert stopped > 2


def test_a_cache_has_one_of_a_few_sizes() -> None:
    assert [capacity(columns) for columns in (1, 64, 65, 128, 129, 1000)] == [64, 64, 128, 128, 256, 1024]


def test_a_step_runs_then_is_captured_then_replayed_on_a_gpu_and_just_runs_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done: list[str] = []

    class Graph:
        def replay(self) -> None:
            done.append("replay")

    class Place:
        def run(self, step: Callable[[], None], *, capture: bool) -> Graph | None:
            done.append("capture" if capture else "run")
            return Graph() if capture else None

    monkeypatch.setattr(step_graph, "_place", lambda device: Place())
    on_gpu = StepGraph(lambda: done.append("step"), torch.device("cuda", 0))
    for _ in range(4):
        on_gpu()
    assert done == ["run", "capture", "replay", "replay", "replay"]
    done.clear()
    on_cpu = StepGraph(lambda: done.append("step"), torch.device("cpu"))
    for _ in range(3):
        on_cpu()
    assert done == ["step"] * 3


@pytest.mark.gpu
def test_words_of_replayed_graphs_are_those_of_the_cpu() -> None:
    decoder, text, limits = tiny.t2c_decoder(), _text().left_padded(), torch.tensor([100, 30, 17, 16, 15, 70])
    expected = rows_of(decoder.greedy(text, limits))
    decoder.cuda()
    on_gpu = JoinedRows(text.values_BLh.cuda(), text.mask_BL.cuda(), [])
    for _ in range(2):
        assert rows_of(decoder.greedy(on_gpu, limits.cuda())) == expected
