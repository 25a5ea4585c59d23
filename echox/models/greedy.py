"""Decodes unit words greedily in steps of fixed shapes, and reads which rows have ended once in sixteen of them.

The cache has a capacity of columns that doubles when it is full, and the rows that still decode move together when half
of them have ended. Between two such moments every step has the same operators and shapes, and none waits for the host.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from echox.models.chunked_heads import most_probable_by
from echox.models.ragged import JoinedRows
from echox.models.static_llama import StaticLlama
from echox.models.step_graph import StepGraph

if TYPE_CHECKING:
    from echox.models.t2c import T2CDecoder

BLOCK = 16
"""Steps between two looks at which rows have ended, each a host sync."""
_LEAST_COLUMNS = 64
_LONGEST_PERIOD, _TIMES = 4, 8


class DecodedUnits(NamedTuple):
    """Greedy words: ids `[N, M]`, True on words before the end (the end itself excluded), rows that did end.

    `drafted_N`: how many of a row's first words were drafted and only verified, where there were drafts.
    """

    words_NM: Tensor
    mask_NM: Tensor
    ended_N: Tensor
    drafted_N: Tensor | None = None


class Draft(NamedTuple):
    """Words that are likely to come: ids `[N, D]`, and True on a row's own, which come first."""

    words_ND: Tensor
    mask_ND: Tensor


class DecodeStep:
    """One decode step on static tensors: the most probable word of each row, then the state that predicts the next.

    Args:
        decoder: whose words.
        text: text part, left-padded.
        places_NL: rotary positions of the text.
        place_N1: that of the first word, or of what is before it where words have lengths.
        columns: of the cache.
        body: of the decoder, where it was made before.
        draft: words that are verified together with the text, in one pass; those up to the first that is not the most
            probable count as said.

    Attributes:
        words_NK: the words said, each in its column of the cache; those of text and draft mean nothing.
        verified_N: words of the draft that count as said.
    """

    def __init__(
        self,
        decoder: T2CDecoder,
        text: JoinedRows,
        places_NL: Tensor,
        place_N1: Tensor,
        columns: int,
        body: StaticLlama | None = None,
        draft: Draft | None = None,
    ) -> None:
        self._decoder, self._body = decoder, body or StaticLlama(decoder.body)
        self._text_dtype = text.values_BLh.dtype
        # The padding word, the last class, is never said.
        self._head_Uh = decoder.head.weight[decoder.text_classes : decoder.text_classes + decoder.pad]
        self._cache = self._body.empty_cache(len(place_N1), columns)
        inputs_NLh, places_NL, real_NL = decoder.projection(text.values_BLh), places_NL.float(), text.mask_BL
        place_N1 = place_N1.float()
        if draft is not None:
            # Where each drafted word is, and where the word after it will be counted from.
            inputs_NLh = torch.cat([inputs_NLh, self._inputs(draft.words_ND)], dim=1)
            after_ND = self._after(place_N1, draft)
            places_NL = torch.cat([places_NL, after_ND if self._has_lengths else after_ND - 1], dim=1)
            real_NL = torch.cat([real_NL, draft.mask_ND], dim=1)
        length, told = real_NL.shape[1], text.mask_BL.shape[1]
        columns_L = torch.arange(length, device=place_N1.device)
        seen_N1LL = decoder.sees(places_NL, real_NL)
        mask_N1LL = inputs_NLh.new_zeros(seen_N1LL.shape).masked_fill(~seen_N1LL, self._never(inputs_NLh))
        hidden_NLh = self._body(inputs_NLh, places_NL, mask_N1LL, columns_L, self._cache)[:, told - 1 :]
        self.verified_N = columns_L.new_zeros(len(place_N1))
        if draft is not None:
            self.verified_N = self._agreeing(hidden_NLh, draft)
            real_NL = real_NL & (columns_L < told + self.verified_N[:, None])
            place_N1 = torch.cat([place_N1, after_ND], dim=1).gather(1, self.verified_N[:, None])
        self._hidden_Nh = hidden_NLh[torch.arange(len(place_N1), device=columns_L.device), self.verified_N]
        self._place_N1 = place_N1.clone()
        self._column_1 = columns_L.new_full((1,), length)
        self.words_NK = columns_L.new_zeros(len(place_N1), columns)
        later = (0, columns - length)
        # Without a window, what is seen is kept; with one, where each column is: what is not real is nowhere near.
        mask_NL = inputs_NLh.new_zeros(real_NL.shape).masked_fill(~real_NL, self._never(inputs_NLh))
        self._mask_N11K = F.pad(mask_NL, later, value=self._never(inputs_NLh))[:, None, None]
        self._places_NK = F.pad(places_NL.masked_fill(~real_NL, torch.inf), later, value=torch.inf)

    @property
    def _has_lengths(self) -> bool:
        return self._decoder.word_units_U is not None

    def _inputs(self, words_ND: Tensor) -> Tensor:
        inputs_NDh: Tensor = self._decoder.projection(self._decoder.unit_embedding(words_ND).to(self._text_dtype))
        return inputs_NDh

    def _after(self, place_N1: Tensor, draft: Draft) -> Tensor:
        """`place_N1` as it is after each of the drafted words, `[N, D]`."""
        units_U = self._decoder.word_units_U
        steps_ND = torch.ones_like(draft.words_ND, dtype=place_N1.dtype) if units_U is None else units_U[draft.words_ND]
        return place_N1 + steps_ND.cumsum(1)

    def _agreeing(self, hidden_NEh: Tensor, draft: Draft) -> Tensor:
        """Drafted words of each row before the first that the decoder would not say."""
        hidden_Dh = hidden_NEh[:, : draft.words_ND.shape[1]].flatten(0, 1)
        said_ND = most_probable_by(self._logits, hidden_Dh, len(self._head_Uh)).view_as(draft.words_ND)
        return ((said_ND == draft.words_ND) & draft.mask_ND).cumprod(1).sum(1)

    def _logits(self, hidden_Nh: Tensor) -> Tensor:
        return F.linear(hidden_Nh, self._head_Uh)

    def __call__(self) -> None:
        """Say one word a row."""
        word_N = self._logits(self._hidden_Nh).argmax(-1)
        self.words_NK.index_copy_(1, self._column_1, word_N[:, None])
        inputs_N1h = self._inputs(word_N[:, None])
        units_U = self._decoder.word_units_U
        if units_U is not None:
            self._place_N1.add_(units_U[word_N][:, None])
        mask_N11K = self._mask()
        hidden_N1h = self._body(inputs_N1h, self._place_N1, mask_N11K, self._column_1, self._cache)
        self._hidden_Nh.copy_(hidden_N1h[:, 0])
        if units_U is None:
            self._place_N1.add_(1)
        self._column_1.add_(1)

    def _mask(self) -> Tensor:
        """Which columns the word sees, itself included: 0 or a large negative number, `[N, 1, 1, K]`."""
        window = self._decoder.window_units
        if window is None:
            return self._mask_N11K.index_fill_(3, self._column_1, 0.0)
        self._places_NK.index_copy_(1, self._column_1, self._place_N1)
        far_NK = (self._places_NK - self._place_N1).abs() > window
        return far_NK.to(self._hidden_Nh.dtype).mul(self._never(self._hidden_Nh))[:, None, None]

    def resize(self, rows_n: Tensor | None, columns: int, left: int = 0) -> None:
        """Move to new tensors with some of the rows, or all of them in their order, and `columns` columns.

        Args:
            rows_n: which rows.
            columns: none that is in use may get lost.
            left: columns before the first one; negative: first ones, in use by none of the rows, that are dropped.
        """
        self._cache = self._cache.resized(rows_n, columns, left)
        self.words_NK = _resized(self.words_NK, rows_n, columns, 0, left)
        self._mask_N11K = _resized(self._mask_N11K, rows_n, columns, self._never(self._hidden_Nh), left)
        self._places_NK = _resized(self._places_NK, rows_n, columns, torch.inf, left)
        self._column_1 = self._column_1 + left
        if rows_n is not None:
            self._hidden_Nh, self._place_N1 = self._hidden_Nh[rows_n], self._place_N1[rows_n]

    def take_in(self, other: DecodeStep) -> None:
        """Go on with the rows of another step as well, which has as many columns and stands at the same one."""
        self._cache = self._cache.with_rows(other._cache)
        self.words_NK = torch.cat([self.words_NK, other.words_NK])
        self._mask_N11K = torch.cat([self._mask_N11K, other._mask_N11K])
        self._places_NK = torch.cat([self._places_NK, other._places_NK])
        self._hidden_Nh = torch.cat([self._hidden_Nh, other._hidden_Nh])
        self._place_N1 = torch.cat([self._place_N1, other._place_N1])

    @staticmethod
    def _never(values: Tensor) -> float:
        # Not minus infinity: a padded position that sees nothing at all would turn into NaN.
        return torch.finfo(values.dtype).min


def decode(
    step: DecodeStep,
    start: int,
    limit_N: Tensor,
    *,
    end: int,
    pad: int,
    stop_loops: bool = False,
    first_look: int = BLOCK,
) -> DecodedUnits:
    """Run a step until every row has ended or said the most words it may.

    Host syncs: two, and one every `BLOCK` steps.

    Args:
        step: after the text.
        start: columns of the text.
        limit_N: most words of each row; as the word after them, the end may still come.
        end, pad: words that end a row and pad it.
        stop_loops: also stop rows that `repeats` finds; they have no end, and `repeats` finds them in what is returned.
        first_look: steps before the first look at which rows have ended.
    """
    longest = int(limit_N.max()) + 1  # host sync
    rows, said = len(limit_N), 0
    origin_n, left_n = torch.arange(rows, device=limit_N.device), limit_N
    live_n = torch.ones_like(limit_N, dtype=torch.bool)
    columns = step.words_NK.shape[1]
    run = StepGraph(step, limit_N.device)
    blocks: list[Tensor] = []
    while True:
        steps = min(BLOCK if said else first_look, longest - said)
        for _ in range(steps):
            run()
        now = start + said + steps
        words_nB = step.words_NK[:, now - steps : now]
        block_NB = words_nB.new_full((rows, steps), pad)
        blocks.append(block_NB.index_copy_(0, origin_n, words_nB.masked_fill(~live_n[:, None], pad)))
        said += steps
        live_n = live_n & (words_nB != end).all(1) & (left_n >= said)
        if stop_loops:
            # A loop that was not there a block ago reaches into the last one.
            recent_nB = step.words_NK[:, max(start, now - steps - _LONGEST_PERIOD * _TIMES) : now]
            live_n = live_n & ~repeats(recent_nB, torch.ones_like(recent_nB, dtype=torch.bool))
        order_n = live_n.to(torch.uint8).argsort(descending=True, stable=True)
        live = int(live_n.sum())  # host sync, once a block
        if live == 0:
            break
        size = 1 << (live - 1).bit_length()
        more = capacity(now + BLOCK)
        keep_n = order_n[:size] if size < len(origin_n) else None
        if keep_n is not None:
            origin_n, left_n, live_n = origin_n[keep_n], left_n[keep_n], live_n[keep_n]
        if keep_n is not None or more > columns:
            columns = max(columns, more)
            step.resize(keep_n, columns)
            run = StepGraph(step, limit_N.device)
    words_NM = torch.cat(blocks, dim=1)
    places_M = torch.arange(said, device=limit_N.device)
    before_NM = (words_NM != end).cumprod(1).bool() & (words_NM != pad)
    mask_NM = before_NM & (places_M < limit_N[:, None])
    ended_N = ((words_NM == end) & (places_M <= limit_N[:, None])).any(1)
    most = max(int(mask_NM.sum(1).max()), 1)  # host sync
    return DecodedUnits(words_NM.masked_fill(~mask_NM, pad)[:, :most], mask_NM[:, :most], ended_N)


def after_draft(draft: Draft, verified_N: Tensor, found: DecodedUnits, pad: int) -> DecodedUnits:
    """Rows of the drafted words that were verified and of those decoded after them. One host sync."""
    places_D = torch.arange(draft.words_ND.shape[1], device=verified_N.device)
    mask_NX = torch.cat([places_D < verified_N[:, None], found.mask_NM], dim=1)
    words_NX = torch.cat([draft.words_ND, found.words_NM], dim=1).masked_fill(~mask_NX, pad)
    order_NX = mask_NX.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
    most = max(int(mask_NX.sum(1).max()), 1)  # host sync
    words_NM, mask_NM = words_NX.gather(1, order_NX)[:, :most], mask_NX.gather(1, order_NX)[:, :most]
    return DecodedUnits(words_NM, mask_NM, found.ended_N, verified_N)


def capacity(columns: int) -> int:
    """Columns of a cache that has room for `columns`: one of a few sizes, each twice the one before."""
    size = _LEAST_COLUMNS
    while size < columns:
        size *= 2
    return size


def repeats(words_NM: Tensor, mask_NM: Tensor, *, longest_period: int = _LONGEST_PERIOD, times: int = _TIMES) -> Tensor:
    """True for rows in which some pattern of up to `longest_period` words repeats `times` times in a row (U20)."""
    looping = torch.zeros(len(words_NM), dtype=torch.bool, device=words_NM.device)
    for period in range(1, longest_period + 1):
        window = period * (times - 1)
        if words_NM.shape[1] < period + window:
            break
        same = (words_NM[:, period:] == words_NM[:, :-period]) & mask_NM[:, period:]
        run = same.float().unfold(1, window, 1).sum(-1)
        looping = looping | (run == window).any(1)
    return looping


def _resized(part_NxK: Tensor, rows_n: Tensor | None, columns: int, fill: float, left: int) -> Tensor:
    part_NxK = part_NxK if rows_n is None else part_NxK.index_select(0, rows_n)
    return F.pad(part_NxK, (left, columns - part_NxK.shape[-1] - left), value=fill)
