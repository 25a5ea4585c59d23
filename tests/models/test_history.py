"""A prompt with the dialogue before the question: the loss of plain Hugging Face, and the same in every layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from echox.builders.stages import build_s2t_stage
from echox.stages.s2t import response_loss
from echox.stream.batch import SpeechBatch
from tests import tiny
from tests.models import test_families as families
from tests.stages import by_hand

LAYOUTS = ("packed", "padded")


def with_text(batch: SpeechBatch, lengths: list[int]) -> SpeechBatch:
    """Prompts of uneven lengths before the audio."""
    generator = torch.Generator().manual_seed(3)
    mask_BP = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    before_BP = torch.randint(12, tiny.VOCABULARY, mask_BP.shape, generator=generator)
    return replace(batch, before_BP=before_BP, before_mask_BP=mask_BP)


def with_speech(batch: SpeechBatch) -> SpeechBatch:
    """Rows of two earlier clips, one and none, in three pieces of text."""
    generator = torch.Generator().manual_seed(4)
    sizes, lengths = (3, 4, 2), torch.tensor([[3, 4, 1], [2, 3, 0], [3, 0, 0], [1, 2, 2]])
    mask_BP = torch.cat([torch.arange(size) < lengths[:, k, None] for k, size in enumerate(sizes)], 1)
    frames_H = torch.tensor([40, 24, 64, 16, 56])
    mel_HMT = torch.randn(5, 8, batch.mel_BMT.shape[2], generator=generator)
    return replace(
        batch,
        before_BP=torch.randint(12, tiny.VOCABULARY, mask_BP.shape, generator=generator),
        before_mask_BP=mask_BP,
        before_sizes=sizes,
        history_BK=torch.tensor([[0, 1], [2, -1], [-1, -1], [4, 3]]),
        mel_BMT=torch.cat([batch.mel_BMT, mel_HMT]),
        frames_B=torch.cat([batch.frames_B, frames_H]),
    )


def own_loss(model: Any, batch: SpeechBatch) -> Tensor:
    """Hugging Face's loss of each whole row of text, right-padded, with labels on the response alone."""
    assert batch.before_mask_BP is not None
    whole, labels = [], []
    for row, (prompt, response) in enumerate(families.rows(batch)):
        columns = batch.before_BP.shape[1]
        prompt = batch.before_BP[row][batch.before_mask_BP[row]].tolist() + prompt[columns:]
        whole.append(prompt + response)
        labels.append([-100] * len(prompt) + response)
    longest = max(map(len, whole))
    ids, targets = (torch.tensor([row + [fill] * (longest - len(row)) for row in rows])
                    for rows, fill in ((whole, 0), (labels, -100)))  # fmt: skip
    mask = torch.arange(longest) < torch.tensor([len(row) for row in whole])[:, None]
    loss: Tensor = model(input_ids=ids, attention_mask=mask.long(), labels=targets).loss
    return loss


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_the_loss_after_a_dialogue_is_hugging_faces_own(tmp_path: Path, family: str, layout: str) -> None:
    model, batch = families.build(family), with_text(tiny.speech_batch(4), [9, 2, 5, 14])
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        s2t = families.s2t(tmp_path, layout, batch)
        term, _ = response_loss(s2t, s2t(batch), batch)
        expected = own_loss(model, batch)
        plain, _ = response_loss(s2t, s2t(replace(batch, before_mask_BP=None)), batch)
    torch.testing.assert_close(term.total / term.count, expected, rtol=1e-5, atol=1e-5)
    assert abs(float(plain.total / plain.count - expected)) > 1e-3, "padding that is read must show"


def alone(batch: SpeechBatch, row: int) -> SpeechBatch:
    """Row `row` without padding, and with its own clips alone."""
    rows = len(batch.ids)
    single = tiny.one_row(replace(batch, mel_BMT=batch.mel_BMT[:rows], frames_B=batch.frames_B[:rows]), row)
    sizes = batch.before_sizes or (batch.before_BP.shape[1],)
    assert batch.before_mask_BP is not None
    real = batch.before_mask_BP[row : row + 1]
    parts = [part[:, mask[0]] for part, mask in zip(batch.before_BP[row : row + 1].split(sizes, 1),
                                                    real.split(sizes, 1), strict=True)]  # fmt: skip
    single = replace(single, before_BP=torch.cat(parts, 1), before_sizes=tuple(part.shape[1] for part in parts))
    if batch.history_BK is None:
        return single
    clips = [rows + number for number in batch.history_BK[row].tolist() if number >= 0]
    longest = int(batch.frames_B[[row, *clips]].max())
    mel = batch.mel_BMT[[row, *clips], :, :longest]
    numbers = torch.tensor(
        [[place if number >= 0 else -1 for place, number in enumerate(batch.history_BK[row].tolist())]]
    )
    return replace(single, mel_BMT=mel, frames_B=batch.frames_B[[row, *clips]], history_BK=numbers)


def sums(stage: Any, batches: list[SpeechBatch]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    stage.zero_grad()
    totals: dict[str, Tensor] = {}
    for batch in batches:
        for name, term in stage(batch).items():
            totals[name] = totals.get(name, torch.zeros(())) + term.total
    sum(totals.values()).backward()
    return totals, {name: p.grad.clone() for name, p in stage.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("spoken", [False, True])
def test_packed_rows_padded_rows_and_single_ones_agree(spoken: bool) -> None:
    batch = tiny.speech_batch(4)
    batch = with_speech(batch) if spoken else with_text(batch, [9, 2, 5, 14])
    found = []
    for layout in LAYOUTS:
        config = tiny.model_config(layout=layout)
        stage = build_s2t_stage(config, tiny.s2t_model(config))
        found.append(sums(stage, [batch]))
    found.append(sums(stage, [alone(batch, row) for row in range(4)]))
    (totals, gradients), *others = found
    assert len(gradients) > 20
    for other_totals, other_gradients in others:
        for name, total in totals.items():
            torch.testing.assert_close(other_totals[name], total, rtol=1e-4, atol=1e-4, msg=name)
        assert other_gradients.keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(other_gradients[name], gradient, rtol=1e-3, atol=1e-3, msg=name)


def row_by_hand(model: Any, batch: SpeechBatch, row: int) -> Tensor:
    """Text, clip, text, and so on, of one row, each clip encoded by itself: `[L, h]`."""
    assert batch.history_BK is not None and batch.before_mask_BP is not None

    def heard(number: int) -> Tensor:
        frames = int(batch.frames_B[number])
        single = replace(tiny.one_row(tiny.speech_batch(1), 0), mel_BMT=batch.mel_BMT[number : number + 1, :, :frames],
                         frames_B=batch.frames_B[number : number + 1])  # fmt: skip
        return model.encode_speech(single).padded()[0][0]

    parts = []
    pieces = (values[row].split(batch.before_sizes) for values in (batch.before_BP, batch.before_mask_BP))
    for place, (tokens, mask) in enumerate(zip(*pieces, strict=True)):
        parts.append(model.embed(tokens[mask]))
        if place < batch.history_BK.shape[1] and (number := int(batch.history_BK[row, place])) >= 0:
            parts.append(heard(len(batch.ids) + number))
    return torch.cat([*parts, heard(row), model.embed(batch.after_BQ[row][batch.after_mask_BQ[row]])])


def test_earlier_clips_stand_where_they_were_said() -> None:
    model, batch = tiny.s2t_model().eval(), with_speech(tiny.speech_batch(4))
    with torch.no_grad():
        out = model(batch)
        own = model.generate(batch, tiny.END, 10)
        hidden_BRh = out.states.response.to_padded(out.states.hidden)
        for row in range(4):
            prompt = row_by_hand(model, batch, row)
            response = batch.response_BR[row][batch.response_mask_BR[row]].tolist()
            expected = by_hand.states(model, prompt, response)[:-1]
            torch.testing.assert_close(hidden_BRh[row, : len(response)], expected, rtol=1e-4, atol=1e-4)
            assert own.tokens_BR[row][own.mask_BR[row]].tolist() == by_hand.own_answer(model, prompt, tiny.END, 10)


def test_ctc_hears_the_questions_alone() -> None:
    plain, stage = tiny.speech_batch(4), build_s2t_stage(tiny.model_config(), tiny.s2t_model()).eval()
    for step in (-1, 0):
        terms = [stage(replace(batch, step=step))["ctc"] for batch in (plain, with_speech(plain))]
        torch.testing.assert_close(terms[0].total, terms[1].total, rtol=1e-4, atol=1e-4)
        assert terms[0].count == terms[1].count
