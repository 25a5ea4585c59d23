"""Every loss of a stage against plain PyTorch, in cases built so that each part of the computation shows in the sum.

X' is not the reference and meets an early end, the trigger cuts, one teacher row has no end, one loops, one is silent,
one sample counts nothing, and no weight is one.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from echox.builders.stages import build_s2t_stage
from echox.models.echo import segment_rows
from echox.models.greedy import DecodedUnits
from echox.stages.echo import EchoStage
from echox.stages.losses import denoising_loss
from echox.stream.batch import SpeechBatch, UnitBatch
from tests import tiny
from tests.stages import by_hand

TRIGGER = {"min_tokens": 2, "max_wait": 4, "threshold": 0.05, "look_ahead": 1}
LENGTHS = [16, 9, 13, 11, 1, 12]
"""Response tokens of each row, end included; row 3 has no weight, row 4 is its end alone."""
OWN = [20, 5, 0, 9, 3, 12]
"""Tokens of each row's own answer, where it was made beforehand: longer, shorter, rejected, of the same length."""
RUNAWAY, LOOP, SILENT = 1, 3, 4
"""Segments, in their order, whose teacher does not end, repeats itself, or says nothing."""


def make_stage(pseudo_text: str, layout: str = "packed", **echo: Any) -> EchoStage:
    section = {"segmentation": TRIGGER, "units_per_token": 3, "s2t_weight": 0.6, "free_run_tokens": 10, **echo}
    return tiny.echo_stage(pseudo_text=pseudo_text, layout=layout, **section)


def make_batch(stage: EchoStage) -> SpeechBatch:
    """Uneven rows, and an end token that the model itself writes in the midst of an answer."""
    batch = tiny.speech_batch(len(LENGTHS))
    generator = torch.Generator().manual_seed(11)
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    response = torch.randint(12, tiny.VOCABULARY, mask.shape, generator=generator)
    after_mask = batch.after_mask_BQ.clone()
    after_mask[1, 1] = False
    weight = torch.ones(len(LENGTHS))
    weight[3] = 0.0
    batch = dataclasses.replace(
        batch, response_BR=response, response_mask_BR=mask, after_mask_BQ=after_mask, weight_B=weight
    )
    with torch.no_grad():
        prompt = by_hand.row_of_prompt(stage.s2t, batch, 0)
        if stage.config.pseudo_text == "free_run":
            stage.end_token = by_hand.own_answer(stage.s2t, prompt, -1, 10)[7]
        else:
            logits = stage.s2t.head(by_hand.states(stage.s2t, prompt, response[0].tolist()))
            stage.end_token = int(logits[11].argmax())
    response[response == stage.end_token] = 12 + (stage.end_token == 12)
    response[torch.arange(len(LENGTHS)), torch.tensor(LENGTHS) - 1] = stage.end_token
    response[~mask] = 0
    if stage.config.pseudo_text == "generated":
        batch.own_mask_BR = torch.arange(max(OWN)) < torch.tensor(OWN)[:, None]
        own = torch.randint(12, tiny.VOCABULARY, batch.own_mask_BR.shape, generator=generator)
        own[:, 1:4] = response[:, 1:4]
        batch.own_BR = own.masked_fill(~batch.own_mask_BR, 0)
    return batch


class FakeTeacher:
    """Says chosen words for each segment, and keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[Tensor] = []
        self.limits: list[int] = []

    def words(self, segment: int) -> list[int]:
        if segment == LOOP:
            return [1, *[3, 5] * 8]
        return [] if segment == SILENT else [(segment + 5 * place) % tiny.WORDS for place in range(2 + segment % 4)]

    def __call__(self, text_BLh: Tensor, mask_BL: Tensor, limit_N: Tensor, *_: Any) -> DecodedUnits:
        self.asked = [row[mask] for row, mask in zip(text_BLh, mask_BL, strict=True)]
        self.limits = limit_N.tolist()
        rows = [self.words(segment) for segment in range(len(mask_BL))]
        longest = max(map(len, rows))
        words = torch.tensor([row + [tiny.WORDS + 1] * (longest - len(row)) for row in rows])
        return DecodedUnits(words, words != tiny.WORDS + 1, torch.arange(len(rows)) != RUNAWAY)


def hear(stage: EchoStage, batch: SpeechBatch) -> tuple[list[by_hand.Said], dict[str, Tensor], dict[str, int]]:
    """What each sample is to say, and the text loss."""
    heard, total, count = [], torch.zeros(()), 0
    for row in range(len(batch.ids)):
        response = batch.response_BR[row][batch.response_mask_BR[row]].tolist()
        prompt = by_hand.row_of_prompt(stage.s2t, batch, row)
        hidden = by_hand.states(stage.s2t, prompt, response)[:-1]
        logits = stage.s2t.causal_lm.lm_head(hidden)
        if batch.weight_B[row]:
            total = total + F.cross_entropy(logits, torch.tensor(response), reduction="sum")
            count += len(response)
        if stage.config.pseudo_text == "free_run":
            text = by_hand.own_answer(stage.s2t, prompt, stage.end_token, stage.config.free_run_tokens)
            hidden = by_hand.states(stage.s2t, prompt, text)[:-1]
        elif stage.config.pseudo_text == "generated":
            text = batch.own_BR[row, : OWN[row]].tolist()
            hidden = by_hand.states(stage.s2t, prompt, text)[:-1]
        else:
            own = logits.argmax(-1).tolist()
            text = []
            for mine, reference in zip(own, response, strict=True):
                token = mine if stage.config.pseudo_text == "argmax_teacher_forced" else reference
                if stage.end_token in (token, reference):
                    break
                text.append(token)
        heard.append(by_hand.said(stage, text, hidden[: len(text)]))
    return heard, {"s2t": total}, {"s2t": count}


def speak(
    stage: EchoStage, batch: SpeechBatch, teacher: FakeTeacher
) -> tuple[dict[str, Tensor], dict[str, int], dict[str, float]]:
    """Losses, counts and metrics of a forward, by hand; the teacher has been asked."""
    heard, totals, counts = hear(stage, batch)
    totals |= {"echo": torch.zeros(()), "denoising": torch.zeros(())}
    counts |= {"echo": 0, "denoising": 0}
    segment = differs = kept = weighted = 0
    for row, said in enumerate(heard):
        weight = float(batch.weight_B[row])
        embedded = stage.s2t.embed(torch.tensor(said.tokens, dtype=torch.long))
        adapted = stage.denoising.outer(F.relu(stage.denoising.inner(said.hidden_Rh)))
        if weight:
            totals["denoising"] = totals["denoising"] + (1 - F.cosine_similarity(adapted, embedded, dim=-1)).sum()
            counts["denoising"] += len(said.tokens)
            reference = dict(enumerate(batch.response_BR[row][batch.response_mask_BR[row]].tolist()))
            differs += sum(token != reference.get(place) for place, token in enumerate(said.tokens))
        for first, last in said.segments:
            asked = by_hand.template(stage, stage.s2t.embed, embedded[first:last])
            torch.testing.assert_close(teacher.asked[segment], asked, msg=f"segment {segment} of the teacher")
            assert teacher.limits[segment] == (last - first) * stage.config.units_per_token + 32
            words = teacher.words(segment)
            usable = segment != RUNAWAY and bool(words) and not by_hand.looping(words)
            weighted += weight
            if weight and usable:
                text = by_hand.template(stage, stage.s2t.embed, adapted[first:last])
                logits = by_hand.unit_logits(stage.echo, text, words)
                target = torch.tensor([*words, stage.echo.end])
                totals["echo"] = totals["echo"] + F.cross_entropy(logits, target, reduction="sum")
                counts["echo"] += len(target)
                kept += 1
            segment += 1
    assert segment == len(teacher.limits)
    metrics = {
        "teacher/rejected_share": 1 - kept / weighted,
        "teacher/segments_per_sample": weighted / float(batch.weight_B.sum()),
        "pseudo_text/differs_share": differs / counts["denoising"],
    }
    if stage.config.pseudo_text == "generated":
        metrics["pseudo_text/rejected_share"] = 1 / 5
    return totals, counts, metrics


@pytest.mark.parametrize(
    ("pseudo_text", "layout"),
    [("argmax_teacher_forced", "packed"), ("argmax_teacher_forced", "padded"), ("reference", "packed"),
     ("free_run", "packed"), ("generated", "packed"), ("generated", "padded")],
)  # fmt: skip
def test_every_loss_and_gradient_of_an_echo_step_is_that_of_each_segment_by_hand(
    pseudo_text: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = make_stage(pseudo_text, layout).train()
    batch = make_batch(stage)
    teacher = FakeTeacher()
    monkeypatch.setattr(stage.teacher, "forward", teacher)

    terms = stage(batch)
    metrics = {name: float(value) for name, value in stage.metrics().items()}
    sum(term.total for term in terms.values()).backward()
    ours = {name: p.grad.clone() for name, p in stage.named_parameters() if p.grad is not None}
    stage.zero_grad()
    totals, counts, expected = speak(stage, batch, teacher)
    sum(totals.values()).backward()

    assert {name: int(term.count) for name, term in terms.items()} == counts
    for name, term in terms.items():
        torch.testing.assert_close(term.total, totals[name], rtol=1e-5, atol=1e-5, msg=name)
    wanted = {name: p.grad for name, p in stage.named_parameters() if p.grad is not None}
    assert ours.keys() == wanted.keys()
    for name, gradient in wanted.items():
        largest = float(gradient.abs().max())
        torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-4 * max(largest, 1.0), msg=name)
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("pseudo_text", ["argmax_teacher_forced", "free_run", "generated"])
def test_the_case_has_all_that_a_step_must_get_right(pseudo_text: str) -> None:
    stage = make_stage(pseudo_text).eval()
    batch = make_batch(stage)
    with torch.no_grad():
        heard, _, _ = hear(stage, batch)
    cuts = [len(said.segments) for said in heard]
    assert sum(count > 1 for count in cuts) >= 2 and max(cuts) > 2, "the trigger must cut"
    assert sum(cuts) > SILENT + 1 and (min(cuts) == 0 or pseudo_text == "free_run"), "one answer is its end alone"
    owners = [row for row, count in enumerate(cuts) for _ in range(count)]
    assert all(batch.weight_B[owners[segment]] for segment in (RUNAWAY, LOOP, SILENT))
    lengths = [last - first for said in heard for first, last in said.segments]
    assert len(set(lengths)) > 2, "segments of one length would hide what belongs to which"
    early = len(heard[0].tokens)
    ends = {"free_run": stage.config.free_run_tokens, "generated": max(OWN) + 1}
    assert 0 < early < ends.get(pseudo_text, LENGTHS[0] - 1)
    same = [token == reference for row, said in enumerate(heard)
            for token, reference in zip(said.tokens, batch.response_BR[row].tolist(), strict=False)]  # fmt: skip
    assert not all(same) and any(same)


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("pseudo_text", ["reference", "generated"])
def test_nats_of_the_pseudo_text_are_those_of_the_llm_alone_that_reads_the_question(
    pseudo_text: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = make_stage(pseudo_text, layout).train()
    batch = make_batch(stage)
    batch.transcript_lengths_B[5] = 0
    monkeypatch.setattr(stage.teacher, "forward", FakeTeacher())
    assert stage.probe() == {}, "nothing was said yet"
    stage(batch)
    trainable = {name for name, parameter in stage.named_parameters() if parameter.requires_grad}
    (term,) = stage(None, stage.probe).values()
    assert {name for name, parameter in stage.named_parameters() if parameter.requires_grad} == trainable

    llm, total, count = tiny.causal_lm(), 0.0, 0
    heard, _, _ = hear(stage, batch)
    for row, said in enumerate(heard):
        question = batch.transcript_BC[row, : int(batch.transcript_lengths_B[row])].tolist()
        if batch.weight_B[row] and question and said.tokens:
            after = batch.after_BQ[row][batch.after_mask_BQ[row]].tolist()
            prompt = [*batch.before_BP[row].tolist(), *question, *after]
            logits = llm(torch.tensor([[*prompt, *said.tokens]])).logits[0, len(prompt) - 1 : -1]
            total += float(F.cross_entropy(logits, torch.tensor(said.tokens), reduction="sum").detach())
            count += len(said.tokens)
    assert int(term.count) == count > 20
    assert float(term.total) == pytest.approx(total, rel=1e-4) and not term.total.requires_grad


def test_a_batch_without_the_answers_that_it_must_have_is_refused() -> None:
    with pytest.raises(ValueError, match="no answers were attached"):
        make_stage("generated")(tiny.speech_batch())


def test_what_a_forward_without_dropout_found_is_not_looked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = make_stage("argmax_teacher_forced").eval()
    batch = make_batch(stage)
    monkeypatch.setattr(stage.teacher, "forward", FakeTeacher())
    with torch.no_grad():
        surveyed = stage(batch)
    monkeypatch.setattr(stage.teacher, "forward", lambda *_: pytest.fail("the teacher was asked again"))
    terms = stage.train()(batch)
    for name, term in terms.items():
        torch.testing.assert_close(term.total, surveyed[name].total)
        assert term.count == surveyed[name].count


def test_metrics_of_one_segment_of_none_and_of_the_alignment(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = make_stage("argmax_teacher_forced", segmentation={"mode": "none"}).eval()
    teacher = FakeTeacher()
    monkeypatch.setattr(stage.teacher, "forward", teacher)
    alone = tiny.one_row(make_batch(stage), 2)
    stage(alone)
    found = {name: float(value) for name, value in stage.metrics().items()}
    assert len(teacher.limits) == 1 and found["perf/padding_share"] == 0
    assert found["teacher/rejected_share"] == 0 and found["teacher/segments_per_sample"] == 1
    assert found["teacher/words_per_segment"] == len(teacher.words(0))

    stage(dataclasses.replace(alone, weight_B=torch.zeros(1), targets=None))
    found = {name: float(value) for name, value in stage.metrics().items()}
    assert found["teacher/rejected_share"] == found["pseudo_text/differs_share"] == 1
    assert found["teacher/segments_per_sample"] == 0 and all(abs(value) < 100 for value in found.values())

    short = dataclasses.replace(alone, response_BR=alone.response_BR[:, :2].clone(), targets=None)
    short.response_BR[0, 1] = stage.end_token
    short.response_mask_BR = torch.ones(1, 2, dtype=torch.bool)
    (said, *_), _, _ = hear(stage, short)
    stage(short)
    differs = said.tokens != short.response_BR[0, : len(said.tokens)].tolist()
    assert len(said.tokens) == 1 and float(stage.metrics()["pseudo_text/differs_share"]) == differs

    aligning = make_stage("reference", denoising={"dropout": 0.0, "ffn": 24, "align_steps": 2})
    monkeypatch.setattr(aligning.teacher, "forward", teacher)
    aligning(alone)
    assert aligning.metrics()
    aligning(dataclasses.replace(alone, step=1, targets=None))
    assert aligning.metrics() == {}


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_an_answer_without_a_word_is_no_target(layout: str) -> None:
    stage = make_stage("argmax_teacher_forced", layout).train()
    alone = tiny.one_row(make_batch(stage), LENGTHS.index(1))
    terms = stage(alone)
    assert {name: int(term.count) for name, term in terms.items()} == {"s2t": 1, "echo": 0, "denoising": 0}
    assert float(terms["echo"].total) == float(terms["denoising"].total) == 0
    assert float(stage.metrics()["teacher/segments_per_sample"]) == 0


@pytest.mark.parametrize(
    "segmentation",
    [{"mode": "none"}, {"mode": "fixed", "fixed_tokens": 3}, {"mode": "fixed", "fixed_tokens": 1},
     TRIGGER, {**TRIGGER, "threshold": 0.9},
     {**TRIGGER, "min_tokens": 1, "look_ahead": 3}, {**TRIGGER, "min_tokens": 7, "max_wait": 7},
     {**TRIGGER, "threshold": -1.0, "min_tokens": 1}],
)  # fmt: skip
def test_segments_follow_the_recipe(segmentation: dict[str, Any]) -> None:
    stage = make_stage("reference", segmentation=segmentation).eval()
    torch.manual_seed(2)
    hidden = torch.randn(3, 30, 32) + stage.stop_row_h * torch.rand(3, 30, 1)
    lengths = [30, 17, 4]
    hidden[:, 1] = 9 * stage.stop_row_h  # a peak at the beginning
    spoken = torch.arange(30) < torch.tensor(lengths)[:, None]
    numbers = stage.segments(hidden, spoken)
    for row, length in enumerate(lengths):
        scores = [float(F.cosine_similarity(state, stage.stop_row_h, dim=0)) for state in hidden[row, :length]]
        wanted = by_hand.cut(scores, stage.config.segmentation)
        expected = [number for number, (first, last) in enumerate(wanted) for _ in range(first, last)]
        assert numbers[row, :length].tolist() == expected


@pytest.mark.parametrize("s2t_weight", [0.0, 0.6, 2.5])
def test_the_text_loss_has_its_weight_in_either_rule_of_lambda(s2t_weight: float) -> None:
    means = {"s2t": torch.tensor(3.0), "echo": torch.tensor(2.0), "denoising": torch.tensor(0.5)}
    dynamic = make_stage("reference", s2t_weight=s2t_weight)
    weights = dynamic.loss_weights(means, 0)
    assert (weights["s2t"], weights["echo"]) == (s2t_weight, 1.0)
    assert float(weights["denoising"]) == pytest.approx(0.8)
    fixed = make_stage("reference", s2t_weight=s2t_weight, denoising={"weighting": "fixed", "weight": 0.3})
    assert fixed.loss_weights(means, 0) == {"s2t": s2t_weight, "echo": 1.0, "denoising": 0.3}


def test_each_part_of_stage_three_has_its_learning_rate() -> None:
    for adapters in (False, True):
        stage = make_stage("reference", train_speech_adapters=adapters).train()
        front_end = stage.s2t.front_end
        assert front_end.alignment.training is front_end.shrink.training is adapters
        assert not front_end.encoder.training and not any(p.requires_grad for p in front_end.ctc_head.parameters())
        groups = stage.parameter_groups()
        assert set(groups) == {"lora", "denoising", "echo"} | ({"adapters"} if adapters else set())
        assert all(name.startswith("s2t.llm.") and ".lora_" in name for name in groups["lora"])
        assert all(name.startswith("echo.") for name in groups["echo"])
        assert all(name.startswith("denoising.") for name in groups["denoising"])
        listed = [name for names in groups.values() for name in names]
        assert sorted(listed) == sorted(name for name, p in stage.named_parameters() if p.requires_grad)


def test_counts_known_beforehand_leave_out_rows_without_weight() -> None:
    stage = make_stage("reference")
    batch = make_batch(stage)
    assert stage.known_counts(batch) == {"s2t": sum(LENGTHS) - LENGTHS[3]}
    assert stage.needs_survey(batch)
    text = s2t_stage()
    assert text.known_counts(batch) == {"s2t": sum(LENGTHS) - LENGTHS[3], "ctc": 1 + 2 + 3 + 2 + 3}
    assert {name: int(term.count) for name, term in text(batch).items()} == text.known_counts(batch)


def test_segment_rows_begin_at_their_first_column_and_are_no_wider_than_the_longest() -> None:
    spoken = torch.arange(7) < torch.tensor([7, 4, 0])[:, None]
    rows = segment_rows(torch.tensor([[0, 0, 1, 1, 1, 2, 2], [0, 1, 1, 1, 9, 9, 9], [0] * 7]), spoken)
    assert rows.mask_NT.long().tolist() == [[1, 1, 0], [1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]]


def test_the_denoising_loss_leaves_its_target_alone() -> None:
    adapted, target = torch.randn(1, 3, 4, requires_grad=True), torch.randn(1, 3, 4, requires_grad=True)
    denoising_loss(adapted, target, torch.ones(1, 3, dtype=torch.bool)).total.backward()
    assert target.grad is None and adapted.grad is not None


def test_the_alignment_begins_with_the_first_step() -> None:
    stage = make_stage("reference", denoising={"align_steps": 2})
    means = {name: torch.tensor(1.0) for name in ("s2t", "echo", "denoising")}
    assert [set(stage.loss_weights(means, step)) == {"denoising"} for step in (-1, 0, 1, 2)] == [
        False,
        True,
        True,
        False,
    ]
    assert s2t_stage(align_steps=2).loss_weights({}, 0)["ctc"] == 1.0


def test_ranks_that_must_agree_decode_on_after_the_last_end() -> None:
    stage = make_stage("free_run").eval()
    alone = tiny.one_row(make_batch(stage), 0)
    stopped = stage.s2t.generate(alone, stage.end_token, 20)
    on = stage.s2t.generate(alone, stage.end_token, 20, early_stop=False)
    said = int(on.mask_BR.sum())
    assert stopped.tokens_BR.shape == (1, said + 1) and on.tokens_BR.shape == (1, 20)
    assert torch.equal(on.tokens_BR[:, : said + 1], stopped.tokens_BR)
    assert bool((on.tokens_BR[:, said:] == stage.end_token).all())


# Stages I and II ----------------------------------------------------------------------------------------------------


def s2t_stage(**ctc: Any) -> Any:
    config = tiny.model_config()
    return build_s2t_stage(config.model_copy(update={"ctc": config.ctc.model_copy(update=ctc)}), tiny.s2t_model(config))


def alignments(frames: int, target: list[int]) -> list[list[int]]:
    """Every label sequence of so many frames that CTC reads as the target; 0 is the blank."""
    paths: list[tuple[list[int], int, int]] = [([], 0, 0)]
    for _ in range(frames):
        longer = []
        for path, done, last in paths:
            for label in {0, last, *target[done : done + 1]}:
                new = label != 0 and label != last
                if new and (done == len(target) or label != target[done]):
                    continue
                longer.append(([*path, label], done + new, label))
        paths = longer
    return [path for path, done, _ in paths if done == len(target)]


def test_ctc_is_the_sum_over_all_alignments_of_each_transcript() -> None:
    stage = s2t_stage(weight=0.4).eval()
    batch = tiny.speech_batch(3)
    batch.frames_B[:] = torch.tensor([16, 20, 24])
    batch.weight_B[1] = 0.0
    expected = 0.0
    for row in range(3):
        speech = stage.s2t.encode_speech(tiny.one_row(batch, row))
        log_probs = stage.s2t.front_end.ctc_head.linear(speech.aligned)[0].log_softmax(-1)
        size = int(batch.transcript_lengths_B[row])
        target = stage.s2t.front_end.ctc_head.classes(batch.transcript_BC[row : row + 1, :size])[0].tolist()
        paths = alignments(len(log_probs), target)
        assert len(paths) > 3
        scores = torch.stack([log_probs[range(len(path)), path].sum() for path in paths])
        expected -= float(batch.weight_B[row] * scores.detach().logsumexp(0))
    term = stage(batch)["ctc"]
    assert float(term.total) == pytest.approx(expected, rel=1e-4)
    assert int(term.count) == 1 + 3


def test_the_encoder_of_stage_one_never_wakes() -> None:
    stage = s2t_stage().train()
    assert stage.s2t.front_end.alignment.training and not any(m.training for m in stage.s2t.front_end.encoder.modules())


def test_ctc_counts_its_weight_beside_the_text_loss_and_one_alone() -> None:
    stage = s2t_stage(weight=0.4, align_steps=2)
    assert stage.loss_weights({}, 2) == {"s2t": 1.0, "ctc": 0.4}
    assert stage.loss_weights({}, 1)["ctc"] == 1.0
    assert stage.loss_weights({}, -1)["ctc"] == 0.4, "validation weighs as training does after the alignment"


def test_a_unit_loss_is_that_of_each_sentence_by_hand() -> None:
    stage = tiny.t2c_stage().eval()
    text, words = [[13, 20, 41], [17], [30, 31, 32, 33]], [[4, 0, 7, 7, 2], [], [11, 3]]
    weight = torch.tensor([1.0, 1.0, 0.0])

    def padded(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        longest = max(map(len, rows))
        mask = torch.arange(longest) < torch.tensor([len(row) for row in rows])[:, None]
        return torch.tensor([row + [0] * (longest - len(row)) for row in rows]), mask

    batch = UnitBatch(
        ids=["a", "b", "c"], step=0, weight_B=weight,
        **dict(zip(("text_BT", "text_mask_BT"), padded(text), strict=True)),
        **dict(zip(("words_BM", "words_mask_BM"), padded(words), strict=True)),
    )  # fmt: skip
    term = stage(batch)["t2c"]
    expected = torch.zeros(())
    for row in range(2):
        embedded = by_hand.template(stage, stage.text_table, stage.text_table(torch.tensor(text[row])))
        logits = by_hand.unit_logits(stage.t2c, embedded, words[row])
        expected = expected + F.cross_entropy(logits, torch.tensor([*words[row], stage.t2c.end]), reduction="sum")
    torch.testing.assert_close(term.total, expected, rtol=1e-5, atol=1e-5)
    assert int(term.count) == 6 + 1 and stage.known_counts(batch) == {"t2c": 7}
    assert stage.loss_weights({}, 0) == {"t2c": 1.0}
    trained = {name for name, p in stage.named_parameters() if p.requires_grad}
    assert set(stage.parameter_groups()["t2c"]) == trained and all(name.startswith("t2c.") for name in trained)
