"""Computes the losses of stage III: one forward runs S2T model, frozen teacher and Echo path (paper section 2.3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from echox.config.model_schema import EchoConfig
from echox.models.echo import DenoisingAdapter, TriggerRule, segment_rows, trigger_scores, trigger_segments
from echox.models.ragged import padding_share
from echox.models.s2t import ResponseStates, S2TModel, S2TOutput
from echox.models.t2c import T2CDecoder, Teacher, repeats, text_part
from echox.stages.losses import LossTerm, denoising_loss
from echox.stages.s2t import response_loss, speech_parameter_groups
from echox.stream.batch import SpeechBatch


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
        """Named losses of one micro-batch: `s2t`, `echo`, `denoising`; the last alone while it is aligned."""
        if self._aligns(batch.step):
            return self._align(batch)
        out = self.s2t(batch)
        terms = {"s2t": response_loss(out, batch)}

        states, text_BR, spoken_BR = self.pseudo_text(batch, out)
        rows = segment_rows(self.segments(states.response.to_padded(states.hidden), spoken_BR), spoken_BR)
        weight_N = batch.weight_B[rows.owner_N] * rows.mask_NT.any(1)
        prefix, header, text_BRh = self._embeddings(text_BR)

        teacher_input = text_part(prefix, rows.scatter(text_BRh), rows.mask_NT, header).left_padded()
        pseudo = self.teacher(teacher_input.values_BLh, teacher_input.mask_BL, self.most_words(rows.mask_NT.sum(1)))
        usable_N = pseudo.ended_N & ~repeats(pseudo.words_NM, pseudo.mask_NM)

        adapted_BRh = states.response.to_padded(self.denoising(states.hidden))
        student_input = text_part(prefix, rows.scatter(adapted_BRh), rows.mask_NT, header)
        loss = self.echo.loss(student_input, pseudo.words_NM, pseudo.mask_NM, weight_N * usable_N)
        terms["echo"] = LossTerm(loss.total, loss.tokens)
        terms["denoising"] = denoising_loss(adapted_BRh, text_BRh, spoken_BR & (batch.weight_B[:, None] > 0))
        self._last = {
            "teacher/rejected_share": 1 - (usable_N * weight_N).sum() / weight_N.sum().clamp(min=1),
            "teacher/words_per_segment": pseudo.mask_NM.sum() / weight_N.sum().clamp(min=1),
            "teacher/segments_per_sample": weight_N.sum() / batch.weight_B.sum().clamp(min=1),
            "perf/padding_share": padding_share(out.speech.frames, states.rows, loss.rows),
        }
        return terms

    def _aligns(self, step: int) -> bool:
        return 0 <= step < self.config.denoising.align_steps

    def _align(self, batch: SpeechBatch) -> dict[str, LossTerm]:
        with torch.no_grad():
            states, text_BR, spoken_BR = self.pseudo_text(batch, self.s2t(batch))
            text_BRh = self.s2t.embed(text_BR)
        adapted_BRh = states.response.to_padded(self.denoising(states.hidden))
        self._last = {}
        counted = spoken_BR & (batch.weight_B[:, None] > 0)
        return {"denoising": denoising_loss(adapted_BRh, text_BRh, counted)}

    def pseudo_text(self, batch: SpeechBatch, out: S2TOutput) -> tuple[ResponseStates, Tensor, Tensor]:
        """H, X' and the mask of spoken positions: before the end token, one state for each token."""
        if self.config.pseudo_text == "free_run":
            own = self.s2t.generate(batch, self.end_token, self.config.free_run_tokens, early_stop=False)
            states = self.s2t.response_states(self.s2t.encode_speech(batch), batch, own.tokens_BR, own.mask_BR)
            return states, own.tokens_BR, own.mask_BR
        is_own = self.config.pseudo_text == "argmax_teacher_forced"
        text_BR = out.states.response.to_padded(out.logits.detach().argmax(-1)) if is_own else batch.response_BR
        spoken_BR = batch.response_mask_BR & (batch.response_BR != self.end_token)
        return out.states, text_BR, spoken_BR & (text_BR != self.end_token).cumprod(1).bool()

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

    def parameter_groups(self) -> dict[str, list[str]]:
        """Learning-rate group of every trainable parameter."""
        groups = speech_parameter_groups(self)
        for part in ("denoising", "echo"):
            groups[part] = [n for n, p in self.named_parameters() if p.requires_grad and n.startswith(f"{part}.")]
        return groups

    def metrics(self) -> dict[str, Tensor]:
        """Teacher statistics of the last forward."""
        return self._last
