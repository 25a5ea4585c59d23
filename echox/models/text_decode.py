"""Writes the text of a batch of spoken prompts token by token, on a KV cache: one object an answer in progress."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from echox.models.greedy import BLOCK, capacity
from echox.models.ragged import JoinedRows, position_ids
from echox.models.static_llama import StaticCache, StaticLlama

if TYPE_CHECKING:
    from echox.models.s2t import Choose, S2TModel


class Written(NamedTuple):
    """One token of each row `[B]`, and the state that predicts it `[B, h]`."""

    token_B: Tensor
    state_Bh: Tensor


class CachedRows(Protocol):
    """An LLM below its head on rows whose keys and values it keeps."""

    def __call__(self, inputs_BQh: Tensor, mask_BL: Tensor, places_BQ: Tensor) -> Tensor:
        """Last hidden states `[B, Q, h]` of the Q positions that follow those before.

        Args:
            inputs_BQh: their embeddings.
            mask_BL: real positions of all, those of the embeddings the last ones.
            places_BQ: their rotary positions.
        """
        ...


class TransformersRows:
    """By the forward of the model's own class.

    Args:
        causal_lm: the model.
        decoder: what is below its head.
    """

    def __init__(self, causal_lm: Any, decoder: Any) -> None:
        from transformers import DynamicCache

        self._decoder, self._cache = decoder, DynamicCache(config=causal_lm.config)

    def __call__(self, inputs_BQh: Tensor, mask_BL: Tensor, places_BQ: Tensor) -> Tensor:
        """See `CachedRows`."""
        hidden_BQh: Tensor = self._decoder(
            inputs_embeds=inputs_BQh,
            attention_mask=mask_BL.long(),
            position_ids=places_BQ,
            past_key_values=self._cache,
            use_cache=True,
        ).last_hidden_state
        return hidden_BQh


class StaticRows:
    """By a static Llama body, whose cache has room for some more positions than there are.

    Args:
        body: of the model.
    """

    def __init__(self, body: StaticLlama) -> None:
        self._body = body
        self._cache: StaticCache | None = None
        self._columns = 0

    def __call__(self, inputs_BQh: Tensor, mask_BL: Tensor, places_BQ: Tensor) -> Tensor:
        """See `CachedRows`."""
        rows, length = mask_BL.shape
        if self._cache is None:
            self._columns = capacity(length + BLOCK)
            self._cache = self._body.empty_cache(rows, self._columns)
        elif length > self._columns:
            self._columns = capacity(length)
            self._cache = self._cache.resized(None, self._columns)
        columns_L = torch.arange(length, device=mask_BL.device)
        columns_Q = columns_L[length - inputs_BQh.shape[1] :]
        age_QL = columns_Q[:, None] - columns_L
        # Padding sees itself: of nothing at all, softmax would be NaN.
        seen_B1QL = ((mask_BL[:, None] & (age_QL >= 0)) | (age_QL == 0))[:, None]
        bias_B1QL = inputs_BQh.new_zeros(seen_B1QL.shape).masked_fill_(~seen_B1QL, torch.finfo(inputs_BQh.dtype).min)
        return self._body(inputs_BQh, places_BQ.float(), bias_B1QL, columns_Q, self._cache)


class TextDecode:
    """Decodes rows that begin with left-padded prompts.

    The model must be in eval mode: under activation checkpointing a model in training mode has no cache.

    Args:
        model: whose LLM writes.
        prompt: left-padded.
        end_token: what a row says after its end.
        places_BL: rotary positions of the prompt, where they are not those of its columns.
    """

    def __init__(self, model: S2TModel, prompt: JoinedRows, end_token: int, places_BL: Tensor | None = None) -> None:
        self._model, self._end_token = model, end_token
        self._rows = model.cached_rows()
        self._inputs_BLh, self._mask_BL = prompt.values_BLh, prompt.mask_BL
        self._positions_BL = position_ids(prompt.mask_BL) if places_BL is None else places_BL
        self.ended_B = torch.zeros(len(prompt.mask_BL), dtype=torch.bool, device=prompt.mask_BL.device)
        self.places = 0

    @torch.no_grad()
    def state(self) -> Tensor:
        """The state `[B, h]` at the last token, which predicts the next one: one forward of the LLM."""
        return self._rows(self._inputs_BLh, self._mask_BL, self._positions_BL)[:, -1]

    @torch.no_grad()
    def write(self, choose: Choose) -> Written:
        """Write one more token a row.

        Args:
            choose: logits and the number of tokens before to tokens, see `Choose`.
        """
        state_Bh = self.state()
        token_B = choose(self._model.head(state_Bh), self.places).masked_fill(self.ended_B, self._end_token)
        self.ended_B = self.ended_B | (token_B == self._end_token)
        self._inputs_BLh = self._model.embed(token_B[:, None])
        self._mask_BL = F.pad(self._mask_BL, (0, 1), value=True)
        self._positions_BL = self._positions_BL[:, -1:] + 1
        self.places += 1
        return Written(token_B, state_Bh)
