"""Computes the losses of each stage as a plain training loop would: the honest baseline of what the engine saves.

Rows are padded, audio that is encoded in the step is padded to 30 seconds, the heads make logits of all positions in
float32, and the teacher decodes one segment after the other on a cache that grows. Weights, batch and losses are those
of the stage; nothing is slower than it is where one does not think of it, and the second pass of Stage III has no head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from echox.bench.oracle import dynamic_greedy, row_of
from echox.models.echo import segment_rows
from echox.models.greedy import DecodedUnits, repeats
from echox.models.ragged import JoinedRows, Layout, join_rows
from echox.models.speech import CtcScores, SpeechOutput, encoded_frames
from echox.models.t2c import T2CDecoder, TextPart
from echox.stages.echo import EchoStage, PseudoText
from echox.stages.losses import LossTerm, denoising_loss
from echox.stages.s2t import S2TStage
from echox.stages.t2c import T2CStage

if TYPE_CHECKING:
    from echox.models.s2t import S2TModel
    from echox.stream.batch import SpeechBatch

IGNORED = -100


def naive_losses(stage: Any, batch: Any, *, limit_ends: bool = False) -> dict[str, LossTerm]:
    """The losses that `stage(batch)` has, without its techniques.

    Args:
        stage: past its alignment steps.
        batch: for it. A speech encoder that runs in the step must be one of `input: pad_30s`, or the features differ.
        limit_ends: a row of the teacher that says the most words it may has ended, as imposed lengths have it.
    """
    if isinstance(stage, T2CStage):
        text = stage.text(batch.text_BT, batch.text_mask_BT)
        return {"t2c": _units_loss(stage.t2c, text, batch.words_BM, batch.words_mask_BM, batch.weight_B)}
    if isinstance(stage, S2TStage):
        speech, logits_BTC = _encode(stage.s2t, batch)
        text_loss, _ = _response(stage.s2t, speech, batch)
        return {"s2t": text_loss, "ctc": _transcript_loss(stage.s2t, logits_BTC, speech.frames.lengths_N, batch)}
    assert isinstance(stage, EchoStage)
    return _echo(stage, batch, limit_ends)


def _echo(stage: EchoStage, batch: SpeechBatch, limit_ends: bool) -> dict[str, LossTerm]:
    s2t = stage.s2t
    speech, _ = _encode(s2t, batch)
    text_loss, states_BRh = _response(s2t, speech, batch)
    assert stage.config.pseudo_text in ("generated", "reference"), "the two that the baseline is written for"
    text = PseudoText(batch.response_BR, batch.response_mask_BR & (batch.response_BR != stage.end_token))
    if stage.config.pseudo_text == "generated":
        assert batch.own_BR is not None and batch.own_mask_BR is not None
        text = PseudoText(batch.own_BR, batch.own_mask_BR)
        hidden, row, columns_BR = _llm(s2t, speech, batch, text.tokens_BR, text.spoken_BR)
        states_BRh = _at(hidden, columns_BR - 1)
    rows = segment_rows(stage.segments(states_BRh, text.spoken_BR), text.spoken_BR)

    prefix, header = stage.embed_text(stage.prefix_P), stage.embed_text(stage.header_Q)
    text_BRh = stage.embed_text(text.tokens_BR)
    asked = stage.text_part(prefix, text_BRh, header, text.tokens_BR, rows)
    units = _teacher(stage, asked, stage.most_words(rows.mask_NT.sum(1)), limit_ends)
    usable_N = units.ended_N & units.mask_NM.any(1) & ~repeats(units.words_NM, units.mask_NM)
    weight_N = batch.weight_B[rows.owner_N] * rows.mask_NT.any(1) * usable_N

    adapted_BRh = stage.adapt(states_BRh)
    student = stage.text_part(prefix, adapted_BRh, header, text.tokens_BR, rows)
    counted_BR = text.spoken_BR & (batch.weight_B[:, None] > 0)
    return {
        "s2t": text_loss,
        "echo": _units_loss(stage.echo, student, units.words_NM, units.mask_NM, weight_N),
        "denoising": denoising_loss(adapted_BRh, text_BRh, counted_BR),
    }


def _encode(s2t: S2TModel, batch: SpeechBatch) -> tuple[SpeechOutput, Tensor]:
    """The front end on padded rows, and the CTC logits of all frames; Whisper hears 30 seconds of each."""
    front_end = s2t.front_end
    features_BTd = batch.features_BTd
    if features_BTd is None:
        whisper: Any = front_end.encoder
        with torch.no_grad():
            mel_BMT = batch.mel_BMT.to(whisper.encoder.conv1.weight.dtype)
            real_T = torch.arange(mel_BMT.shape[2], device=mel_BMT.device)
            heard_BMT = mel_BMT * (real_T < whisper.window)
            padded_BMT = F.pad(heard_BMT, (0, whisper.window - mel_BMT.shape[2]))
            features_BTd = whisper.encoder(padded_BMT).last_hidden_state
    longest = int((batch.frames_B.max() + 1) // 2)  # host sync
    features_BTd = features_BTd[:, :longest].to(front_end.alignment.projection.weight.dtype)
    with _layout(front_end.alignment, "padded"):
        aligned_BTh, frames = front_end.alignment(features_BTd, encoded_frames(batch.frames_B))
        logits_BTC = F.linear(aligned_BTh, front_end.ctc_head.linear.weight)
        labels_BT = logits_BTC.detach().argmax(-1)
        shrunk = front_end.shrink(aligned_BTh, frames, labels_BT)
    speech_BVh = shrunk.speech
    if s2t.ctc_embedding:
        kept_BVC = frames.gather(logits_BTC, shrunk.kept, shrunk.rows).float().softmax(-1)[..., 1:]
        table_Ch = s2t.embed(front_end.ctc_head.tokens[1:])
        speech_BVh = speech_BVh + kept_BVC.to(table_Ch.dtype) @ table_Ch
    return (
        SpeechOutput(speech_BVh, shrunk.rows, shrunk.kept, aligned_BTh, CtcScores(labels_BT), frames),
        logits_BTC,
    )


def _transcript_loss(s2t: S2TModel, logits_BTC: Tensor, frames_B: Tensor, batch: SpeechBatch) -> LossTerm:
    """CTC from the log-probabilities of all classes at all padded frames."""
    rows, lengths_B = len(batch.weight_B), batch.transcript_lengths_B
    log_probs_TBC = logits_BTC[:rows].float().log_softmax(-1).transpose(0, 1)
    classes_BC = s2t.front_end.ctc_head.classes(batch.transcript_BC)
    losses_B = F.ctc_loss(
        log_probs_TBC, classes_BC, frames_B[:rows], lengths_B, blank=0, reduction="none", zero_infinity=True
    )
    return LossTerm((losses_B * batch.weight_B * (lengths_B > 0)).sum(), (lengths_B * batch.weight_B).sum())


def _llm(
    s2t: S2TModel, speech: SpeechOutput, batch: SpeechBatch, tokens_BR: Tensor, mask_BR: Tensor
) -> tuple[Tensor, JoinedRows, Tensor]:
    """States of padded rows that end in `tokens_BR`, the rows, and the column of each token."""
    blocks, masks = s2t.prompt(speech, batch)
    row = join_rows([*blocks, s2t.embed(tokens_BR)], [*masks, mask_BR])
    hidden: Tensor = s2t.decoder(
        inputs_embeds=row.values_BLh, attention_mask=row.mask_BL.long(), use_cache=False
    ).last_hidden_state
    return hidden, row, row.columns[-1]


def _response(s2t: S2TModel, speech: SpeechOutput, batch: SpeechBatch) -> tuple[LossTerm, Tensor]:
    """Text loss of all positions, those of the prompt ignored, and the states that predict the response."""
    hidden, row, columns_BR = _llm(s2t, speech, batch, batch.response_BR, batch.response_mask_BR)
    counted_BR = batch.response_mask_BR & (batch.weight_B[:, None] > 0)
    targets_BL = _labels(row.mask_BL, columns_BR - 1, batch.response_BR, counted_BR)
    logits_BLV = s2t.head(hidden)
    total = F.cross_entropy(logits_BLV.flatten(0, 1), targets_BL.flatten(), ignore_index=IGNORED, reduction="sum")
    return LossTerm(total, counted_BR.sum()), _at(hidden, columns_BR - 1)


def _teacher(stage: EchoStage, asked: TextPart, limit_N: Tensor, limit_ends: bool) -> DecodedUnits:
    """Units of each segment, one after the other."""
    text, decoder = asked.left_padded(), stage.teacher.decoder
    said = []
    with stage._timer.timed("teacher", limit_N.device):
        for number in range(len(limit_N)):
            alone, starts_1S = row_of(text, number, asked.starts_NS)
            said.append(dynamic_greedy(decoder, alone, limit_N[number : number + 1], starts_1S))
    longest = max(units.words_NM.shape[1] for units in said)
    return DecodedUnits(
        _stacked([units.words_NM for units in said], longest, decoder.pad),
        _stacked([units.mask_NM for units in said], longest, False),
        torch.cat([units.ended_N | limit_ends for units in said]),
    )


def _units_loss(decoder: T2CDecoder, text: TextPart, words_NM: Tensor, mask_NM: Tensor, weight_N: Tensor) -> LossTerm:
    """Loss of words and ends, with logits of all positions of padded rows."""
    units = decoder.unit_embedding(words_NM).to(text.blocks[0].dtype)
    if decoder.training and decoder.history_dropout:
        units = units * (torch.rand_like(mask_NM, dtype=units.dtype) >= decoder.history_dropout)[..., None]
    row = join_rows([*text.blocks, units], [*text.masks, mask_NM])
    where: dict[str, Tensor] = {"attention_mask": row.mask_BL.long()}
    lengths_N, said_N = row.mask_BL.sum(1), mask_NM.sum(1)
    if decoder._places_text:
        text_N1 = (lengths_N - said_N)[:, None]
        where["position_ids"] = decoder._places(text_N1, row.mask_BL.shape[1], text.starts_NS, words_NM)
    inputs = decoder.dropout(decoder.projection(row.values_BLh))
    hidden = decoder.body(inputs_embeds=inputs, use_cache=False, **where).last_hidden_state
    logits_NLU = decoder.head(hidden).float()
    # Column m predicts word m, the one at the last real position the end.
    counted_N1 = (weight_N > 0)[:, None]
    targets_NL = _labels(row.mask_BL, row.columns[-1] - 1, words_NM, mask_NM & counted_N1)
    ends_N1 = torch.full_like(lengths_N, decoder.end)[:, None]
    targets_NL = targets_NL.scatter(
        1, (lengths_N - 1)[:, None], ends_N1.masked_fill(~counted_N1, IGNORED - decoder.text_classes)
    )
    targets_NL = torch.where(targets_NL >= 0, targets_NL + decoder.text_classes, IGNORED)
    total = F.cross_entropy(logits_NLU.flatten(0, 1), targets_NL.flatten(), ignore_index=IGNORED, reduction="sum")
    return LossTerm(total, (said_N + 1).mul(weight_N > 0).sum())


def _labels(mask_BL: Tensor, columns_BR: Tensor, tokens_BR: Tensor, counted_BR: Tensor) -> Tensor:
    """`[B, L]`: the counted tokens at their columns, and what cross-entropy ignores everywhere else."""
    size = mask_BL.shape[1]
    labels = tokens_BR.new_full((len(mask_BL), size + 1), IGNORED)
    return labels.scatter(1, torch.where(counted_BR, columns_BR, size), tokens_BR)[:, :size]


def _at(hidden: Tensor, columns_BR: Tensor) -> Tensor:
    """States `[B, L, h]` at some columns of each row."""
    index = columns_BR.clamp(0, hidden.shape[1] - 1)[..., None].expand(-1, -1, hidden.shape[2])
    return hidden.gather(1, index)


def _stacked(rows: Sequence[Tensor], longest: int, value: float) -> Tensor:
    return torch.cat([F.pad(each, (0, longest - each.shape[1]), value=value) for each in rows])


@contextmanager
def _layout(module: Any, layout: Layout) -> Iterator[None]:
    before, module.layout = module.layout, layout
    try:
        yield
    finally:
        module.layout = before
