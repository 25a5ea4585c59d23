"""Splices the speech front end into the prompt of a LoRA-tuned causal LM: speech in, text out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from echox.models.causal_lm import decoder_of, logits_of
from echox.models.packed_attention import use_packed_attention
from echox.models.ragged import Layout, Rows, join, join_rows, position_ids
from echox.models.speech import SpeechFrontEnd, SpeechOutput


class S2TOutput(NamedTuple):
    """One teacher-forced pass.

    Attributes:
        states: final-norm states that predict the response tokens.
        logits: text logits of the response positions only, float32, in the layout of the response.
        speech: what the front end computed, with the CTC logits.
    """

    states: ResponseStates
    logits: Tensor
    speech: SpeechOutput


class ResponseStates(NamedTuple):
    """States that predict each token of a response (U5: the state one position before it).

    Attributes:
        hidden: the states.
        response: their layout.
        rows: layout of the whole rows they were computed in.
    """

    hidden: Tensor
    response: Rows
    rows: Rows


class Generated(NamedTuple):
    """Greedy text: token ids `[B, R]` padded with the end token, their mask without the end, and predicting states."""

    tokens_BR: Tensor
    mask_BR: Tensor
    hidden_BRh: Tensor


class S2TModel(nn.Module):
    """Splice speech vectors into the prompt and run the LLM.

    Args:
        front_end: Whisper encoder and adapters.
        llm: a Hugging Face causal LM, possibly wrapped by PEFT.
        ctc_embedding: add to each speech vector the text embedding that the CTC head expects there.
        layout: of the LLM's rows in a teacher-forced pass.
    """

    def __init__(
        self, front_end: SpeechFrontEnd, llm: nn.Module, *, ctc_embedding: bool = False, layout: Layout = "packed"
    ) -> None:
        super().__init__()
        self.layout: Layout = layout
        self.ctc_embedding = ctc_embedding
        self.front_end = front_end
        self.llm = llm
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

    def head(self, hidden_BRh: Tensor) -> Tensor:
        """Text logits in float32 as the LLM's own class scales and caps them, computed only for the states given."""
        return logits_of(self.causal_lm, hidden_BRh).float()

    def encode_speech(self, batch: Any) -> SpeechOutput:
        """Speech vectors of a `SpeechBatch`, at the LLM width."""
        speech: SpeechOutput = self.front_end(*batch.audio)
        if not self.ctc_embedding:
            return speech
        kept_BVC = speech.frames.gather(speech.ctc_logits, speech.kept, speech.rows).float().softmax(-1)
        table_Ch = self.embed(self.front_end.ctc_head.tokens[1:])  # the blank stands for no word
        expected_BVh = kept_BVC[..., 1:].to(table_Ch.dtype) @ table_Ch
        return speech._replace(speech=speech.speech + expected_BVh)

    def prompt(self, speech: SpeechOutput, before_BP: Tensor, after_BQ: Tensor, after_mask_BQ: Tensor) -> list[Any]:
        """Blocks and masks of the prompt: template, speech vectors, template."""
        before = self.embed(before_BP)
        speech_BVh, mask_BV = speech.padded()
        blocks = [before, speech_BVh.to(before.dtype), self.embed(after_BQ)]
        return [blocks, [torch.ones_like(before_BP, dtype=torch.bool), mask_BV, after_mask_BQ]]

    def forward(self, batch: Any) -> S2TOutput:
        """Teacher-forced pass over a `SpeechBatch`."""
        speech = self.encode_speech(batch)
        states = self.response_states(speech, batch, batch.response_BR, batch.response_mask_BR)
        return S2TOutput(states, self.head(states.hidden), speech)

    def response_states(self, speech: SpeechOutput, batch: Any, tokens_BR: Tensor, mask_BR: Tensor) -> ResponseStates:
        """States that predict each of the right-padded `tokens_BR` after the spoken prompt."""
        blocks, masks = self.prompt(speech, batch.before_BP, batch.after_BQ, batch.after_mask_BQ)
        row = join([*blocks, self.embed(tokens_BR)], [*masks, mask_BR], self.layout)
        hidden = self.decoder(inputs_embeds=row.values, use_cache=False, **row.rows.causal()).last_hidden_state
        return ResponseStates(row.predicting(hidden), row.targets, row.rows)

    @torch.no_grad()
    def generate(
        self,
        batch: Any,
        end_token: int,
        max_new: int,
        *,
        early_stop: bool = True,
        speech: SpeechOutput | None = None,
    ) -> Generated:
        """Greedy, KV-cached, batched decoding of the spoken prompt, without dropout, also while the model trains.

        Args:
            batch: a `SpeechBatch`; its response is not read.
            end_token: id that ends a row.
            max_new: most tokens a row may get.
            early_stop: stop when all rows ended; off where every rank must make the same number of calls.
            speech: of the batch, where it was encoded already.
        """
        if speech is None:
            speech = self.encode_speech(batch)
        with _evaluating(self.llm):  # under activation checkpointing a model in training mode has no cache
            return self._decode_greedily(speech, batch, end_token, max_new, early_stop=early_stop)

    def _decode_greedily(
        self, speech: SpeechOutput, batch: Any, end_token: int, max_new: int, *, early_stop: bool
    ) -> Generated:
        from transformers import DynamicCache

        row = join_rows(*self.prompt(speech, batch.before_BP, batch.after_BQ, batch.after_mask_BQ), pad_left=True)
        cache = DynamicCache(config=self.causal_lm.config)
        inputs, mask, positions = row.values_BLh, row.mask_BL, position_ids(row.mask_BL)
        finished = torch.zeros(len(mask), dtype=torch.bool, device=mask.device)
        tokens, states = [], []
        for _ in range(max_new):
            hidden = self.decoder(
                inputs_embeds=inputs,
                attention_mask=mask.long(),
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state[:, -1]
            token = self.head(hidden).argmax(-1).masked_fill(finished, end_token)
            tokens.append(token)
            states.append(hidden)
            finished = finished | (token == end_token)
            if early_stop and bool(finished.all()):  # host sync
                break
            inputs = self.embed(token[:, None])
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            positions = positions[:, -1:] + 1
        tokens_BR = torch.stack(tokens, dim=1)
        return Generated(tokens_BR, (tokens_BR != end_token).cumprod(1).bool(), torch.stack(states, dim=1))


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Switch a module to eval mode, and back to the mode that it was in."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)
