"""Splits a list of recordings by a hash of what each is called, so that an utterance stays where it is as more come."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from shards.corpus import Corpus, Request, Utterance

PARTS = ("train", "valid")


def part_of(corpus: Corpus, part: str, share: float) -> Corpus:
    """A part of a corpus.

    Args:
        corpus: the whole.
        part: "valid" for what is held out, "train" for the rest.
        share: of it that is held out.
    """
    return replace(corpus, discover=partial(_discover, corpus, part, share))


def _discover(corpus: Corpus, part: str, share: float, source: Path, request: Request) -> Iterator[Utterance]:
    for utterance in corpus.discover(source, request):
        if (part == "valid") == _is_held_out(utterance.id, share):
            yield replace(utterance, split=part)


def _is_held_out(name: str, share: float) -> bool:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") < share * 2**32
