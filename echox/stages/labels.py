"""Gives each segment its label Y' without a decode: from what the teacher said before, or from the annotated answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from echox.models.echo import Segments
from echox.models.greedy import DecodedUnits, Draft
from echox.models.t2c import TextPart


class Label(NamedTuple):
    """What the teacher made of one segment: its unit-language words, and whether it came to an end."""

    words: list[int]
    ended: bool


class LabelStore(Protocol):
    """Labels of segments by their text tokens, from which alone the frozen teacher makes them."""

    def get(self, tokens: tuple[int, ...]) -> Label | None:
        """The label of a segment that was decoded before."""
        ...

    def alike(self, tokens: tuple[int, ...]) -> Label | None:
        """The label of a segment that begins as this one does, and came to an end."""
        ...

    def add(self, labels: Mapping[tuple[int, ...], Label]) -> None:
        """Keep new ones."""
        ...


def token_rows(tokens_NT: Tensor, mask_NT: Tensor) -> list[tuple[int, ...]]:
    """Text tokens of each segment; a host sync."""
    return [
        tuple(token for token, real in zip(row, mask, strict=True) if real)
        for row, mask in zip(tokens_NT.tolist(), mask_NT.tolist(), strict=True)
    ]


def stored_units(
    decode: Callable[[TextPart, Tensor], DecodedUnits],
    text: TextPart,
    limit_N: Tensor,
    segments: Sequence[tuple[int, ...]],
    store: LabelStore,
    padding: int,
) -> tuple[DecodedUnits, Tensor]:
    """Units as `decode` would give them for all segments, asked for those alone that the store lacks.

    Args:
        decode: the teacher: text parts and the most words of each to units.
        text, limit_N: of all segments.
        segments: their text tokens.
        store: is given what was decoded.
        padding: word that pads rows.

    Returns:
        The units, and True for segments that were known `[N]`.
    """
    found = [store.get(tokens) for tokens in segments]
    missing = [number for number, label in enumerate(found) if label is None]
    if missing:
        index_K = torch.tensor(missing, device=limit_N.device)
        starts_KS = None if text.starts_NS is None else text.starts_NS[index_K]
        part = TextPart([block[index_K] for block in text.blocks], [mask[index_K] for mask in text.masks], starts_KS)
        fresh = _labels(decode(part, limit_N[index_K]))
        store.add({segments[number]: label for number, label in zip(missing, fresh, strict=True)})
        for number, label in zip(missing, fresh, strict=True):
            found[number] = label
    known_N = torch.ones(len(segments), dtype=torch.bool)
    known_N[missing] = False
    labels = [label for label in found if label is not None]
    return _joined(labels, padding, limit_N.device), known_N.to(limit_N.device)


def drafted_units(
    decode: Callable[[TextPart, Tensor, Draft | None], DecodedUnits],
    text: TextPart,
    limit_N: Tensor,
    segments: Sequence[tuple[int, ...]],
    store: LabelStore,
    padding: int,
) -> DecodedUnits:
    """Units as `decode` gives them, which is told what it said of segments that begin alike.

    The arguments are those of `stored_units`, but every segment is asked for, with a draft or None.
    """
    found = [store.alike(tokens) for tokens in segments]
    draft = None
    if any(found):
        likely = _joined([label or Label([], False) for label in found], padding, limit_N.device)
        draft = Draft(likely.words_NM, likely.mask_NM)
    units = decode(text, limit_N, draft)
    store.add(dict(zip(segments, _labels(units), strict=True)))
    return units


def _labels(units: DecodedUnits) -> list[Label]:
    words = token_rows(units.words_NM, units.mask_NM)
    return [Label(list(row), ended) for row, ended in zip(words, units.ended_N.tolist(), strict=True)]


def _joined(labels: Sequence[Label], padding: int, device: torch.device) -> DecodedUnits:
    longest = max(1, *(len(label.words) for label in labels))
    words_NM = torch.tensor([[*label.words, *[padding] * (longest - len(label.words))] for label in labels])
    lengths_N = torch.tensor([len(label.words) for label in labels])
    mask_NM = torch.arange(longest) < lengths_N[:, None]
    ended_N = torch.tensor([label.ended for label in labels])
    return DecodedUnits(words_NM.to(device), mask_NM.to(device), ended_N.to(device))


def annotated_units(words_BM: Tensor, mask_BM: Tensor, rows: Segments, text: TextPart, most: int) -> DecodedUnits:
    """The words that are stored with the answer of each segment, which is the whole of it.

    Args:
        words_BM, mask_BM: of each sample.
        rows: one segment a sample.
        text: what the decoder reads before them.
        most: positions of the decoder; what does not fit has no end, as of a teacher that found none.
    """
    mask_NM = mask_BM[rows.owner_N]
    length_N = torch.stack([mask.sum(1) for mask in text.masks]).sum(0) + mask_NM.sum(1) + 1
    return DecodedUnits(words_BM[rows.owner_N], mask_NM, length_N <= most)
