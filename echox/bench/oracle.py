"""Decodes unit words the slow way, as the oracle of the fast one: transformers' forward on a cache that grows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from echox.models.greedy import DecodedUnits
from echox.models.ragged import JoinedRows
from echox.models.t2c import T2CDecoder


@torch.no_grad()
def dynamic_greedy(
    decoder: T2CDecoder, text: JoinedRows, limit_N: Tensor, starts_NS: Tensor | None = None
) -> DecodedUnits:
    """What `decoder.greedy` gives, without a window: all rows go on until the last has ended; a host sync a word.

    Args:
        decoder: whose words.
        text: text part, left-padded.
        limit_N: most words of each row.
        starts_NS: of the text part, for a decoder that places its text by characters.
    """
    from transformers import DynamicCache

    assert decoder.window_units is None
    cache, mask = DynamicCache(config=decoder.body.config), text.mask_BL
    inputs, places = text.values_BLh, decoder._positions(mask, starts_NS)
    place_N1 = torch.zeros_like(places[:, :1]) if decoder._places_text else places[:, -1:] + 1
    limit_N = limit_N.clamp(max=decoder.max_positions - mask.shape[1]).clamp(min=0)
    ended = finished = torch.zeros(len(mask), dtype=torch.bool, device=mask.device)
    words: list[Tensor] = []
    for step in range(int(limit_N.max()) + 1):  # host sync
        hidden = decoder.body(
            inputs_embeds=decoder.projection(inputs),
            attention_mask=mask.long(),
            position_ids=places,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[:, -1]
        logits = decoder.head(hidden)[:, decoder.text_classes :].float()
        logits[:, decoder.pad] = -torch.inf
        word = logits.argmax(-1).masked_fill(finished, decoder.pad)
        ended = ended | (word == decoder.end)
        finished = finished | (word == decoder.end) | (limit_N <= step)
        words.append(word.masked_fill(finished, decoder.pad))
        if bool(finished.all()):  # host sync
            break
        inputs = decoder.unit_embedding(word[:, None]).to(text.values_BLh.dtype)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        if decoder.word_units_U is None:
            places = place_N1 + step
        else:
            place_N1 = places = place_N1 + decoder.word_units_U[word][:, None]
    words_NM = torch.stack(words, dim=1)
    mask_NM = words_NM != decoder.pad
    most = max(int(mask_NM.sum(1).max()), 1)  # host sync
    return DecodedUnits(words_NM[:, :most], mask_NM[:, :most], ended)


def row_of(text: JoinedRows, row: int, starts_NS: Tensor | None = None) -> tuple[JoinedRows, Tensor | None]:
    """One row alone, without its padding."""
    real_L = text.mask_BL[row]
    alone = JoinedRows(text.values_BLh[row][real_L][None], real_L[real_L][None], [])
    return alone, None if starts_NS is None else starts_NS[row : row + 1]


def as_hugging_face(decoder: T2CDecoder) -> Any:
    """The decoder's weights as a causal LM of transformers over unit words, for its own `generate`.

    Its input table is what the projection makes of the unit table; a decoder that places its text has no such form.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    assert not decoder._places_text
    units: Tensor = decoder.head.weight[decoder.text_classes :]
    body: Any = decoder.body
    config = LlamaConfig(**{**body.config.to_dict(), "vocab_size": len(units), "tie_word_embeddings": False})
    with torch.device(units.device):
        model: Any = LlamaForCausalLM(config)
    model = model.to(units.dtype).eval()
    model.model.load_state_dict(body.state_dict(), strict=False)
    with torch.no_grad():
        model.model.rotary_emb.inv_freq = body.rotary_emb.inv_freq
        model.model.embed_tokens.weight.copy_(decoder.projection(decoder.unit_embedding.weight))
        model.lm_head.weight.copy_(units)
    return model


@torch.no_grad()
def generate_alone(decoder: T2CDecoder, model: Any, text: JoinedRows, row: int, limit: int) -> tuple[list[int], bool]:
    """Words of one row by transformers' `generate`, and whether it ended: the end may come as the word after."""
    prompt = decoder.projection(row_of(text, row)[0].values_BLh)
    said: list[int] = model.generate(
        inputs_embeds=prompt,
        max_new_tokens=limit + 1,
        do_sample=False,
        eos_token_id=decoder.end,
        pad_token_id=decoder.end,
        suppress_tokens=[decoder.pad],
    )[0].tolist()
    ended = said[-1] == decoder.end
    return (said[:-1] if ended else said[:limit]), ended
