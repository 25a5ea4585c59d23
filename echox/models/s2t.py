"""Splices the speech front end into the prompt of a LoRA-tuned causal LM: speech in, text out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from echox.models.causal_lm import decoder_of, logits_of
from echox.models.chunked_heads import TextLoss, frozen_cross_entropy, let_run_jobs, most_probable_by
from echox.models.lora import merge_lora, without_lora
from echox.models.norms import fuse_rms_norms
from echox.models.packed_attention import use_packed_attention
from echox.models.ragged import Layout, Rows, counted_positions, join, join_rows
from echox.models.rotary import keep_rotary_float32
from echox.models.speech import SpeechFrontEnd, SpeechOutput
from echox.models.static_llama import StaticLlama, is_plain_llama
from echox.models.text_decode import CachedRows, StaticRows, TextDecode, TransformersRows


class S2TOutput(NamedTuple):
    """One teacher-forced pass.

    Attributes:
        states: final-norm states that predict the response tokens.
        speech: what the front end computed.
    """

    states: ResponseStates
    speech: SpeechOutput


class ResponseStates(NamedTuple):
    """States that predict each token of a response (U5: the state one position before it).

    Attributes:
        hidden: the states.
        response: their layout.
        rows: layout of the whole rows they were computed in.
        at_tokens: the states at the tokens themselves, where they were asked for.
    """

    hidden: Tensor
    response: Rows
    rows: Rows
    at_tokens: Tensor | None = None


Choose = Callable[[Tensor, int], Tensor]
"""Logits `[B, V]`, and how many tokens stand before them: the next token `[B]` of each row."""


def most_probable(logits_BV: Tensor, place: int) -> Tensor:
    """The greedy choice of the next token."""
    return logits_BV.argmax(-1)


class Generated(NamedTuple):
    """Generated text: token ids `[B, R]` padded with the end token, mask without the end, and a state for each.

    The states are those that predict the tokens, or those at the tokens where they were asked for.
    """

    tokens_BR: Tensor
    mask_BR: Tensor
    hidden_BRh: Tensor


class S2TModel(nn.Module):
    """Splice speech vectors into the prompt and run the LLM.

    Args:
        front_end: Whisper encoder and adapters.
        llm: a Hugging Face causal LM, possibly wrapped by PEFT.
        ctc_embedding: add to each speech vector the text embedding that the CTC head expects there.
        unseen_token: id that is left out of prompts, while its place counts: nothing attends to it.
        layout: of the LLM's rows in a teacher-forced pass.
    """

    def __init__(
        self,
        front_end: SpeechFrontEnd,
        llm: nn.Module,
        *,
        ctc_embedding: bool = False,
        unseen_token: int | None = None,
        layout: Layout = "packed",
    ) -> None:
        super().__init__()
        self.layout: Layout = layout
        self.unseen_token = unseen_token
        self.ctc_embedding = ctc_embedding
        self.front_end = front_end
        self.llm = llm
        self._static: StaticLlama | None = None
        keep_rotary_float32(llm)
        fuse_rms_norms(llm)
        let_run_jobs(self.text_head)
        if layout == "packed":
            use_packed_attention(self.causal_lm)

    @property
    def causal_lm(self) -> Any:
        """The causal LM below PEFT: its LoRA layers are already in place, its head can be called by itself."""
        llm: Any = self.llm
        return llm.get_base_model() if hasattr(llm, "get_base_model") else llm

    @property
    def decoder(self) -> Any:
        """The causal LM below its head."""
        return decoder_of(self.causal_lm)

    def embed(self, tokens_BT: Tensor) -> Tensor:
        """Frozen text embeddings `[B, T, h]`."""
        embedded: Tensor = self.causal_lm.get_input_embeddings()(tokens_BT)
        return embedded

    @property
    def text_head(self) -> Any:
        """The LLM's head, which does not train."""
        return self.causal_lm.get_output_embeddings()

    def head(self, hidden_BRh: Tensor) -> Tensor:
        """Text logits in float32 as the LLM's own class scales and caps them; whole, so for a few states only."""
        return logits_of(self.causal_lm, hidden_BRh).float()

    def text_loss(self, hidden: Tensor, targets: Tensor, counted: Tensor, *, best: bool = False) -> TextLoss:
        """Summed cross-entropy of the targets that count, given the states that predict them, in one layout.

        `best`: also say which token each state makes the most probable, in that layout.
        """
        head, classes = self.text_head, self.causal_lm.config.vocab_size

        def job(hidden_Rh: Tensor) -> TextLoss:
            return frozen_cross_entropy(
                self._logits_within, hidden_Rh, targets.flatten(), counted.flatten(), classes, best=best
            )

        found: TextLoss = head(hidden.flatten(0, 1), job)
        return found if found.best is None else found._replace(best=found.best.view(targets.shape))

    def best_tokens(self, hidden_BRh: Tensor) -> Tensor:
        """The token that each state makes the most probable: `[B, R]`."""
        classes = self.causal_lm.config.vocab_size
        flat_Rh = hidden_BRh.detach().flatten(0, 1)
        found: Tensor = self.text_head(flat_Rh, lambda part: most_probable_by(self._logits_within, part, classes))
        return found.view(hidden_BRh.shape[:2])

    def _logits_within(self, hidden_Rh: Tensor) -> Tensor:
        return logits_of(self.causal_lm, hidden_Rh, within=self.text_head)

    def merge(self) -> None:
        """Merge LoRA into the LLM's own weights, in place, for a model that trains no more.

        A Llama then decodes by `StaticLlama`. Without the two products of every map with low-rank matrices, and the
        many small operators of transformers' forward, a token takes a CPU half the time.
        """
        merge_lora(self.llm)
        if is_plain_llama(self.decoder):
            self._static = StaticLlama(self.decoder, adopt=True)

    def cached_rows(self) -> CachedRows:
        """The LLM below its head on rows that are still to come."""
        if self._static is not None:
            return StaticRows(self._static)
        return TransformersRows(self.causal_lm, self.decoder)

    def hear(self, batch: Any) -> Any:
        """A `SpeechBatch` with what the speech encoder makes of it, in place of the log-mel it is made of."""
        if batch.features_BTd is not None:
            return batch
        with torch.no_grad():
            features_BTd, _ = self.front_end.encoder(batch.mel_BMT, batch.frames_B, batch.frames_on_host_B)
        return replace(batch, features_BTd=features_BTd)

    def encode_speech(self, batch: Any, *, ctc: bool = False) -> SpeechOutput:
        """Speech vectors of a `SpeechBatch`, at the LLM width; `ctc`: with what a CTC loss reads."""
        speech: SpeechOutput = self.front_end(*batch.audio, tokens_BC=batch.transcript_BC if ctc else None)
        if not self.ctc_embedding:
            return speech
        ctc_head = self.front_end.ctc_head
        table_Ch = self.embed(ctc_head.tokens[1:])  # the blank stands for no word
        expected_BVh = ctc_head.expected(speech.frames.gather(speech.aligned, speech.kept, speech.rows), table_Ch)
        return speech._replace(speech=speech.speech + expected_BVh)

    def prompt(self, speech: SpeechOutput, batch: Any) -> tuple[list[Tensor], list[Tensor]]:
        """Blocks and masks of the prompt: template with what was said before, speech vectors, template.

        Between two pieces of what was said before stand the speech vectors of an earlier turn that is heard. What is
        never attended to is masked.
        """
        blocks, masks = self._blocks(speech, batch)
        return blocks, self._seen(batch, masks)

    def _seen(self, batch: Any, masks: list[Tensor]) -> list[Tensor]:
        """Masks without the positions of the token that nothing attends to."""
        if self.unseen_token is None:
            return masks
        sizes = list(batch.before_sizes or batch.before_BP.shape[1:2])
        seen = [part != self.unseen_token for part in batch.before_BP.split(sizes, dim=1)]
        # Speech vectors of earlier turns stand between the pieces, those of the question before what comes after it.
        tokens = [*seen, batch.after_BQ != self.unseen_token]
        return [mask & tokens[place // 2] if place % 2 == 0 else mask for place, mask in enumerate(masks)]

    def _blocks(self, speech: SpeechOutput, batch: Any) -> tuple[list[Tensor], list[Tensor]]:
        """The prompt with everything that has a place in it."""
        before = self.embed(batch.before_BP)
        sizes = list(batch.before_sizes or before.shape[1:2])
        speech_AVh, mask_AV = speech.padded()
        speech_AVh, rows = speech_AVh.to(before.dtype), len(before)
        blocks, masks = list(before.split(sizes, dim=1)), list(_before_mask(batch).split(sizes, dim=1))
        for place in reversed(range(len(sizes) - 1)):
            number_B = batch.history_BK[:, place]
            clip_B = (rows + number_B).masked_fill(number_B < 0, 0)
            blocks.insert(place + 1, speech_AVh[clip_B])
            masks.insert(place + 1, mask_AV[clip_B] & (number_B >= 0)[:, None])
        blocks += [speech_AVh[:rows], self.embed(batch.after_BQ)]
        return blocks, [*masks, mask_AV[:rows], batch.after_mask_BQ]

    def forward(self, batch: Any, *, at_tokens: bool = False, ctc: bool = False) -> S2TOutput:
        """Teacher-forced pass over a `SpeechBatch`; `at_tokens`: also the states at the tokens; `ctc`: for its loss."""
        speech = self.encode_speech(batch, ctc=ctc)
        states = self.response_states(speech, batch, batch.response_BR, batch.response_mask_BR, at_tokens=at_tokens)
        return S2TOutput(states, speech)

    def response_states(
        self, speech: SpeechOutput, batch: Any, tokens_BR: Tensor, mask_BR: Tensor, *, at_tokens: bool = False
    ) -> ResponseStates:
        """States that predict each of the right-padded `tokens_BR` after the spoken prompt; or also those at them."""
        blocks, counted = self._blocks(speech, batch)
        masks = [*self._seen(batch, counted), mask_BR]
        row = join([*blocks, self.embed(tokens_BR)], masks, self.layout)
        where = row.rows.causal()
        if self.unseen_token is not None:
            places_BS = counted_positions([*counted, mask_BR], masks, row.rows.size)
            where["position_ids"] = row.rows.from_padded(places_BS)
        hidden = self.decoder(inputs_embeds=row.values, use_cache=False, **where).last_hidden_state
        own = row.at_targets(hidden) if at_tokens else None
        return ResponseStates(row.predicting(hidden), row.targets, row.rows, own)

    def text_states(self, batch: Any, question_mask_BC: Tensor, tokens_BR: Tensor, mask_BR: Tensor) -> ResponseStates:
        """States of the LLM without LoRA that predict each of `tokens_BR` after the written question.

        Args:
            batch: a `SpeechBatch`; of the question its transcript is read, and nothing is heard.
            question_mask_BC: real tokens of the transcript.
            tokens_BR, mask_BR: right-padded text.
        """
        blocks = [batch.before_BP, batch.transcript_BC, batch.after_BQ, tokens_BR]
        masks = [_before_mask(batch), question_mask_BC, batch.after_mask_BQ, mask_BR]
        row = join([self.embed(block) for block in blocks], masks, self.layout)
        with without_lora(self.llm):
            hidden = self.decoder(inputs_embeds=row.values, use_cache=False, **row.rows.causal()).last_hidden_state
        return ResponseStates(row.predicting(hidden), row.targets, row.rows)

    @torch.no_grad()
    def generate(
        self,
        batch: Any,
        end_token: int,
        max_new: int,
        *,
        early_stop: bool | Callable[[Tensor], bool] = True,
        speech: SpeechOutput | None = None,
        choose: Choose = most_probable,
        at_tokens: bool = False,
    ) -> Generated:
        """KV-cached, batched decoding of the spoken prompt, without dropout, also while the model trains.

        Args:
            batch: a `SpeechBatch`; its response is not read.
            end_token: id that ends a row.
            max_new: most tokens a row may get.
            early_stop: stop when all rows ended; off where every rank must make the same number of calls. A function
                is asked after every token whether to stop, given which rows have ended `[B]`.
            speech: of the batch, where it was encoded already.
            choose: picks the next token of every row; the most probable one where nothing else is said.
            at_tokens: return the states at the tokens, known a step later than those that predict them.
        """
        if speech is None:
            speech = self.encode_speech(batch)
        with _evaluating(self.llm):  # under activation checkpointing a model in training mode has no cache
            return self._decode(
                speech, batch, end_token, max_new, early_stop=early_stop, choose=choose, at_tokens=at_tokens
            )

    def _decode(
        self,
        speech: SpeechOutput,
        batch: Any,
        end_token: int,
        max_new: int,
        *,
        early_stop: bool | Callable[[Tensor], bool],
        choose: Choose,
        at_tokens: bool,
    ) -> Generated:
        decode = self.begin_text(speech, batch, end_token)
        tokens, states = [], []
        for _ in range(max_new):
            written = decode.write(choose)
            tokens.append(written.token_B)
            states.append(written.state_Bh)
            ended_B = decode.ended_B
            if early_stop(ended_B) if callable(early_stop) else early_stop and bool(ended_B.all()):  # host sync
                break
        else:
            if at_tokens:
                states.append(decode.state())
        if at_tokens:  # the state at a token predicts the next one; at an end token, any will do
            states = [*states[1:], states[-1]][: len(tokens)]
        tokens_BR = torch.stack(tokens, dim=1)
        return Generated(tokens_BR, (tokens_BR != end_token).cumprod(1).bool(), torch.stack(states, dim=1))

    def begin_text(self, speech: SpeechOutput, batch: Any, end_token: int) -> TextDecode:
        """Begin to answer a `SpeechBatch` whose speech was encoded; the LLM must be in eval mode."""
        blocks, counted = self._blocks(speech, batch)
        masks = self._seen(batch, counted)
        prompt = join_rows(blocks, masks, pad_left=True)
        places_BL = None
        if self.unseen_token is not None:
            places_BL = counted_positions(counted, masks, prompt.mask_BL.shape[1], pad_left=True)
        return TextDecode(self, prompt, end_token, places_BL)


def _before_mask(batch: Any) -> Tensor:
    real_BP: Tensor | None = batch.before_mask_BP
    return torch.ones_like(batch.before_BP, dtype=torch.bool) if real_BP is None else real_BP


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Switch a module to eval mode, and back to the mode that it was in."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)
