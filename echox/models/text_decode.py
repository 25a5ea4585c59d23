"""Writes the text of a batch of spoken prompts token by token, on a KV cache: one object an answer in progress."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from echox.models.ragged import JoinedRows, position_ids

if TYPE_CHECKING:
    from echox.models.s2t import Choose, S2TModel


class Written(NamedTuple):
    """One token of each row `[B]`, and the state that predicts it `[B, h]`."""

    token_B: Tensor
    state_Bh: Tensor


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
        from transformers import DynamicCache

        self._model, self._end_token = model, end_token
        self._cache = DynamicCache(config=model.causal_lm.config)
        self._inputs_BLh, self._mask_BL = prompt.values_BLh, prompt.mask_BL
        self._positions_BL = position_ids(prompt.mask_BL) if places_BL is None else places_BL
        self.ended_B = torch.zeros(len(prompt.mask_BL), dtype=torch.bool, device=prompt.mask_BL.device)
        self.places = 0

    @torch.no_grad()
    def state(self) -> Tensor:
        """The state `[B, h]` at the last token, which predicts the next one: one forward of the LLM."""
        out = self._model.decoder(
            inputs_embeds=self._inputs_BLh,
            attention_mask=self._mask_BL.long(),
            position_ids=self._positions_BL,
            past_key_values=self._cache,
            use_cache=True,
        )
        last_Bh: Tensor = out.last_hidden_state[:, -1]
        return last_Bh

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
        self._mask_BL = torch.cat([self._mask_BL, self._mask_BL.new_ones(len(token_B), 1)], dim=1)
        self._positions_BL = self._positions_BL[:, -1:] + 1
        self.places += 1
        return Written(token_B, state_Bh)
