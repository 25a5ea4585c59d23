"""Computes Stage III in plain PyTorch, a sample and a segment at a time: the oracle of the stage and of inference.

Takes from the modules their weights alone: speech vectors of one clip, Hugging Face stacks called on one unpadded row,
linear maps. No masks, no caches, no packing, no segment rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from echox.config.model_schema import SegmentationConfig
from echox.models.s2t import S2TModel
from echox.models.t2c import T2CDecoder
from echox.stages.echo import EchoStage
from echox.stream.batch import SpeechBatch
from tests import tiny


@dataclass
class Said:
    """One sample: X' up to its end, the states that predict its tokens, and where each segment begins and ends."""

    tokens: list[int]
    hidden_Rh: Tensor
    segments: list[tuple[int, int]]


def row_of_prompt(s2t: S2TModel, batch: SpeechBatch, row: int) -> Tensor:
    """Template, speech vectors and template of one sample, `[L, h]`."""
    alone = tiny.one_row(batch, row)
    speech_BVh, mask_BV = s2t.encode_speech(alone).padded()
    after = batch.after_BQ[row][batch.after_mask_BQ[row]]
    return torch.cat([s2t.embed(batch.before_BP[row]), speech_BVh[0][mask_BV[0]], s2t.embed(after)])


def states(s2t: S2TModel, prompt_Lh: Tensor, tokens: list[int]) -> Tensor:
    """States that predict each of the tokens, and the one after them: `[R + 1, h]`."""
    inputs = torch.cat([prompt_Lh, s2t.embed(torch.tensor(tokens, dtype=torch.long))])[None]
    mask = torch.ones(inputs.shape[:2], dtype=torch.long)
    hidden: Tensor = s2t.decoder(inputs_embeds=inputs, attention_mask=mask, use_cache=False).last_hidden_state[0]
    return hidden[len(prompt_Lh) - 1 :]


def own_answer(s2t: S2TModel, prompt_Lh: Tensor, end: int, most: int) -> list[int]:
    """Greedy tokens before the end, each from a whole forward."""
    tokens: list[int] = []
    with torch.no_grad():
        while len(tokens) < most:
            token = int((states(s2t, prompt_Lh, tokens)[-1] @ s2t.causal_lm.lm_head.weight.T).argmax())
            if token == end:
                break
            tokens.append(token)
    return tokens


def cut(scores: list[float], rule: SegmentationConfig) -> list[tuple[int, int]]:
    """Segments of one response, read from left to right."""
    if rule.mode == "none":
        ends = []
    elif rule.mode == "fixed":
        ends = list(range(rule.fixed_tokens, len(scores), rule.fixed_tokens))
    else:
        ends, start, ahead = [], 0, rule.look_ahead
        for place in range(len(scores) - ahead):
            peak = scores[place] >= max(scores[max(0, place - ahead) : place + ahead + 1])
            waited = place - start
            if peak and (waited >= rule.max_wait or (waited >= rule.min_tokens and scores[place] > rule.threshold)):
                start = place + 1
                ends.append(start)
    borders = [0, *ends, len(scores)]
    return [(first, last) for first, last in zip(borders, borders[1:], strict=False) if last > first]


def said(stage: EchoStage, tokens: list[int], hidden_Rh: Tensor) -> Said:
    """X' with its segments."""
    scores = [float(F.cosine_similarity(state, stage.stop_row_h, dim=0)) for state in hidden_Rh.detach()]
    return Said(tokens, hidden_Rh, cut(scores, stage.config.segmentation))


def unit_logits(decoder: T2CDecoder, text_Lh: Tensor, words: list[int]) -> Tensor:
    """Logits of each of the words and of what follows them, `[M + 1, classes]`."""
    inputs = torch.cat([text_Lh, decoder.unit_embedding(torch.tensor(words, dtype=torch.long))])[None]
    mask = torch.ones(inputs.shape[:2], dtype=torch.long)
    hidden = decoder.body(
        inputs_embeds=decoder.projection(inputs), attention_mask=mask, use_cache=False
    ).last_hidden_state[0]
    logits: Tensor = decoder.head(hidden[len(text_Lh) - 1 :])
    return logits


def template(stage: Any, table: Any, text_Th: Tensor) -> Tensor:
    """`[prefix ; text ; unit header]`."""
    return torch.cat([table(stage.prefix_P), text_Th, table(stage.header_Q)])


def spoken_words(decoder: T2CDecoder, text_Lh: Tensor, most: int) -> list[int]:
    """Greedy unit words before the end, each from a whole forward."""
    words: list[int] = []
    with torch.no_grad():
        while len(words) < most:
            logits = unit_logits(decoder, text_Lh, words)[-1]
            word = int(logits[: decoder.end + 1].argmax())
            if word == decoder.end:
                break
            words.append(word)
    return words


def looping(words: list[int]) -> bool:
    """Some pattern of one to four words stands there eight times in a row."""
    return any(
        words[start : start + 8 * period] == 8 * words[start : start + period]
        for period in range(1, 5)
        for start in range(len(words) - 8 * period + 1)
    )
