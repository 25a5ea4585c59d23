"""Computes the losses of stage I, speech to text: response CE, weighted transcript CTC; CTC alone at first (U26)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from torch import Tensor, nn

from echox.models.flops import Costs, flops_by_part, llm_costs, speech_costs
from echox.models.ragged import Rows, padding_share
from echox.models.s2t import S2TModel, S2TOutput
from echox.models.sizes import llm_size, speech_size
from echox.models.speech import CtcScores, SpeechOutput
from echox.models.work import Work, counts_of
from echox.stages.losses import LossTerm, ctc_loss
from echox.stream.batch import SpeechBatch

if TYPE_CHECKING:
    from echox.config.model_schema import CtcConfig


class S2TStage(nn.Module):
    """Trains alignment adapter, CTC head, shrink adapter and LoRA.

    Args:
        config: weight of CTC beside the text loss, and the first steps, which compute CTC alone and never run the LLM.
        s2t: the model.
    """

    def __init__(self, config: CtcConfig, s2t: S2TModel) -> None:
        super().__init__()
        self.config = config
        self.s2t = s2t
        self.work = Work()
        self._last: dict[str, Tensor] = {}

    def train(self, mode: bool = True) -> S2TStage:
        """Switch the mode; the frozen encoder stays in eval."""
        super().train(mode)
        self.s2t.front_end.encoder.eval()
        return self

    def forward(self, batch: SpeechBatch) -> dict[str, LossTerm]:
        """Named losses of one micro-batch: `ctc`, and `s2t` once alignment is over."""
        self.work = Work()
        if self._aligns(batch.step):
            _, scores, frames = self.s2t.front_end.align(*batch.audio, tokens_BC=batch.transcript_BC)
            note_frames(self.work, batch, frames, live=True)
            self._last = {"perf/padding_share": padding_share(frames)}
            return {"ctc": transcript_loss(scores, frames, batch)}
        out = self.s2t(batch, ctc=True)
        note_speech(self.work, batch, out.speech, live=True)
        note_response(self.work, out)
        self._last = {"perf/padding_share": padding_share(out.speech.frames, out.states.rows)}
        return {
            "s2t": response_loss(self.s2t, out, batch)[0],
            "ctc": transcript_loss(out.speech.ctc, out.speech.frames, batch),
        }

    def _aligns(self, step: int) -> bool:
        return 0 <= step < self.config.align_steps

    def loss_weights(self, means: dict[str, Tensor], step: int) -> dict[str, Tensor | float]:
        """CTC counts in full while it is the only loss."""
        return {"s2t": 1.0, "ctc": 1.0 if self._aligns(step) else self.config.weight}

    def known_counts(self, batch: SpeechBatch) -> dict[str, int]:
        """Token counts that the batch alone tells."""
        counts = {"ctc": int((batch.transcript_lengths_B * batch.weight_B).sum())}
        if not self._aligns(batch.step):
            counts["s2t"] = int((batch.response_mask_BR & (batch.weight_B[:, None] > 0)).sum())
        return counts

    def parameter_groups(self) -> dict[str, list[str]]:
        """Learning-rate group of every trainable parameter."""
        return speech_parameter_groups(self)

    def metrics(self) -> dict[str, Tensor]:
        """Padding of the last forward."""
        return self._last

    def flops(self, works: Sequence[Work]) -> dict[str, float]:
        """FLOP by part of the forwards that noted `works` and of their backward. A host sync."""
        return flops_by_part(self._costs, counts_of(works))

    @cached_property
    def _costs(self) -> Costs:
        speech = speech_size(self.s2t, encodes=True)
        return {
            **speech_costs(speech, adapters_train=True, ctc_trains=True),
            **llm_costs(llm_size(self.s2t.causal_lm), inputs_live=True),
        }


def note_frames(work: Work, batch: SpeechBatch, frames: Rows, *, live: bool) -> None:
    """Note the encoder's and the aligned frames of a batch; `live`: a gradient comes back to the aligned ones."""
    if batch.features_BTd is None:
        work.add("frames", lengths_N=batch.frames_B, kind="mel")
    work.add("aligned", *(["aligned_live"] if live else []), lengths_N=frames.lengths_N)


def note_speech(work: Work, batch: SpeechBatch, speech: SpeechOutput, *, live: bool) -> None:
    """Note all that the speech front end computed on."""
    note_frames(work, batch, speech.frames, live=live)
    frames_N, kept_N = speech.frames.lengths_N, speech.rows.lengths_N
    work.add("aligned_keys", *(["aligned_keys_live"] if live else []), lengths_N=frames_N)
    work.add("kept", "kept_keys", *(["kept_live", "kept_keys_live"] if live else []), lengths_N=kept_N, keys_N=frames_N)


def note_response(work: Work, out: S2TOutput, *, live: bool = True) -> None:
    """Note the rows of the LLM and the positions of its head; `live`: a gradient comes back."""
    work.add("llm", *(["llm_live"] if live else []), lengths_N=out.states.rows.lengths_N, kind="causal")
    work.add("head", *(["head_live"] if live else []), lengths_N=out.states.response.lengths_N)


def response_loss(
    s2t: S2TModel, out: S2TOutput, batch: SpeechBatch, *, best: bool = False
) -> tuple[LossTerm, Tensor | None]:
    """L_S2T of a teacher-forced pass over the batch; `best`: also the most probable token of each position."""
    response = out.states.response
    counted = response.real & response.broadcast(batch.weight_B > 0)
    loss = s2t.text_loss(out.states.hidden, response.from_padded(batch.response_BR), counted, best=best)
    return LossTerm(loss.total, counted.sum()), loss.best


def transcript_loss(scores: CtcScores, frames: Rows, batch: SpeechBatch) -> LossTerm:
    """CTC of the questions against their transcripts, from scores in the layout `frames`; no earlier clip counts."""
    rows = len(batch.weight_B)
    assert scores.normaliser is not None and scores.chosen is not None and scores.classes_BC is not None
    frames_N, lengths_B = frames.lengths_on_host_N, batch.transcript_lengths_on_host_B
    return ctc_loss(
        frames.to_padded(scores.normaliser)[:rows],
        frames.to_padded(scores.chosen)[:rows],
        scores.classes_BC,
        frames.lengths_N[:rows],
        batch.transcript_lengths_B,
        batch.weight_B,
        (frames_N[:rows], lengths_B) if scores.complete and frames_N is not None and lengths_B is not None else None,
    )


def speech_parameter_groups(stage: nn.Module) -> dict[str, list[str]]:
    """`adapters` and `lora` groups of the S2T model's trainable parameters."""
    groups: dict[str, list[str]] = {"adapters": [], "lora": []}
    for name, parameter in stage.named_parameters():
        if parameter.requires_grad and name.startswith("s2t."):
            groups["lora" if name.startswith("s2t.llm.") else "adapters"].append(name)
    return {group: names for group, names in groups.items() if names}
