"""Plans the sentences and voices of every set of the demo corpus: a pure function of the facts the text model knows."""

from __future__ import annotations

import random
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

from shards.demo.facts import COUNTRIES, RELATIONS, Country, Relation, accepted
from shards.demo.phrasing import (
    ASR_COUNTRY_CARRIERS,
    HELDOUT_QUESTIONS,
    TRAIN_QUESTIONS,
    answer_text,
    question,
    sentence,
    swapped_text,
)
from shards.demo.speech import ANSWER_VOICE, HELDOUT_VOICES, TRAIN_RENDERINGS, Utterance, Voice

T = TypeVar("T")
Task = Literal["sqa", "asr", "tts"]
Fact = tuple[str, Relation]
"""Name of a country and what is asked about it."""

HELDOUT_COUNTRIES = 12
SQA_RENDERINGS = 500
"""Questions Piper speaks for training; each is heard in two voices."""
TTS_SWAPS = 600
"""Answers with another country's value that are spoken for training."""
HELDOUT_PHRASING = 60
HELDOUT_ANSWERS = 60


@dataclass(frozen=True, kw_only=True)
class Item:
    """One sentence to speak and the samples it becomes.

    Attributes:
        stem: start of the samples' keys.
        task: of the samples.
        utterance: text and voices; a sample a voice.
        question_text: the question or the transcript; None for tts.
        answer_text: the answer, the transcript, or the sentence to speak.
        answers: accepted short answers of a question.
        fact: "country|relation" of a question or of its spoken answer.
    """

    stem: str
    task: Task
    utterance: Utterance
    question_text: str | None
    answer_text: str
    answers: tuple[str, ...] = ()
    fact: str | None = None

    def keys(self) -> list[str]:
        """Keys of the samples, in the order of the voices."""
        return [f"{self.stem}-{voice.name}" for voice in self.utterance.voices]


@dataclass(frozen=True)
class CorpusPlan:
    """Everything to synthesise.

    Attributes:
        sets: items by name of the set.
        heldout_countries: countries whose facts no training set states.
    """

    sets: dict[str, list[Item]]
    heldout_countries: tuple[str, ...] = field(default=())


def slug(text: str) -> str:
    """Letters, digits and dashes only."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _words(name: str) -> set[str]:
    return set(slug(name).split("-"))


def choose_heldout(facts: Collection[Fact], count: int = HELDOUT_COUNTRIES) -> tuple[str, ...]:
    """Countries for *knowledge kept*: spread over the alphabet, among those the text model knows most about.

    A country whose capital shares a word with its name is passed over: its name would give the answer away.
    """
    known = {country.name: sum((country.name, relation) in facts for relation in RELATIONS) for country in COUNTRIES}
    fair = [country.name for country in COUNTRIES if not _words(country.name) & _words(country.capital)]
    candidates: list[str] = []
    for least in range(len(RELATIONS), 0, -1):
        candidates = [name for name in fair if known[name] >= least]
        if len(candidates) >= 2 * count:
            break
    count = min(count, max(1, len(candidates) // 3)) if candidates else 0
    return tuple(candidates[(2 * index + 1) * len(candidates) // (2 * count)] for index in range(count))


def _question(country: Country, relation: Relation, template: str, stem: str, voices: tuple[Voice, ...]) -> Item:
    text = question(template, country)
    return Item(
        stem=f"sqa-{slug(country.name)}-{relation}-{stem}",
        task="sqa",
        utterance=Utterance(text=text, voices=voices),
        question_text=text,
        answer_text=answer_text(country, relation),
        answers=tuple(accepted(country, relation)),
        fact=f"{country.name}|{relation}",
    )


def _transcript(stem: str, text: str, voices: tuple[Voice, ...]) -> Item:
    return Item(
        stem=f"asr-{stem}",
        task="asr",
        utterance=Utterance(text=text, voices=voices),
        question_text=text,
        answer_text=text,
    )


def _spoken(stem: str, text: str, fact: str | None = None) -> Item:
    return Item(
        stem=f"tts-{stem}",
        task="tts",
        utterance=Utterance(text=text, voices=(ANSWER_VOICE,)),
        question_text=None,
        answer_text=text,
        fact=fact,
    )


def _voices(number: int, count: int) -> tuple[Voice, ...]:
    """`count` training voices of one rendering, another choice for each number."""
    group = TRAIN_RENDERINGS[number % len(TRAIN_RENDERINGS)]
    start = number // len(TRAIN_RENDERINGS)
    return tuple(group[(start + offset) % len(group)] for offset in range(count))


def _sqa_train(facts: list[tuple[Country, Relation]]) -> list[Item]:
    each = max(2, min(len(TRAIN_QUESTIONS["capital"]), round(SQA_RENDERINGS / max(1, len(facts)))))
    items = []
    for number, (country, relation) in enumerate(facts):
        templates = TRAIN_QUESTIONS[relation]
        for turn in range(each):
            # Neighbouring facts use other phrasings, so that each phrasing meets many countries.
            index = (number * each + turn) % len(templates)
            voices = _voices(number + turn, 2)
            items.append(_question(country, relation, templates[index], f"p{index}", voices))
    return items


def _asr_train(countries: list[Country], heldout: Collection[str]) -> list[Item]:
    items = []
    for number, country in enumerate(countries):
        kept = country.name in heldout
        for turn in range(len(ASR_COUNTRY_CARRIERS) - 2 if kept else 3):
            index = (number + turn * (1 if kept else 5)) % len(ASR_COUNTRY_CARRIERS)
            text = sentence(ASR_COUNTRY_CARRIERS[index].format(country=country.name))
            items.append(_transcript(f"{slug(country.name)}-{index}", text, _voices(number + turn, 2 if kept else 1)))
    return items


def _deal(turns: Sequence[Country], relation: Relation) -> Iterator[str | None]:
    """For each turn a value that is not that country's and that it has not had, if one is left; all come evenly."""
    values = sorted({country.answer(relation) for country in turns})
    unfit = {country.name: set(accepted(country, relation)) for country in turns}
    shuffled = random.Random(f"swaps {relation}")
    deck: list[str] = []
    for country in turns:
        fitting = [value for value in values if value not in unfit[country.name]]
        if not fitting:
            yield None
            continue
        while not (found := [card for card in deck if card in fitting]):
            deck += shuffled.sample(values, len(values))
        deck.remove(found[0])
        unfit[country.name].add(found[0])
        yield found[0]


def _swapped_answers(facts: list[tuple[Country, Relation]], heldout: Collection[str]) -> tuple[list[Item], list[Item]]:
    """(training, spare) answers with another country's value.

    Among true answers alone a name always has the same neighbours, and a decoder learns them by heart; among these it
    can only read its text. Held-out countries are in the training ones, so that their names are spoken somewhere.
    """
    train: list[Item] = []
    spare: list[Item] = []
    each = max(2, round(TTS_SWAPS / max(1, len(facts))))
    for relation in RELATIONS:
        countries = [country for country, asked in facts if asked == relation]
        trained = len(countries) * each
        turns = countries * each + [country for country in countries if country.name not in heldout]
        for turn, (country, value) in enumerate(zip(turns, _deal(turns, relation), strict=True)):
            if value is None:
                continue
            stem = f"{slug(country.name)}-{relation}-{slug(value)}"
            item = _spoken(stem, swapped_text(country, relation, value))
            (train if turn < trained else spare).append(item)
    return train, spare


def _spread(items: list[T], count: int) -> list[T]:
    """At most `count` items at even distances."""
    if len(items) <= count:
        return items
    return [items[index * len(items) // count] for index in range(count)]


def plan_corpus(known: Collection[Fact], limit: int | None = None) -> CorpusPlan:
    """Decide every sentence of every set.

    Args:
        known: facts the text model answers right.
        limit: samples a synthesised set at most, for a cut-down corpus; None is the whole one.

    Returns:
        Sets `sqa-train`, `asr-train` (its synthetic part), `tts-train`, `tts-answers` (its answers once more, so
        that a recipe can weigh them), `sqa-heldout-phrasing`, `sqa-heldout-knowledge` and `tts-heldout`, each in a
        fixed random order.
    """
    known = frozenset(known)
    facts = [
        (country, relation) for relation in RELATIONS for country in COUNTRIES if (country.name, relation) in known
    ]
    heldout = choose_heldout(known)
    countries = [country for country in COUNTRIES if any((country.name, relation) in known for relation in RELATIONS)]
    train = [fact for fact in facts if fact[0].name not in heldout]
    kept = [fact for fact in facts if fact[0].name in heldout]

    phrasing = []
    for number, (country, relation) in enumerate(_spread(train, HELDOUT_PHRASING)):
        template, voice = number % 2, HELDOUT_VOICES[number // 2 % 2]
        phrasing.append(_question(country, relation, HELDOUT_QUESTIONS[relation][template], f"h{template}", (voice,)))
    knowledge = []
    for number, (country, relation) in enumerate(kept):
        for index in (0, 1) if relation == "capital" else (0,):
            voices = _voices(number, 1)
            knowledge.append(_question(country, relation, TRAIN_QUESTIONS[relation][index], f"p{index}", voices))
    swapped, spare = _swapped_answers(facts, heldout)

    def answer(country: Country, relation: Relation) -> Item:
        stem = f"{slug(country.name)}-{relation}-answer"
        return _spoken(stem, answer_text(country, relation), f"{country.name}|{relation}")

    answers = [answer(*fact) for fact in train]
    kept_answers = [answer(*fact) for fact in kept]
    sets = {
        "tts-train": answers + swapped,
        "tts-answers": answers,
        "tts-heldout": kept_answers + _spread(spare, max(0, HELDOUT_ANSWERS - len(kept_answers))),
        "sqa-train": _sqa_train(train),
        "sqa-heldout-phrasing": phrasing,
        "sqa-heldout-knowledge": knowledge,
        "asr-train": _asr_train(countries, heldout),
    }
    for name, items in sets.items():
        items = sets[name] = random.Random(name).sample(items, len(items))
        if limit is not None:
            sets[name] = _cut(items, limit)
    return CorpusPlan(sets, heldout)


def _cut(items: list[Item], limit: int) -> list[Item]:
    """The first items that make at most `limit` samples; a sentence's spare voices are dropped first."""
    single = [
        replace(item, utterance=Utterance(text=item.utterance.text, voices=item.utterance.voices[:1])) for item in items
    ]
    return single[:limit]
