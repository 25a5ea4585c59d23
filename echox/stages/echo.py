"""Computes the losses of stage III: one forward runs S2T model, frozen teacher and Echo path (paper section 2.3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from echox.models.echo import DenoisingAdapter, Segments, TriggerRule, segment_rows, trigger_scores, trigger_segments
from echox.models.flops import Costs, denoising_costs, flops_by_part, llm_costs, speech_costs, t2c_costs
from echox.models.greedy import DecodedUnits, Draft, repeats
from echox.models.ragged import Rows, lengths_to_mask, padding_share
from echox.models.s2t import ResponseStates, S2TModel, S2TOutput
from echox.models.sizes import llm_size, speech_size, t2c_size
from echox.models.t2c import T2CDecoder, Teacher, TextPart, text_part
from echox.models.t2c_text import T2CText
from echox.models.trigger import Cutter, FixedCutter, StreamingTrigger
from echox.models.work import Work, counts_of
from echox.stages.labels import LabelStore, annotated_units, drafted_units, stored_units, token_rows
from echox.stages.losses import LossTerm, denoising_loss
from echox.stages.part_timer import PartTimer
from echox.stages.s2t import (
    note_response,
    note_speech,
    response_loss,
    speech_parameter_groups,
    transcript_loss,
)
from echox.stream.batch import SpeechBatch
from echox.units.word_limit import SPARE_WORDS, UNKNOWN

if TYPE_CHECKING:
    from echox.config.model_schema import EchoConfig


@dataclass(frozen=True)
class PseudoText:
    """X', the text that the speech is to say: token ids `[B, R]`, and True on those that are spoken."""

    tokens_BR: Tensor
    spoken_BR: Tensor


@dataclass(frozen=True)
class PseudoTargets:
    """What one micro-batch is to learn: X', how it is cut into segments, and Y', their units.

    `known_N`: segments whose units were kept from before, where they are.
    """

    text: PseudoText
    rows: Segments
    units: DecodedUnits
    known_N: Tensor | None = None


class EchoStage(nn.Module):
    """Trains LoRA, the Denoising Adapter and the Echo decoder against the teacher's greedy units.

    Args:
        config: where X' comes from, how a response is cut, and the weights of the losses.
        s2t: trained S2T model; its speech adapters are frozen unless they require gradients.
        teacher: frozen T2C.
        echo: Echo decoder, initialised from the teacher's weights.
        denoising: H to text embeddings.
        prefix_P, header_Q: T2C template tokens.
        stop_row_h: LM-head row of the full stop, the streaming trigger.
        end_token: id that ends a response; it is never spoken.
        t2c_text: how the decoders are given their text; None gives them the embeddings as they are.

    Attributes:
        words_per_token: unit-language words that the teacher may say for a text token, beside a few for any segment.
        label_store: keeps the teacher's labels where the recipe has them cached or drafted; set after construction.
    """

    prefix_P: Tensor
    header_Q: Tensor
    stop_row_h: Tensor

    def __init__(
        self,
        config: EchoConfig,
        *,
        s2t: S2TModel,
        teacher: T2CDecoder,
        echo: T2CDecoder,
        denoising: DenoisingAdapter,
        prefix_P: Tensor,
        header_Q: Tensor,
        stop_row_h: Tensor,
        end_token: int,
        t2c_text: T2CText | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.s2t = s2t
        self.teacher = Teacher(teacher).requires_grad_(False)
        self.echo = echo
        self.denoising = denoising
        self.t2c_text = t2c_text or T2CText()
        self.register_buffer("prefix_P", prefix_P, persistent=False)
        self.register_buffer("header_Q", header_Q, persistent=False)
        self.register_buffer("stop_row_h", stop_row_h.float(), persistent=False)
        self.end_token = end_token
        self.words_per_token = float(UNKNOWN if config.units_per_token == "auto" else config.units_per_token)
        self._hundredths = math.ceil(round(100 * self.words_per_token, 6))
        adapters = (s2t.front_end.alignment, s2t.front_end.shrink)
        self._adapters_train = any(p.requires_grad for adapter in adapters for p in adapter.parameters())
        self.label_store: LabelStore | None = None
        self.work = Work()
        self._timer = PartTimer()
        self._last: dict[str, Tensor] = {}
        self._said: tuple[SpeechBatch, PseudoText] | None = None

    def train(self, mode: bool = True) -> EchoStage:
        """Switch the mode; teacher, encoder and frozen speech adapters stay in eval."""
        super().train(mode)
        self.teacher.eval()
        frozen = self.s2t.front_end.encoder if self._adapters_train else self.s2t.front_end
        frozen.eval()
        return self

    def zero_leaf_modules(self) -> list[nn.Module]:
        """Modules that ZeRO-3 gathers whole before their forward."""
        return [self.teacher]

    def forward(self, batch: SpeechBatch, job: Callable[[SpeechBatch], Any] | None = None) -> Any:
        """Losses of one micro-batch: `s2t`, `echo`, `denoising`, `ctc` if it has a weight; `denoising` alone at first.

        Without dropout (in eval mode) what was found, X' and Y', stays on the batch, and a forward of the same batch in
        training takes it from there: so a step's token counts are known before its first backward.

        With a `job`, its result instead: under ZeRO-3, parts may be called only within a forward of the whole.
        """
        if job is not None:
            return job(batch)
        self.work = Work()
        if self._aligns(batch.step):
            return self._align(batch)
        found: PseudoTargets | None = batch.targets
        out = self.s2t(batch, at_tokens=self._at_tokens, ctc=self.config.ctc_weight > 0)
        loss_s2t, own = response_loss(self.s2t, out, batch, best=found is None and self._says_argmax)
        terms = {"s2t": loss_s2t}
        if self.config.ctc_weight:
            terms["ctc"] = transcript_loss(out.speech.ctc, out.speech.frames, batch)

        text = self.pseudo_text(batch, out, own) if found is None else found.text
        states = self._states(batch, out, text)
        decodes = found is None and self.config.labels != "annotated"
        prefix, header, text_BRh = self._embeddings(text.tokens_BR)
        if found is None:
            hidden_BRh = states.response.to_padded(states.hidden)
            rows = segment_rows(self.segments(hidden_BRh, text.spoken_BR), text.spoken_BR)
            teacher_text = self.text_part(prefix, text_BRh, header, text.tokens_BR, rows)
            found = PseudoTargets(text, rows, *self._labels(batch, text, rows, teacher_text))
            self._keep(batch, found)
        rows, units = found.rows, found.units
        weight_N = batch.weight_B[rows.owner_N] * rows.mask_NT.any(1)
        usable_N = units.ended_N & units.mask_NM.any(1)
        if self.config.labels != "annotated":
            usable_N = usable_N & ~repeats(units.words_NM, units.mask_NM)

        adapted_BRh = states.response.to_padded(self.adapt(states.hidden))
        student_input = self.text_part(prefix, adapted_BRh, header, text.tokens_BR, rows)
        loss = self.echo.loss(student_input, units.words_NM, units.mask_NM, weight_N * usable_N)
        terms["echo"] = LossTerm(loss.total, loss.tokens)
        terms["denoising"] = self._denoising_loss(adapted_BRh, text_BRh, text, batch)
        self._said = (batch, text)
        self._note(batch, out, states, live=True)
        self._note_units(loss.rows, found, decodes=decodes)
        self._last = {
            **self._answers_rejected(batch),
            "teacher/rejected_share": 1 - (usable_N * weight_N).sum() / weight_N.sum().clamp(min=1),
            "teacher/words_per_segment": (units.mask_NM.sum(1) * weight_N).sum() / weight_N.sum().clamp(min=1),
            "teacher/segments_per_sample": weight_N.sum() / batch.weight_B.sum().clamp(min=1),
            "pseudo_text/differs_share": _differing(text, batch),
            "perf/padding_share": padding_share(out.speech.frames, states.rows, loss.rows),
        }
        if found.known_N is not None:
            known = (found.known_N * weight_N).sum() / weight_N.sum().clamp(min=1)
            self._last["teacher/cached_share"] = known
        if units.drafted_N is not None:
            words = (units.mask_NM.sum(1) * weight_N).sum().clamp(min=1)
            self._last["teacher/drafted_share"] = (units.drafted_N * weight_N).sum() / words
        return terms

    @property
    def _at_tokens(self) -> bool:
        return self.config.state == "own"

    @property
    def _says_argmax(self) -> bool:
        """Whether X' is what the states of the reference make the most probable."""
        return self.config.pseudo_text == "argmax_teacher_forced"

    def _labels(
        self, batch: SpeechBatch, text: PseudoText, rows: Segments, teacher_text: TextPart
    ) -> tuple[DecodedUnits, Tensor | None]:
        """Y' of each segment, and which of them were decoded before, where they are kept.

        Raises:
            ValueError: annotated labels are wanted, and the batch has none; or cached ones, and nothing keeps them.
        """
        limit_N = self.most_words(rows.mask_NT.sum(1))
        if self.config.labels == "annotated":
            if batch.labels_BM is None or batch.labels_mask_BM is None:
                raise ValueError("model.echo.labels=annotated, but the batch has no units")
            most = self.echo.max_positions
            return annotated_units(batch.labels_BM, batch.labels_mask_BM, rows, teacher_text, most), None
        if self.config.labels == "teacher":
            return self._decode(teacher_text, limit_N), None
        if self.label_store is None:
            raise ValueError(f"model.echo.labels={self.config.labels}, but the stage was given no store of labels")
        segments = token_rows(rows.scatter(text.tokens_BR), rows.mask_NT)
        padding = self.teacher.decoder.pad
        if self.config.labels == "drafted":
            units = drafted_units(self._decode, teacher_text, limit_N, segments, self.label_store, padding)
            return units, None
        return stored_units(self._decode, teacher_text, limit_N, segments, self.label_store, padding)

    def _decode(self, text: TextPart, limit_N: Tensor, draft: Draft | None = None) -> DecodedUnits:
        """What the frozen teacher says."""
        asked = text.left_padded()
        with self._timer.timed("teacher", limit_N.device):
            units: DecodedUnits = self.teacher(asked.values_BLh, asked.mask_BL, limit_N, text.starts_NS, draft)
        return units

    def part_seconds(self) -> dict[str, float]:
        """Seconds in the teacher since they were last asked for. A host sync."""
        return self._timer.read("teacher")

    def _aligns(self, step: int) -> bool:
        return 0 <= step < self.config.denoising.align_steps

    def _align(self, batch: SpeechBatch) -> dict[str, LossTerm]:
        with torch.no_grad():
            out = self.s2t(batch, at_tokens=self._at_tokens)
            text: PseudoText = batch.targets
            if text is None:
                own = self.s2t.best_tokens(out.states.hidden) if self._says_argmax else None
                text = self.pseudo_text(batch, out, own)
            states = self._states(batch, out, text)
            text_BRh = self.embed_text(text.tokens_BR)
        self._keep(batch, text)
        self._note(batch, out, states, live=False)
        adapted_BRh = states.response.to_padded(self.adapt(states.hidden))
        self._said = None
        self._last = self._answers_rejected(batch)
        return {"denoising": self._denoising_loss(adapted_BRh, text_BRh, text, batch)}

    def _note(self, batch: SpeechBatch, out: S2TOutput, states: ResponseStates, *, live: bool) -> None:
        """Note what was computed, but not a second time what a forward without gradient surveys beforehand."""
        if not self.training:
            return
        trained = live and (self._adapters_train or self.config.ctc_weight > 0)
        note_speech(self.work, batch, out.speech, live=trained)
        note_response(self.work, out, live=live)
        if states.rows is not out.states.rows:
            self.work.add("llm", *(["llm_live"] if live else []), lengths_N=states.rows.lengths_N, kind="causal")
        through = ["adapted_through"] if live else []
        self.work.add("adapted", "adapted_live", *through, lengths_N=states.response.lengths_N)

    def _note_units(self, rows: Rows, found: PseudoTargets, *, decodes: bool) -> None:
        """Note the rows of the Echo decoder, and those of the teacher, which reads and writes the same."""
        words = found.units.mask_NM
        if self.training:
            self.work.add("echo", "echo_live", lengths_N=rows.lengths_N, kind="causal")
            self.work.add("echo_head", "echo_head_live", lengths_N=words, kind="mask")
        if decodes:
            self.work.add("teacher", lengths_N=rows.lengths_N, kind="causal", known_N=found.known_N)
            self.work.add("teacher_head", lengths_N=words, kind="mask", known_N=found.known_N)

    def flops(self, works: Sequence[Work]) -> dict[str, float]:
        """FLOP by part of the forwards that noted `works` and of their backward. A host sync.

        Answers that the LLM generates in the step (`pseudo_text: free_run`) are not among them.
        """
        return flops_by_part(self._costs, counts_of(works))

    @cached_property
    def _costs(self) -> Costs:
        llm = llm_size(self.s2t.causal_lm)
        return {
            **speech_costs(
                speech_size(self.s2t, encodes=True),
                adapters_train=self._adapters_train,
                ctc_trains=self.config.ctc_weight > 0,
            ),
            **llm_costs(llm, inputs_live=self._adapters_train),
            **denoising_costs(llm.width, self.denoising.inner.out_features),
            **t2c_costs(t2c_size(self.echo), "echo", trains=True),
            **t2c_costs(t2c_size(self.echo), "teacher", trains=False),
        }

    def _keep(self, batch: SpeechBatch, found: PseudoTargets | PseudoText) -> None:
        if not self.training:
            batch.targets = found

    @staticmethod
    def _denoising_loss(adapted_BRh: Tensor, text_BRh: Tensor, text: PseudoText, batch: SpeechBatch) -> LossTerm:
        return denoising_loss(adapted_BRh, text_BRh, text.spoken_BR & (batch.weight_B[:, None] > 0))

    def _answers_rejected(self, batch: SpeechBatch) -> dict[str, Tensor]:
        """Share of the samples whose own answer, made beforehand, is of no use."""
        if self.config.pseudo_text != "generated" or batch.own_mask_BR is None:
            return {}
        counted_B = batch.weight_B > 0
        rejected_B = counted_B & ~batch.own_mask_BR.any(1)
        return {"pseudo_text/rejected_share": rejected_B.sum() / counted_B.sum().clamp(min=1)}

    @torch.no_grad()
    def pseudo_text(self, batch: SpeechBatch, out: S2TOutput, own: Tensor | None) -> PseudoText:
        """X' and the mask of its spoken positions, those before the end token.

        Args:
            batch: with the reference, and answers made beforehand where they are wanted.
            out: of the S2T model.
            own: the token that each state makes the most probable, where X' consists of them.

        Raises:
            ValueError: answers made beforehand are wanted, and the batch has none.
        """
        if self.config.pseudo_text == "generated":
            if batch.own_BR is None or batch.own_mask_BR is None:
                raise ValueError("model.echo.pseudo_text=generated, but no answers were attached to the batch")
            return PseudoText(batch.own_BR, batch.own_mask_BR)
        if self.config.pseudo_text == "free_run":
            said = self.s2t.generate(
                batch, self.end_token, self.config.free_run_tokens, early_stop=False, speech=out.speech
            )
            return PseudoText(said.tokens_BR, said.mask_BR)
        text_BR = batch.response_BR if own is None else out.states.response.to_padded(own)
        spoken_BR = batch.response_mask_BR & (batch.response_BR != self.end_token)
        return PseudoText(text_BR, spoken_BR & (text_BR != self.end_token).cumprod(1).bool())

    def _states(self, batch: SpeechBatch, out: S2TOutput, text: PseudoText) -> ResponseStates:
        """H: one state for each token of X', the one that predicts it, or the one at it."""
        states, own = out.states, self._at_tokens
        if self.config.pseudo_text in ("generated", "free_run"):
            states = self.s2t.response_states(out.speech, batch, text.tokens_BR, text.spoken_BR, at_tokens=own)
        return states._replace(hidden=states.at_tokens) if states.at_tokens is not None else states

    @torch.no_grad()
    def segments(self, hidden_BRh: Tensor, spoken_BR: Tensor) -> Tensor:
        """Segment number of each response position `[B, R]`."""
        cut = self.config.segmentation
        if cut.mode == "none":
            return torch.zeros_like(spoken_BR, dtype=torch.long)
        if cut.mode == "fixed":
            return (spoken_BR.long().cumsum(1) - 1).clamp(min=0) // cut.fixed_tokens
        return trigger_segments(self.scores(hidden_BRh), spoken_BR, self._rule)

    @property
    def _rule(self) -> TriggerRule:
        cut = self.config.segmentation
        return TriggerRule(cut.min_tokens, cut.max_wait, cut.threshold, cut.look_ahead)

    @torch.no_grad()
    def scores(self, hidden_BRh: Tensor) -> Tensor:
        """Trigger score of each state `[..., h]`."""
        return trigger_scores(hidden_BRh, self.stop_row_h)

    def cutter(self) -> Cutter:
        """Cuts one response while it is written where `segments` cuts the whole of it."""
        cut = self.config.segmentation
        if cut.mode == "trigger":
            return StreamingTrigger(self._rule)
        return FixedCutter(cut.fixed_tokens if cut.mode == "fixed" else None)

    def most_words(self, tokens_N: Tensor) -> Tensor:
        """Unit-language words after which decoding a segment of `tokens_N` text tokens stops (U20)."""
        # In whole numbers, so that every device rounds up to the same word.
        return (tokens_N * self._hundredths + (100 * SPARE_WORDS + 99)) // 100

    def _embeddings(self, text_BR: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Prefix, header and text from the frozen table in one look-up: under ZeRO-3 each call gathers the table."""
        ids = torch.cat([self.prefix_P, self.header_Q, text_BR.flatten()])
        prefix, header, text = self.embed_text(ids).split([len(self.prefix_P), len(self.header_Q), text_BR.numel()])
        return prefix, header, text.view(*text_BR.shape, -1)

    def adapt(self, hidden: Tensor) -> Tensor:
        """What the Denoising Adapter makes of H, as the Echo decoder gets it."""
        adapted: Tensor = self.t2c_text.scaled(self.denoising(hidden))
        return adapted

    def embed_text(self, tokens: Tensor) -> Tensor:
        """Text embeddings as the T2C decoders get them, and as the Denoising Adapter is to give them."""
        return self.t2c_text.embed(tokens, self.s2t.embed)

    def text_part(
        self, prefix_Ph: Tensor, text_BRh: Tensor, header_Qh: Tensor, tokens_BR: Tensor, rows: Segments
    ) -> TextPart:
        """What a decoder reads of each segment: embeddings, or what the adapter made of H, of the tokens of X'."""
        characters_BR = self.t2c_text.characters(tokens_BR)
        characters_NT = None if characters_BR is None else rows.scatter(characters_BR)
        part = text_part(prefix_Ph, rows.scatter(text_BRh), rows.mask_NT, header_Qh, characters_NT)
        return part._replace(one_is_full=rows.full)

    def loss_weights(self, means: dict[str, Tensor], step: int) -> dict[str, Tensor | float]:
        """Eq. 4; lambda follows the released rule: the denoising term stays within `cap` of the echo loss."""
        if self._aligns(step):
            return {"denoising": 1.0}
        denoising, weights = self.config.denoising, {"s2t": self.config.s2t_weight, "echo": 1.0}
        if self.config.ctc_weight:
            weights["ctc"] = self.config.ctc_weight
        if denoising.weighting == "fixed":
            return {**weights, "denoising": denoising.weight}
        ceiling = denoising.cap * means["echo"]
        scaled = ceiling / means["denoising"].clamp(min=1e-8)
        capped = torch.where(means["denoising"] > ceiling, scaled, torch.ones_like(scaled))
        return {**weights, "denoising": capped}

    def known_counts(self, batch: SpeechBatch) -> dict[str, int]:
        """Only the losses on given text: how much is spoken is known after the teacher decoded."""
        if self._aligns(batch.step):
            return {}
        counts = {"s2t": int((batch.response_mask_BR & (batch.weight_B[:, None] > 0)).sum())}
        if self.config.ctc_weight:
            counts["ctc"] = int((batch.transcript_lengths_B * batch.weight_B).sum())
        return counts

    def needs_survey(self, batch: SpeechBatch) -> bool:
        """Always: what is spoken, what of it is usable, and lambda depend on the forwards of all micro-batches."""
        return True

    def parameter_groups(self) -> dict[str, list[str]]:
        """Learning-rate group of every trainable parameter."""
        groups = speech_parameter_groups(self)
        for part in ("denoising", "echo"):
            groups[part] = [n for n, p in self.named_parameters() if p.requires_grad and n.startswith(f"{part}.")]
        return groups

    def metrics(self) -> dict[str, Tensor]:
        """Teacher statistics of the last forward."""
        return self._last

    @torch.no_grad()
    def probe(self, batch: SpeechBatch | None = None) -> dict[str, LossTerm]:
        """What is measured with a forward of its own, where metrics are read: `pseudo_text/nats_per_token`.

        It is the negative log-likelihood of X' of the last forward under the LLM without LoRA, which reads the question
        as text (prompt, transcript, prompt, then X'): a mean over the spoken tokens, each given those before it, the
        end token left out. Samples without a transcript (that of a cut question is left out), without weight, or whose
        X' is empty do not count. A text that nobody would say has many nats a token. Nothing during the alignment.
        """
        if self._said is None:
            return {}
        heard, text = self._said
        asked_B = (heard.weight_B > 0) & (heard.transcript_lengths_B > 0)
        question_mask_BC = lengths_to_mask(heard.transcript_lengths_B, heard.transcript_BC.shape[1])
        states = self.s2t.text_states(heard, question_mask_BC, text.tokens_BR, text.spoken_BR)
        response = states.response
        counted = response.real & response.broadcast(asked_B)
        loss = self.s2t.text_loss(states.hidden, response.from_padded(text.tokens_BR), counted)
        return {"pseudo_text/nats_per_token": LossTerm(loss.total, counted.sum())}


def _differing(text: PseudoText, batch: SpeechBatch) -> Tensor:
    """Share of the spoken tokens of X' that are not those of the reference in their place."""
    size = min(text.tokens_BR.shape[1], batch.response_BR.shape[1])
    same_BR = (text.tokens_BR[:, :size] == batch.response_BR[:, :size]) & batch.response_mask_BR[:, :size]
    spoken_BR = text.spoken_BR & (batch.weight_B[:, None] > 0)
    return 1 - (same_BR & spoken_BR[:, :size]).sum() / spoken_BR.sum().clamp(min=1)
