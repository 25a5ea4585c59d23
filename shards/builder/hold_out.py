"""Splits a list of recordings by a hash of what each is called, so that an utterance stays where it is as more come."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from echox.errors import DataError
from shards.corpus import Corpus, Request, Utterance

PARTS = ("train", "valid", "test")


@dataclass(frozen=True)
class Shares:
    """What is held out of a list, each a share of it.

    Attributes:
        valid: for choices, such as when to stop.
        test: for the scores, and nothing else.
    """

    valid: float
    test: float = 0.0

    def check(self, part: str) -> None:
        """Raise DataError where a part can have nothing in it."""
        if self.valid + self.test > 1:
            what = f"--valid-share {self.valid:g} and --test-share {self.test:g} are more than the list"
            raise DataError(what, fix="give shares that leave something to train on")
        if part != "train" and getattr(self, part) == 0:
            raise DataError(f"--part {part} holds nothing", fix=f"give --{part}-share a number above 0")

    def part(self, name: str) -> str:
        """The part of an utterance. Those of `test` are at the far end: a larger share of one moves none of the other.

        Args:
            name: of the utterance.
        """
        place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") / 2**32
        return "valid" if place < self.valid else "test" if place >= 1 - self.test else "train"


def part_of(corpus: Corpus, part: str, shares: Shares) -> Corpus:
    """A part of a corpus.

    Args:
        corpus: the whole.
        part: "valid" or "test" for what is held out, "train" for the rest.
        shares: what is held out.

    Raises:
        DataError: the part can have nothing in it; or, when the corpus is read, has nothing.
    """
    shares.check(part)
    return replace(corpus, discover=partial(_discover, corpus, part, shares))


def _discover(corpus: Corpus, part: str, shares: Shares, source: Path, request: Request) -> Iterator[Utterance]:
    count = found = 0
    for utterance in corpus.discover(source, request):
        count += 1
        if shares.part(utterance.id) == part:
            found += 1
            yield replace(utterance, split=part)
    if count and not found:
        fix = "hold out less" if part == "train" else f"list more, or give a larger --{part}-share"
        raise DataError(f"none of the {count:,} utterances is in part {part}", where=str(source), fix=fix)
