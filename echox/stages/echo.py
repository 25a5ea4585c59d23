"""Computes the losses of stage III: one forward runs S2T model, frozen teacher and Echo path (paper section 2.3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from echox.config.model_schema import EchoConfig
from echox.models.echo import DenoisingAdapter, Segments, TriggerRule, segment_rows, trigger_scores, trigger_segments
from echox.models.ragged import padding_share
from echox.models.s2t import ResponseStates, S2TModel, S2TOutput
from echox.models.t2c import DecodedUnits, T2CDecoder, Teacher, repeats, text_part
from echox.stages.losses import LossTerm, denoising_loss
from echox.stages.s2t import response_loss, speech_parameter_groups
from echox.stream.batch import SpeechBatch


@dataclass(frozen=True)
class PseudoText:
    """X', the text that the speech is to say: token ids `[B, R]`, and True on those that are spoken."""

    tokens_BR: Tensor
    spoken_BR: Tensor


@dataclass(frozen=True)
class PseudoTargets:
    """What one micro-batch is to learn: X', how it is cut into segments, and Y', the teacher's units for them."""

    text: PseudoText
    rows: Segments
    units: DecodedUnits


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
    ) -> None:
        super().__init__()
        self.config = config
        self.s2t = s2t
        self.teacher = Teacher(teacher).requires_grad_(False)
        self.echo = echo
        self.denoising = denoising
        self.register_buffer("prefix_P", prefix_P, persistent=False)
        self.register_buffer("header_Q", header_Q, persistent=False)
        self.register_buffer("stop_row_h", stop_row_h.float(), persistent=False)
        self.end_token = end_token
        self._adapters_train = any(p.requires_grad for p in s2t.front_end.parameters())
        self._last: dict[str, Tensor] = {}

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

    def forward(self, batch: SpeechBatch) -> dict[str, LossTerm]:
        """Named losses of one micro-batch: `s2t`, `echo`, `denoising`; the last alone while it is aligned.

        Without dropout (in eval mode) what was found, X' and Y', stays on the batch, and a forward of the same batch in
        training takes it from there: so a step's token counts are known before its first backward.
        """
        if self._aligns(batch.step):
            return self._align(batch)
        out = self.s2t(batch)
        terms = {"s2t": response_loss(out, batch)}

        found: PseudoTargets | None = batch.targets
        text = self.pseudo_text(batch, out) if found is None else found.text
        states = self._states(batch, out, text)
        prefix, header, text_BRh = self._embeddings(text.tokens_BR)
        if found is None:
            hidden_BRh = states.response.to_padded(states.hidden)
            rows = segment_rows(self.segments(hidden_BRh, text.spoken_BR), text.spoken_BR)
            teacher_input = text_part(prefix, rows.scatter(text_BRh), rows.mask_NT, header).left_padded()
            units = self.teacher(teacher_input.values_BLh, teacher_input.mask_BL, self.most_words(rows.mask_NT.sum(1)))
            found = PseudoTargets(text, rows, units)
            self._keep(batch, found)
        rows, units = found.rows, found.units
        weight_N = batch.weight_B[rows.owner_N] * rows.mask_NT.any(1)
        usable_N = units.ended_N & units.mask_NM.any(1) & ~repeats(units.words_NM, units.mask_NM)

        adapted_BRh = states.response.to_padded(self.denoising(states.hidden))
        student_input = text_part(prefix, rows.scatter(adapted_BRh), rows.mask_NT, header)
        loss = self.echo.loss(student_input, units.words_NM, units.mask_NM, weight_N * usable_N)
        terms["echo"] = LossTerm(loss.total, loss.tokens)
        terms["denoising"] = self._denoising_loss(adapted_BRh, text_BRh, text, batch)
        self._last = {
            "teacher/rejected_share": 1 - (usable_N * weight_N).sum() / weight_N.sum().clamp(min=1),
            "teacher/words_per_segment": (units.mask_NM.sum(1) * weight_N).sum() / weight_N.sum().clamp(min=1),
            "teacher/segments_per_sample": weight_N.sum() / batch.weight_B.sum().clamp(min=1),
            "pseudo_text/differs_share": _differing(text, batch),
            "perf/padding_share": padding_share(out.speech.frames, states.rows, loss.rows),
        }
        return terms

    def _aligns(self, step: int) -> bool:
        return 0 <= step < self.config.denoising.align_steps

    def _align(self, batch: SpeechBatch) -> dict[str, LossTerm]:
        with torch.no_grad():
            out = self.s2t(batch)
            text: PseudoText = self.pseudo_text(batch, out) if batch.targets is None else batch.targets
            states = self._states(batch, out, text)
            text_BRh = self.s2t.embed(text.tokens_BR)
        self._keep(batch, text)
        adapted_BRh = states.response.to_padded(self.denoising(states.hidden))
        self._last = {}
        return {"denoising": self._denoising_loss(adapted_BRh, text_BRh, text, batch)}

    def _keep(self, batch: SpeechBatch, found: PseudoTargets | PseudoText) -> None:
        if not self.training:
            batch.targets = found

    @staticmethod
    def _denoising_loss(adapted_BRh: Tensor, text_BRh: Tensor, text: PseudoText, batch: SpeechBatch) -> LossTerm:
        return denoising_loss(adapted_BRh, text_BRh, text.spoken_BR & (batch.weight_B[:, None] > 0))

    @torch.no_grad()
    def pseudo_text(self, batch: SpeechBatch, out: S2TOutput) -> PseudoText:
        """X' and the mask of its spoken positions, those before the end token."""
        if self.config.pseudo_text == "free_run":
            own = self.s2t.generate(
                batch, self.end_token, self.config.free_run_tokens, early_stop=False, speech=out.speech
            )
            return PseudoText(own.tokens_BR, own.mask_BR)
        is_own = self.config.pseudo_text == "argmax_teacher_forced"
        text_BR = out.states.response.to_padded(out.logits.detach().argmax(-1)) if is_own else batch.response_BR
        spoken_BR = batch.response_mask_BR & (batch.response_BR != self.end_token)
        return PseudoText(text_BR, spoken_BR & (text_BR != self.end_token).cumprod(1).bool())

    def _states(self, batch: SpeechBatch, out: S2TOutput, text: PseudoText) -> ResponseStates:
        """H: one state for each token of X', the one that predicts it."""
        if self.config.pseudo_text == "free_run":
            return self.s2t.response_states(out.speech, batch, text.tokens_BR, text.spoken_BR)
        return out.states

    @torch.no_grad()
    def segments(self, hidden_BRh: Tensor, spoken_BR: Tensor) -> Tensor:
        """Segment number of each response position `[B, R]`."""
        cut = self.config.segmentation
        if cut.mode == "none":
            return torch.zeros_like(spoken_BR, dtype=torch.long)
        if cut.mode == "fixed":
            return (spoken_BR.long().cumsum(1) - 1).clamp(min=0) // cut.fixed_tokens
        rule = TriggerRule(cut.min_tokens, cut.max_wait, cut.threshold, cut.look_ahead)
        return trigger_segments(trigger_scores(hidden_BRh, self.stop_row_h), spoken_BR, rule)

    def most_words(self, tokens_N: Tensor) -> Tensor:
        """Unit-language words after which decoding a segment of `tokens_N` text tokens stops (U20)."""
        return tokens_N * self.config.units_per_token + 32

    def _embeddings(self, text_BR: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Prefix, header and text from the frozen table in one look-up: under ZeRO-3 each call gathers the table."""
        ids = torch.cat([self.prefix_P, self.header_Q, text_BR.flatten()])
        prefix, header, text = self.s2t.embed(ids).split([len(self.prefix_P), len(self.header_Q), text_BR.numel()])
        return prefix, header, text.view(*text_BR.shape, -1)

    def loss_weights(self, means: dict[str, Tensor], step: int) -> dict[str, Tensor | float]:
        """Eq. 4; lambda follows the released rule: the denoising term stays within `cap` of the echo loss."""
        if self._aligns(step):
            return {"denoising": 1.0}
        s2t_weight, denoising = self.config.s2t_weight, self.config.denoising
        if denoising.weighting == "fixed":
            return {"s2t": s2t_weight, "echo": 1.0, "denoising": denoising.weight}
        ceiling = denoising.cap * means["echo"]
        scaled = ceiling / means["denoising"].clamp(min=1e-8)
        capped = torch.where(means["denoising"] > ceiling, scaled, torch.ones_like(scaled))
        return {"s2t": s2t_weight, "echo": 1.0, "denoising": capped}

    def known_counts(self, batch: SpeechBatch) -> dict[str, int]:
        """Only the text loss: how much is spoken is known after the teacher decoded."""
        if self._aligns(batch.step):
            return {}
        return {"s2t": int((batch.response_mask_BR & (batch.weight_B[:, None] > 0)).sum())}

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


def _differing(text: PseudoText, batch: SpeechBatch) -> Tensor:
    """Share of the spoken tokens of X' that are not those of the reference in their place."""
    size = min(text.tokens_BR.shape[1], batch.response_BR.shape[1])
    same_BR = (text.tokens_BR[:, :size] == batch.response_BR[:, :size]) & batch.response_mask_BR[:, :size]
    spoken_BR = text.spoken_BR & (batch.weight_B[:, None] > 0)
    return 1 - (same_BR & spoken_BR[:, :size]).sum() / spoken_BR.sum().clamp(min=1)
