"""Speaks segments of text: the one place where H, or text embeddings, become units, streamed or not."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

import numpy as np
from torch import Tensor

from echox.models.greedy import BLOCK
from echox.models.open_segments import OpenSegments

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from echox.models.echo import Segments
    from echox.models.t2c import T2CDecoder
    from echox.stages.echo import EchoStage
    from echox.units.language import UnitLanguage

Key = TypeVar("Key", bound=Hashable)


class Spoken(NamedTuple, Generic[Key]):
    """Units of a segment since one last looked; `failure` says why it has no end or no units, once it is over."""

    key: Key
    units: NDArray[np.uint16]
    over: bool
    failure: str


class SegmentSpeech(Generic[Key]):
    """Decodes the units of segments that are open at the same time.

    Args:
        stage: whose templates and limits hold.
        decoder: its Echo decoder, or its teacher.
        language: of the units.
    """

    def __init__(self, stage: EchoStage, decoder: T2CDecoder, language: UnitLanguage) -> None:
        self._stage, self._language = stage, language
        self._open: OpenSegments[Key] = OpenSegments(decoder)
        self._said: dict[Key, int] = {}
        self._most: dict[Key, int] = {}
        self._words: dict[Key, list[NDArray[np.int64]]] = {}

    def __len__(self) -> int:
        """How many segments are open."""
        return len(self._open)

    def open(self, keys: Sequence[Key], text_BRh: Tensor, tokens_BR: Tensor, rows: Segments) -> None:
        """Read the text of segments.

        Args:
            keys: one a segment.
            text_BRh: embeddings, or what the adapter made of H.
            tokens_BR: their tokens.
            rows: which of them make a segment.
        """
        stage = self._stage
        prefix, header = stage.embed_text(stage.prefix_P), stage.embed_text(stage.header_Q)
        most_N = stage.most_words(rows.mask_NT.sum(1))
        self._open.open(keys, stage.text_part(prefix, text_BRh, header, tokens_BR, rows), most_N)
        self._most |= dict(zip(keys, most_N.tolist(), strict=True))  # host sync
        self._said |= dict.fromkeys(keys, 0)

    def close(self, keys: set[Key]) -> None:
        """Forget segments."""
        self._open.close(keys)
        for key in keys & self._said.keys():
            del self._said[key], self._most[key]
            self._words.pop(key, None)

    def run(self, steps: int = BLOCK) -> list[Spoken[Key]]:
        """Decode up to `steps` words of every open segment."""
        return [self._spoken(*said) for said in self._open.run(steps)]

    def _spoken(self, key: Key, words: NDArray[np.int64], ended: bool | None) -> Spoken[Key]:
        if not self._language.separable:  # only all words of a segment say which units they are
            self._words.setdefault(key, []).append(words)
            words = words[:0] if ended is None else np.concatenate(self._words.pop(key))
        units = np.asarray(self._language.decode(words), dtype=np.uint16)
        self._said[key] += len(units)
        failure = ""
        if ended is not None:
            said, most = self._said.pop(key), self._most.pop(key)
            failure = f"it has no end within {most} words" if not ended else "" if said else "it has no units"
        return Spoken(key, units, ended is not None, failure)
