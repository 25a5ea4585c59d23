"""Other readings of Stage III against plain PyTorch: CTC kept, states at the tokens, annotated and kept labels."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from echox.builders.labels import LabelFile, teacher_identity
from echox.models.greedy import DecodedUnits, repeats
from echox.stages.echo import EchoStage
from echox.stages.labels import Label
from echox.stream.batch import SpeechBatch
from tests import tiny
from tests.stages import by_hand
from tests.stages import test_by_hand as usual


def close(ours: EchoStage, terms: Mapping[str, Any], totals: dict[str, Tensor], counts: dict[str, int]) -> None:
    """Losses, counts and gradients of both."""
    assert {name: int(term.count) for name, term in terms.items()} == counts
    for name, term in terms.items():
        torch.testing.assert_close(term.total, totals[name], rtol=1e-4, atol=1e-4, msg=name)
    ours.zero_grad()
    sum(term.total for term in terms.values()).backward()
    found = {name: p.grad.clone() for name, p in ours.named_parameters() if p.grad is not None}
    ours.zero_grad()
    sum(totals.values()).backward()  # type: ignore[union-attr]
    wanted = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        largest = max(float(gradient.abs().max()), 1.0)
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-4 * largest, msg=name)


# CTC ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapters", [False, True])
def test_ctc_that_is_kept_is_that_of_each_question_by_hand(adapters: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = usual.make_stage("argmax_teacher_forced", ctc_weight=0.4, train_speech_adapters=adapters).train()
    batch, teacher = usual.make_batch(stage), usual.FakeTeacher()
    monkeypatch.setattr(stage.teacher, "forward", teacher)
    terms = stage(batch)
    totals, counts, _ = usual.speak(stage, batch, teacher)
    totals["ctc"], counts["ctc"] = torch.zeros(()), 0
    for row in range(len(batch.ids)):
        if not batch.weight_B[row]:
            continue
        aligned = stage.s2t.encode_speech(tiny.one_row(batch, row)).aligned
        logits = stage.s2t.front_end.ctc_head.linear(aligned)[0]
        size = int(batch.transcript_lengths_B[row])
        classes = stage.s2t.front_end.ctc_head.classes(batch.transcript_BC[row, :size])
        loss = F.ctc_loss(
            logits.log_softmax(-1), classes, torch.tensor(len(logits)), torch.tensor(size), reduction="sum"
        )
        totals["ctc"] = totals["ctc"] + loss
        counts["ctc"] += size
    assert stage.known_counts(batch) == {"s2t": counts["s2t"], "ctc": counts["ctc"]}
    close(stage, terms, totals, counts)
    trained = {name.split(".")[2] for name in stage.parameter_groups().get("adapters", [])}
    assert trained == ({"alignment", "ctc_head", "shrink"} if adapters else {"ctc_head"})
    front_end = stage.s2t.front_end
    assert front_end.shrink.training is front_end.alignment.training is adapters and not front_end.encoder.training


def test_ctc_has_its_weight_and_none_by_default() -> None:
    means = {name: torch.tensor(1.0) for name in ("s2t", "echo", "denoising", "ctc")}
    for weighting in ("dynamic_cap", "fixed"):
        denoising = {"weighting": weighting, "align_steps": 2}
        kept = usual.make_stage("reference", ctc_weight=0.3, denoising=denoising)
        assert kept.loss_weights(means, 2)["ctc"] == 0.3 and set(kept.loss_weights(means, 1)) == {"denoising"}
        assert kept.known_counts(dataclasses.replace(tiny.speech_batch(2), step=1)) == {}
        assert "ctc" not in usual.make_stage("reference", denoising=denoising).loss_weights(means, 2)
    plain = usual.make_stage("reference")
    assert set(plain(tiny.speech_batch(2))) == {"s2t", "echo", "denoising"}
    assert not any(p.requires_grad for p in plain.s2t.front_end.ctc_head.parameters())


# States at the tokens -------------------------------------------------------------------------------------------------


def hear_at_tokens(stage: EchoStage, batch: SpeechBatch, hear: Any) -> Any:
    """As usual, but the state of each token is the one after it was read."""
    heard, totals, counts = hear(stage, batch)
    found = []
    for row, said in enumerate(heard):
        response = batch.response_BR[row][batch.response_mask_BR[row]].tolist()
        read = said.tokens if stage.config.pseudo_text in ("generated", "free_run") else response
        hidden = by_hand.states(stage.s2t, by_hand.row_of_prompt(stage.s2t, batch, row), read)[1:]
        found.append(by_hand.said(stage, said.tokens, hidden[: len(said.tokens)]))
    return found, totals, counts


@pytest.mark.parametrize(
    ("pseudo_text", "layout"),
    [("argmax_teacher_forced", "packed"), ("reference", "padded"), ("free_run", "packed"), ("generated", "packed")],
)
def test_with_states_at_the_tokens_a_step_is_that_of_each_segment_by_hand(
    pseudo_text: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = usual.make_stage(pseudo_text, layout, state="own").train()
    batch, teacher, hear = usual.make_batch(stage), usual.FakeTeacher(), usual.hear
    monkeypatch.setattr(stage.teacher, "forward", teacher)
    terms = stage(batch)
    with torch.no_grad():
        cuts = [[said.segments for said in found(stage, batch)[0]]
                for found in (hear, lambda *given: hear_at_tokens(*given, hear))]  # fmt: skip
    assert cuts[0] != cuts[1], "the trigger must read them too"
    monkeypatch.setattr(usual, "hear", lambda *given: hear_at_tokens(*given, hear))
    totals, counts, _ = usual.speak(stage, batch, teacher)
    close(stage, terms, totals, counts)


@pytest.mark.parametrize(("most", "early_stop"), [(12, True), (3, True), (12, False)])
def test_states_at_generated_tokens_are_those_of_reading_them(most: int, early_stop: bool) -> None:
    model, batch = tiny.s2t_model().eval(), tiny.speech_batch(3)
    free = model.generate(batch, -1, 12)
    end = int(free.tokens_BR[0, 5])
    own = model.generate(batch, end, most, early_stop=early_stop, at_tokens=True)
    plain = model.generate(batch, end, most, early_stop=early_stop)
    assert torch.equal(own.tokens_BR, plain.tokens_BR) and own.hidden_BRh.shape == plain.hidden_BRh.shape
    for row in range(3):
        tokens = own.tokens_BR[row][own.mask_BR[row]].tolist()
        with torch.no_grad():
            read = by_hand.states(model, by_hand.row_of_prompt(model, batch, row), tokens)
        torch.testing.assert_close(own.hidden_BRh[row, : len(tokens)], read[1:], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(plain.hidden_BRh[row, : len(tokens)], read[:-1], rtol=1e-3, atol=1e-4)


def test_the_alignment_learns_on_the_states_of_the_recipe() -> None:
    denoising = {"dropout": 0.0, "ffn": 24, "align_steps": 2}
    found = []
    for state in ("predicting", "own"):
        stage = usual.make_stage("reference", state=state, denoising=denoising).train()
        found.append(float(stage(dataclasses.replace(usual.make_batch(stage), step=0))["denoising"].total))
    assert found[0] != found[1]


# Annotated labels -----------------------------------------------------------------------------------------------------

WORDS = [[3, 1, 4], [1, 5, 9, 2, 6], [], [5, 3], [7], [11, 11, 11] * 4]
"""Of each row; row 2 has none, row 3 no weight, row 4 no text, and row 5 says one word again and again."""


def annotated(**changes: Any) -> tuple[EchoStage, SpeechBatch]:
    stage = usual.make_stage("reference", segmentation={"mode": "none"}, labels="annotated", **changes).train()
    batch = usual.make_batch(stage)
    mask = torch.arange(12) < torch.tensor([len(words) for words in WORDS])[:, None]
    labels = torch.zeros(mask.shape, dtype=torch.long)
    labels[mask] = torch.tensor([word for words in WORDS for word in words])
    return stage, dataclasses.replace(batch, labels_BM=labels, labels_mask_BM=mask)


def test_annotated_labels_are_those_of_each_answer_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    stage, batch = annotated()
    monkeypatch.setattr(stage.teacher, "forward", lambda *_: pytest.fail("the teacher was asked"))
    terms = stage(batch)
    heard, totals, counts = usual.hear(stage, batch)
    totals |= {"echo": torch.zeros(()), "denoising": torch.zeros(())}
    counts |= {"echo": 0, "denoising": 0}
    for row, said in enumerate(heard):
        if not batch.weight_B[row] or not said.tokens:
            continue
        assert said.tokens == batch.response_BR[row, : usual.LENGTHS[row] - 1].tolist(), "the reference to its end"
        embedded = stage.s2t.embed(torch.tensor(said.tokens))
        adapted = stage.denoising.outer(F.relu(stage.denoising.inner(said.hidden_Rh)))
        totals["denoising"] = totals["denoising"] + (1 - F.cosine_similarity(adapted, embedded, dim=-1)).sum()
        counts["denoising"] += len(said.tokens)
        if WORDS[row]:
            logits = by_hand.unit_logits(stage.echo, by_hand.template(stage, stage.s2t.embed, adapted), WORDS[row])
            target = torch.tensor([*WORDS[row], stage.echo.end])
            totals["echo"] = totals["echo"] + F.cross_entropy(logits, target, reduction="sum")
            counts["echo"] += len(target)
    assert counts["echo"] == 4 + 6 + 13
    close(stage, terms, totals, counts)
    assert float(stage.metrics()["teacher/rejected_share"]) == pytest.approx(1 / 4)


def test_annotated_labels_that_do_not_fit_the_decoder_are_left_out() -> None:
    counts = []
    for room in (0, 1):
        stage, batch = annotated()
        # Row 5 is the longest: prefix, 11 tokens, header, 12 words and the end.
        stage.echo.max_positions = len(tiny.PREFIX) + 11 + len(tiny.HEADER) + 12 + room
        counts.append(int(stage(batch)["echo"].count))
    assert counts == [10, 23]


def test_a_batch_without_units_is_refused() -> None:
    stage, batch = annotated()
    with pytest.raises(ValueError, match="labels=annotated, but the batch has no units"):
        stage(dataclasses.replace(batch, labels_BM=None))


# Labels that are kept -------------------------------------------------------------------------------------------------


class Counting:
    """A teacher that is really asked, and how many segments."""

    def __init__(self, stage: EchoStage) -> None:
        self.own, self.segments = type(stage.teacher).forward.__get__(stage.teacher), 0

    def __call__(self, text_BLh: Tensor, *more: Any) -> DecodedUnits:
        self.segments += len(text_BLh)
        found: DecodedUnits = self.own(text_BLh, *more)
        return found


def kept(folder: Path, rank: int = 0, **echo: Any) -> tuple[EchoStage, Counting]:
    stage = usual.make_stage("reference", labels="cached", segmentation={"mode": "fixed", "fixed_tokens": 3}, **echo)
    stage.label_store = LabelFile(folder / teacher_identity(stage), "run", rank)
    return stage, Counting(stage)


def test_labels_that_are_kept_are_those_of_the_teacher_and_it_is_asked_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = usual.make_stage("reference", segmentation={"mode": "fixed", "fixed_tokens": 3}).eval()
    stage, teacher = kept(tmp_path)
    stage.eval()
    monkeypatch.setattr(stage.teacher, "forward", teacher)
    batch = usual.make_batch(stage)
    live.end_token = stage.end_token
    first, second = tiny.rows_of(batch, [0, 1]), tiny.rows_of(batch, [2, 1, 5])
    expected = []
    for part in (first, second):
        live(part)
        expected.append(part.targets.units)
    shares, asked = [], []
    for part in (first, second, first, second):
        fresh = dataclasses.replace(part, targets=None)
        stage(fresh)
        units, wanted = fresh.targets.units, expected[len(asked) % 2]
        assert torch.equal(units.words_NM, wanted.words_NM) and torch.equal(units.mask_NM, wanted.mask_NM)
        assert torch.equal(units.ended_N, wanted.ended_N)
        shares.append(float(stage.metrics()["teacher/cached_share"]))
        asked.append(teacher.segments)
    assert asked[0] > 0 and asked[1:] == [asked[1]] * 3, "a second epoch decodes nothing"
    assert shares[0] == 0 and 0 < shares[1] < 1 and shares[2:] == [1, 1]
    assert asked[1] < len(expected[0].ended_N) + len(expected[1].ended_N), "row 1 came again"

    other, never = kept(tmp_path, rank=1)
    other.eval()
    other.end_token = stage.end_token
    monkeypatch.setattr(other.teacher, "forward", never)
    for part in (first, second):
        terms = other(dataclasses.replace(part, targets=None))
        assert torch.equal(terms["echo"].total, live(dataclasses.replace(part, targets=None))["echo"].total)
    assert never.segments == 0, "another rank, after a restart, knows them too"


def learned(units: DecodedUnits) -> dict[int, list[int]]:
    """Words of the segments that are learned; a row that repeats itself is left out, wherever it was stopped."""
    kept_N = units.ended_N & ~repeats(units.words_NM, units.mask_NM)
    return {row: units.words_NM[row][units.mask_NM[row]].tolist() for row in kept_N.nonzero().flatten().tolist()}


def test_drafted_labels_are_those_of_the_teacher_also_where_the_text_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("echox.builders.labels._ALIKE", (2, 1))
    cut = {"mode": "fixed", "fixed_tokens": 3}
    live = usual.make_stage("reference", segmentation=cut).eval()
    stage = usual.make_stage("reference", labels="drafted", segmentation=cut).eval()
    stage.label_store = LabelFile(tmp_path, "run", 0)
    batch = usual.make_batch(stage)
    live.end_token = stage.end_token
    changed = dataclasses.replace(batch, response_BR=batch.response_BR.clone())
    changed.response_BR[:, 2] = batch.response_BR[:, 2].roll(1)
    assert not torch.equal(changed.response_BR, batch.response_BR)
    shares = []
    for part in (batch, batch, changed):
        drafted, expected = (dataclasses.replace(part, targets=None) for _ in range(2))
        torch.testing.assert_close(stage(drafted)["echo"].total, live(expected)["echo"].total)
        assert learned(drafted.targets.units) == learned(expected.targets.units)
        shares.append(float(stage.metrics().get("teacher/drafted_share", torch.tensor(0.0))))
    assert shares[0] == 0 < shares[2] < shares[1]
    assert LabelFile(tmp_path, "run", 1).alike((*tiny.PREFIX, 7)) is None, "nothing begins like this"


def test_a_draft_is_the_newest_label_of_a_text_that_begins_alike(tmp_path: Path) -> None:
    file, begin = LabelFile(tmp_path / "labels", "run", 0), tuple(range(8))
    file.add({(*begin, 1): Label([5], True), begin[:3]: Label([1], True)})
    file.add({(*begin, 2): Label([6], True), (*begin, 3): Label([7], False)})
    file.add({(*begin[:4], 9): Label([8], True)})
    for known in (file, LabelFile(tmp_path / "labels", "run", 1)):
        assert known.alike((*begin, 4)) == Label([6], True), "eight tokens say more than four"
        assert known.alike((*begin, 1)) == Label([5], True), "its own label, whatever is newer"
        assert known.alike((*begin, 3)) is None, "it has no end, and would have none again"
        assert known.alike((*begin[:4], 0)) == Label([8], True)
        assert known.alike(begin[:2]) is None
    before = (tmp_path / "labels" / "run" / "rank-00000.jsonl").read_text()
    file.add({(*begin, 1): Label([5], True)})
    assert (tmp_path / "labels" / "run" / "rank-00000.jsonl").read_text() == before, (
        "what is known is not written again"
    )


def test_labels_of_another_teacher_are_not_taken(tmp_path: Path) -> None:
    stage, _ = kept(tmp_path)
    same, _ = kept(tmp_path)
    name = teacher_identity(stage)
    assert teacher_identity(same) == name
    with torch.no_grad():
        stage.teacher.decoder.head.weight[0, 0] += 1
    assert teacher_identity(stage) != name
    with torch.no_grad():
        same.s2t.causal_lm.get_input_embeddings().weight[tiny.PREFIX[0], 0] += 1
    assert teacher_identity(same) != name
    assert len({teacher_identity(kept(tmp_path, units_per_token=most)[0]) for most in (3, 4)}) == 2
    strided, _ = kept(tmp_path)
    strided.teacher.decoder.text_stride = 2.5
    assert teacher_identity(strided) != name
    assert teacher_identity(kept(tmp_path)[0].train()) == teacher_identity(kept(tmp_path)[0].eval()) == name


def test_a_line_that_a_crash_cut_short_costs_its_segment_alone(tmp_path: Path) -> None:
    file = LabelFile(tmp_path / "labels", "run", 0)
    assert file.get((1, 2)) is None and not (tmp_path / "labels").exists()
    file.add({(1, 2): Label([70000, 5], True), (): Label([], False)})
    file.add({(3,): Label([1], True)})
    path = tmp_path / "labels" / "run" / "rank-00000.jsonl"
    assert len(LabelFile(tmp_path / "labels", "run", 1)) == 3
    path.write_text(path.read_text()[:-4])
    again = LabelFile(tmp_path / "labels", "run", 0)
    assert again.get((1, 2)) == Label([70000, 5], True) and again.get(()) == Label([], False)
    assert again.get((3,)) is None and len(again) == 2
    again.add({(3,): Label([1], True)})
    assert LabelFile(tmp_path / "labels", "run", 2).get((3,)) == Label([1], True)
    assert json.loads(path.read_text().splitlines()[-1]) == [[3], [1], True]


def test_kept_labels_need_a_place() -> None:
    stage = usual.make_stage("reference", labels="cached")
    with pytest.raises(ValueError, match="labels=cached, but the stage was given no store"):
        stage(usual.make_batch(stage))
