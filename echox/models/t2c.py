"""Decodes text to codec: a small Llama stack reads text embeddings and writes unit-language words.

The text table stays with the LLM and comes in as embeddings; only the unit table, the projection, the body and the head
live here. The same class serves as Stage II model, frozen teacher and Echo decoder, whose text part is the Denoising
Adapter's output (paper section 2, Eq. 1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from echox.models.chunked_heads import Head, class_scores
from echox.models.greedy import BLOCK, DecodedUnits, DecodeStep, Draft, after_draft, capacity, decode
from echox.models.norms import fuse_rms_norms
from echox.models.packed_attention import use_packed_attention
from echox.models.ragged import JoinedRows, Layout, Rows, join, join_rows, position_ids
from echox.models.rotary import keep_rotary_float32
from echox.models.static_llama import StaticLlama


class TextPart(NamedTuple):
    """What comes before the units: blocks `[N, S_i, h]` and masks of their real positions, still to be joined.

    Attributes:
        blocks, masks: in order.
        starts_NS: characters before each position of the joined row, for a decoder that places its text by them.
        one_is_full: some row has no padding in any block.
    """

    blocks: list[Tensor]
    masks: list[Tensor]
    starts_NS: Tensor | None = None
    one_is_full: bool = False

    def left_padded(self) -> JoinedRows:
        """Joined so that the first unit of every row stands in the same column, as decoding needs it."""
        return join_rows(self.blocks, self.masks, pad_left=True, one_is_full=self.one_is_full)


class UnitLoss(NamedTuple):
    """Sum of cross-entropies, over how many tokens, and the layout of the rows it was computed in."""

    total: Tensor
    tokens: Tensor
    rows: Rows


class T2CDecoder(nn.Module):
    """Decoder-only LM over `[text part ; unit words]`.

    Args:
        words: U, the size of the unit language; class U ends a sequence, class U + 1 pads it.
        text_width: h, the LLM's width, in which text and unit embeddings live.
        width, layers, heads, ffn, max_positions: of the Llama body.
        dropout: on the projected input while training.
        text_classes: 0 for a head over units alone (U15), or the text vocabulary for the release's full head.
        text_stride: None counts positions on from the text to its words. A number sets text token i at position
            `i * text_stride` and word m at position m: about that many words are spoken a token, so a word finds its
            text at a steady distance, which small data alone does not teach.
        units_per_character: the same on a finer scale, whatever the lengths of tokens and words: a text token's
            position is `units_per_character * characters before it`, a word's the number of units up to its end. Text
            parts must then have `starts_NS`.
        word_units: units of each word of the unit language, for `units_per_character`.
        history_dropout: share of the words before a word that are hidden from it while training, so that it is read
            from the text rather than guessed from what was said.
        window_units: attention reaches keys whose position differs by at most as many units, words and text alike: what
            is far away, and tells one training sentence from another, cannot be learned by heart. Needs
            `units_per_character`; rows are then padded, as their mask is not that of packed rows.
        body: entries of the Llama configuration in place of its defaults: rotary embedding, norm epsilon.
        layout: of teacher-forced rows.
    """

    word_units_U: Tensor | None

    def __init__(
        self,
        *,
        words: int,
        text_width: int,
        width: int,
        layers: int,
        heads: int,
        ffn: int,
        max_positions: int,
        dropout: float = 0.0,
        text_classes: int = 0,
        text_stride: float | None = None,
        units_per_character: float | None = None,
        word_units: Sequence[int] = (),
        history_dropout: float = 0.0,
        window_units: float | None = None,
        body: Mapping[str, Any] | None = None,
        layout: Layout = "packed",
    ) -> None:
        from transformers import LlamaConfig, LlamaModel

        super().__init__()
        self.words = words
        self.end = words
        self.pad = words + 1
        self.text_classes = text_classes
        self.text_stride = text_stride
        self.units_per_character = units_per_character
        self.history_dropout = history_dropout
        self.window_units = window_units
        self.layout: Layout = layout if window_units is None else "padded"
        self.max_positions = max_positions
        units_U = None
        if units_per_character is not None:
            units_U = torch.tensor([*word_units, 0, 0] if word_units else [1] * (words + 2), dtype=torch.float32)
        self.register_buffer("word_units_U", units_U, persistent=False)
        self.unit_embedding = nn.Embedding(words + 2, text_width)
        nn.init.normal_(self.unit_embedding.weight, std=0.02)
        self.projection = nn.Linear(text_width, width)
        self.dropout = nn.Dropout(dropout)
        shape: dict[str, Any] = {
            "vocab_size": 1,
            "bos_token_id": None,
            "eos_token_id": None,
            "hidden_size": width,
            "intermediate_size": ffn,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "max_position_embeddings": max_positions,
        }
        self.body = LlamaModel(LlamaConfig(**{**shape, **(body or {})}))
        self.body.embed_tokens = None  # type: ignore[assignment]  # inputs are always embeddings; an unused table would only weigh on checkpoints
        keep_rotary_float32(self.body)
        fuse_rms_norms(self.body)
        if self.layout == "packed":
            use_packed_attention(self.body)
        self.head = Head(width, text_classes + words + 2, bias=False)

    def scale_units(self, rms: float) -> None:
        """Give the unit table the root mean square of the text table, so that both inputs weigh the same at first."""
        with torch.no_grad():
            self.unit_embedding.weight.mul_(rms / 0.02)

    def forward(self, text: TextPart, words_NM: Tensor, mask_NM: Tensor) -> Tensor:
        """Teacher-forced logits.

        Args:
            text: text part.
            words_NM: target words; the end token is predicted after them and needs no column.
            mask_NM: True on words, which come first in their row.

        Returns:
            `[N, M + 1, classes]` float32: column m predicts word m, the one after a row's last word the end.
        """
        hidden, targets, _ = self._states(text, words_NM, mask_NM)
        return targets.to_padded(self.head(hidden).float())

    def loss(self, text: TextPart, words_NM: Tensor, mask_NM: Tensor, weight_N: Tensor) -> UnitLoss:
        """Sum of cross-entropies over words and end tokens of rows with weight 1, and the number of those tokens."""
        hidden, targets, rows = self._states(text, words_NM, mask_NM)
        words = targets.from_padded(F.pad(words_NM, (0, 1), value=self.end))
        words = words.masked_fill(targets.positions >= targets.broadcast(mask_NM.sum(1)), self.end)
        counted = targets.real & targets.broadcast(weight_N > 0)
        scores = class_scores(self.head, hidden.flatten(0, 1), (words + self.text_classes).view(-1, 1))
        losses = scores.normaliser - scores.chosen[:, 0]
        return UnitLoss((losses * counted.flatten()).sum(), counted.sum(), rows)

    def _states(self, text: TextPart, words_NM: Tensor, mask_NM: Tensor) -> tuple[Tensor, Rows, Rows]:
        """States that predict words and end tokens alone, their layout, and the layout of the whole rows."""
        units = self.unit_embedding(words_NM).to(text.blocks[0].dtype)
        if self.training and self.history_dropout:
            units = units * (torch.rand_like(mask_NM, dtype=units.dtype) >= self.history_dropout)[..., None]
        row = join([*text.blocks, units], [*text.masks, mask_NM], self.layout, open_end=True)
        where = row.rows.causal()
        if self._places_text:
            text_N1 = (row.rows.lengths_N - mask_NM.sum(1))[:, None]
            places_NS = self._places(text_N1, row.rows.size, text.starts_NS, words_NM)
            where["position_ids"] = row.rows.from_padded(places_NS)
            if self.window_units is not None:
                where["attention_mask"] = self.sees(places_NS, row.rows.real)
        hidden = self.body(
            inputs_embeds=self.dropout(self.projection(row.values)), use_cache=False, **where
        ).last_hidden_state
        return row.predicting(hidden), row.targets, row.rows

    @property
    def _places_text(self) -> bool:
        """Whether a text token's rotary position is where its speech is expected, counted in words."""
        return self.text_stride is not None or self.units_per_character is not None

    def _places(self, text_N1: Tensor, size: int, starts_NS: Tensor | None, words_NM: Tensor) -> Tensor:
        """Rotary positions `[N, size]` of rows of `text_N1` text positions and words after them."""
        columns_S = torch.arange(size, device=words_NM.device)
        word_NS = columns_S - text_N1
        if self.units_per_character is None:
            return torch.where(word_NS < 0, columns_S * float(self.text_stride or 1), word_NS)
        assert starts_NS is not None and self.word_units_U is not None
        text_NS = starts_NS.gather(1, columns_S.clamp(max=starts_NS.shape[1] - 1).expand(len(words_NM), -1))
        said_NM = self.word_units_U[words_NM].long().cumsum(1).float()  # whole numbers, in any order the same
        said_NS = said_NM.gather(1, word_NS.clamp(0, max(words_NM.shape[1] - 1, 0)))
        return torch.where(word_NS < 0, text_NS * self.units_per_character, said_NS)

    def sees(self, places_NS: Tensor, real_NS: Tensor) -> Tensor:
        """Which of the positions before it each one attends: `[N, 1, S, S]`, always itself."""
        columns_S = torch.arange(places_NS.shape[1], device=places_NS.device)
        age_SS = columns_S[:, None] - columns_S
        seen_NSS = real_NS[:, None] & (age_SS >= 0)
        if self.window_units is not None:
            seen_NSS = seen_NSS & ((places_NS[:, :, None] - places_NS[:, None]).abs() <= self.window_units)
        return (seen_NSS | (age_SS == 0))[:, None]

    def _positions(self, mask_NL: Tensor, starts_NS: Tensor | None) -> Tensor:
        """Rotary positions `[N, L]` of left-padded text parts."""
        columns_NL = position_ids(mask_NL)
        if self.units_per_character is not None:
            assert starts_NS is not None
            return starts_NS.gather(1, columns_NL) * self.units_per_character
        return columns_NL if self.text_stride is None else columns_NL * self.text_stride

    @torch.no_grad()
    def greedy(
        self,
        text: JoinedRows,
        limit_N: Tensor,
        starts_NS: Tensor | None = None,
        *,
        stop_loops: bool = False,
        draft: Draft | None = None,
    ) -> DecodedUnits:
        """Greedy, KV-cached decoding of all rows at once.

        Args:
            text: text part, left-padded.
            limit_N: most words each row may have before it counts as runaway (U20).
            starts_NS: of the text part.
            stop_loops: a row that repeats itself need not be decoded to its limit; it then has no end.
            draft: what the words will probably be. It changes no word: those that are the most probable ones are known
                in one pass, and decoding begins after them.
        """
        length = text.mask_BL.shape[1]
        limit_N = limit_N.clamp(max=self.max_positions - length).clamp(min=0)  # too long a text never ends
        if draft is None:
            step = self.begin(text, starts_NS, capacity(length + BLOCK))
            return decode(step, length, limit_N, end=self.end, pad=self.pad, stop_loops=stop_loops)
        within_ND = torch.arange(draft.words_ND.shape[1], device=limit_N.device) < limit_N[:, None]
        draft = Draft(draft.words_ND, draft.mask_ND & within_ND)
        start = length + draft.words_ND.shape[1]
        step = self.begin(text, starts_NS, capacity(start + BLOCK), draft=draft)
        rest_N = limit_N - step.verified_N
        # A whole row may be verified, and then the next word is its end.
        found = decode(step, start, rest_N, end=self.end, pad=self.pad, stop_loops=stop_loops, first_look=1)
        return after_draft(draft, step.verified_N, found, self.pad)

    def begin(
        self,
        text: JoinedRows,
        starts_NS: Tensor | None,
        columns: int,
        *,
        body: StaticLlama | None = None,
        draft: Draft | None = None,
    ) -> DecodeStep:
        """Read left-padded text parts, to be followed by words in a cache of `columns` columns, see `DecodeStep`."""
        places_NL = self._positions(text.mask_BL, starts_NS)
        # Words count from 0 where the text is placed by them, else on from the text.
        place_N1 = torch.zeros_like(places_NL[:, :1]) if self._places_text else places_NL[:, -1:] + 1
        return DecodeStep(self, text, places_NL, place_N1, columns, body=body, draft=draft)


class Teacher(nn.Module):
    """The frozen T2C: its `forward` is the whole greedy decode.

    One module call a step, whatever the rows' lengths: marked as a ZeRO-3 leaf, its weights are gathered once before
    the loop, and ranks that decode different lengths still make the same calls.
    """

    def __init__(self, decoder: T2CDecoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(
        self,
        text_BLh: Tensor,
        mask_BL: Tensor,
        limit_N: Tensor,
        starts_BS: Tensor | None = None,
        draft: Draft | None = None,
    ) -> DecodedUnits:
        """Pseudo units of left-padded text parts, without gradient; a row that repeats itself, which is rejected as one
        that never ends, stops early."""
        text = JoinedRows(text_BLh, mask_BL, [])
        return self.decoder.greedy(text, limit_N, starts_BS, stop_loops=True, draft=draft)


def text_part(
    prefix_Ph: Tensor,
    words_NTh: Tensor,
    mask_NT: Tensor,
    header_Qh: Tensor,
    characters_NT: Tensor | None = None,
) -> TextPart:
    """`[prefix ; words ; unit header]` of each row; `characters_NT` are those of each text token, which come first."""
    rows = len(words_NTh)
    prefix = prefix_Ph.expand(rows, -1, -1).to(words_NTh.dtype)
    header = header_Qh.expand(rows, -1, -1).to(words_NTh.dtype)
    real = mask_NT.new_ones(rows, prefix.shape[1]), mask_NT.new_ones(rows, header.shape[1])
    starts_NS = None
    if characters_NT is not None:
        spoken_NT = characters_NT * mask_NT
        before_NT = ((spoken_NT.cumsum(1) - spoken_NT) * mask_NT).float()
        # The template stands where speech begins: after the header, the first word is to be found in the first token.
        template = [before_NT.new_zeros(rows, part.shape[1]) for part in (prefix, header)]
        starts_NS = torch.cat([template[0], before_NT, template[1]], dim=1)
    return TextPart([prefix, words_NTh, header], [real[0], mask_NT, real[1]], starts_NS)
