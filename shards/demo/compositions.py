"""Composes what the answer voice says in training: statements of random names and values, and lists of names.

A T2C decoder that hears each name in one sentence learns the sentences by heart. Of these every name stands beside
every other, none of them states a true fact, and in a list nothing but the text tells what comes first: only reading
helps.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

from shards.demo.facts import RELATIONS, Country, Relation, accepted
from shards.demo.phrasing import STATEMENTS, sentence, statement

T = TypeVar("T")

PAIRS = 0.1
"""Share of the statements that are followed by another in the same utterance."""
LIST_LENGTHS = (1, 2, 2, 3, 3)
"""Names in a list, each as likely."""

_TRIES = 5


def compose(named: Sequence[Country], statements: int, lists: int, seed: str, without: Sequence[str] = ()) -> list[str]:
    """Different sentences: `statements` with random names and values, none of them true, then `lists` of names.

    Of a few countries there may be fewer.

    Args:
        named: the countries whose names and values are said.
        statements: statements, some of them pairs.
        lists: lists of one to three names.
        seed: of the choice.
        without: sentences that must not be among them.
    """
    if not named:
        return []
    rng = random.Random(seed)
    values = {relation: sorted({country.answer(relation) for country in named}) for relation in RELATIONS}
    names = sorted({country.name for country in named}.union(*values.values()))
    countries: _Deck[Country] = _Deck(named, rng)
    answers = {relation: _Deck(values[relation], rng) for relation in RELATIONS}
    listed = _Deck(names, rng)

    def one_statement() -> str:
        relation, pattern = _pattern(rng)
        country = countries.draw()
        for _ in values[relation]:
            value = answers[relation].draw()
            if value not in accepted(country, relation):
                return statement(pattern, country, value)
        return ""

    def some_statement() -> str:
        return " ".join(one_statement() for _ in range(2 if rng.random() < PAIRS else 1)).strip()

    def one_list() -> str:
        return sentence(", ".join(listed.draw() for _ in range(rng.choice(LIST_LENGTHS))) + ".")

    said: dict[str, None] = {}
    for wanted, make in ((statements, some_statement), (statements + lists, one_list)):
        for _ in range(_TRIES * wanted):  # of a few names there are only so many sentences
            text = make()
            if text and text not in without and len(said) < wanted:
                said[text] = None
    return list(said)


def _pattern(rng: random.Random) -> tuple[Relation, str]:
    relation, pattern, _ = rng.choices(STATEMENTS, [weight for *_, weight in STATEMENTS])[0]
    return relation, pattern


class _Deck(list[T]):
    """Cards in random order, shuffled again when all were drawn: each comes equally often."""

    def __init__(self, cards: Sequence[T], rng: random.Random) -> None:
        super().__init__()
        self._cards, self._rng = cards, rng

    def draw(self) -> T:
        if not self:
            self.extend(self._rng.sample(self._cards, len(self._cards)))
        return self.pop()
