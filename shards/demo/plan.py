"""Plans the sentences and voices of every set of the demo corpus: a pure function of the facts the text model knows."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar, get_args

from shards.demo.compositions import compose
from shards.demo.facts import COUNTRIES, RELATIONS, Country, Relation, accepted
from shards.demo.phrasing import (
    ASR_COUNTRY_CARRIERS,
    HELDOUT_QUESTIONS,
    OPEN_ANSWERS,
    OPEN_HELDOUT_QUESTIONS,
    OPEN_TRAIN_QUESTIONS,
    TRAIN_QUESTIONS,
    VALID_QUESTIONS,
    answer_text,
    open_answer_text,
    question,
    sentence,
)
from shards.demo.speech import ANSWER_VOICE, HELDOUT_VOICES, TRAIN_RENDERINGS, Utterance, Voice

T = TypeVar("T")
Task = Literal["sqa", "asr", "tts"]
Scale = Literal["demo", "small"]
"""`demo`: what two processors train in half an hour. `small`: the same questions, and hours of the answer voice."""
SCALES: tuple[Scale, ...] = get_args(Scale)
Fact = tuple[str, Relation]
"""Name of a country and what is asked about it."""

HELDOUT_COUNTRIES = 20
"""Countries for *knowledge kept* at most; a third of those of which the text model knows most."""
SQA_RENDERINGS = 400
"""Questions about one fact that Piper speaks for training; each is heard in two voices."""
OPEN_RENDERINGS = 2
"""Open questions about each training country; each is heard in two voices."""
TTS_TRAIN: dict[Scale, tuple[int, int]] = {"demo": (1600, 1500), "small": (7500, 2500)}
"""Statements and lists that the answer voice says for training, see `shards.demo.compositions`."""
ASR_LISTS: dict[Scale, int] = {"demo": 0, "small": 1500}
"""Lists of names to transcribe: they name every capital and language, and state nothing of a country."""
TTS_VALID = TTS_HELDOUT = 60
"""Compositions that the answer voice says for validation, and for the test of the T2C decoder alone."""
SQA_VALID = 48
TEST_QUESTIONS = 150
"""Questions of each test set."""


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
        entity: the country asked about, whose name a right answer must say.
        relation: what is asked about it, "open" for an open question.
    """

    stem: str
    task: Task
    utterance: Utterance
    question_text: str | None
    answer_text: str
    answers: tuple[str, ...] = ()
    entity: str | None = None
    relation: str | None = None

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
    return _asked(country, template, f"{relation}-{stem}", voices, relation, relation, answer_text(country, relation))


def _open_question(country: Country, template: str, stem: str, voices: tuple[Voice, ...], form: int) -> Item:
    """Its answer says more than the capital, and has to say that."""
    return _asked(country, template, f"open-{stem}", voices, "open", "capital", open_answer_text(country, form))


def _asked(
    country: Country, template: str, stem: str, voices: tuple[Voice, ...], kind: str, gold: Relation, answer: str
) -> Item:
    text = question(template, country)
    return Item(
        stem=f"sqa-{slug(country.name)}-{stem}",
        task="sqa",
        utterance=Utterance(text=text, voices=voices),
        question_text=text,
        answer_text=answer,
        answers=tuple(accepted(country, gold)),
        entity=country.name,
        relation=kind,
    )


def _transcript(stem: str, text: str, voices: tuple[Voice, ...]) -> Item:
    return Item(
        stem=f"asr-{stem}",
        task="asr",
        utterance=Utterance(text=text, voices=voices),
        question_text=text,
        answer_text=text,
    )


def _spoken(stem: str, text: str) -> Item:
    return Item(
        stem=f"tts-{stem}",
        task="tts",
        utterance=Utterance(text=text, voices=(ANSWER_VOICE,)),
        question_text=None,
        answer_text=text,
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


def _asr_lists(countries: list[Country], count: int) -> list[Item]:
    lists = compose(countries, 0, count, "asr-train")
    return [_transcript(f"names-{number:04d}", text, _voices(number, 1)) for number, text in enumerate(lists)]


def _spread(items: list[T], count: int) -> list[T]:
    """At most `count` items at even distances."""
    if len(items) <= count:
        return items
    return [items[index * len(items) // count] for index in range(count)]


def _open_train(countries: list[Country]) -> list[Item]:
    items = []
    for number, country in enumerate(countries):
        for turn in range(OPEN_RENDERINGS):
            index = (number * OPEN_RENDERINGS + turn) % len(OPEN_TRAIN_QUESTIONS)
            form = (number + turn) % len(OPEN_ANSWERS)
            voices = _voices(number + turn, 2)
            items.append(_open_question(country, OPEN_TRAIN_QUESTIONS[index], f"p{index}", voices, form))
    return items


def _phrasing_test(facts: list[tuple[Country, Relation]]) -> list[Item]:
    """Known facts asked in phrasings and voices never heard."""
    asked = [(*fact, template) for template in range(2) for fact in facts]
    items = []
    for number, (country, relation, template) in enumerate(_spread(asked, TEST_QUESTIONS)):
        voice = HELDOUT_VOICES[number // 2 % 2]
        items.append(_question(country, relation, HELDOUT_QUESTIONS[relation][template], f"h{template}", (voice,)))
    return items


def _knowledge_test(kept: list[tuple[Country, Relation]]) -> list[Item]:
    """Facts that no training set states, each in several phrasings."""
    phrasings = {
        relation: [*enumerate(HELDOUT_QUESTIONS[relation], -2), *enumerate(TRAIN_QUESTIONS[relation])]
        for relation in RELATIONS
    }
    each = min(len(phrasings["capital"]), math.ceil(TEST_QUESTIONS / max(1, len(kept))))
    items = []
    for number, (country, relation) in enumerate(kept):
        for index, template in phrasings[relation][:each]:
            stem = f"h{index + 2}" if index < 0 else f"p{index}"
            items.append(_question(country, relation, template, stem, _voices(number + index + 2, 1)))
    return items


def _open_test(countries: list[Country]) -> list[Item]:
    asked = [(index, country) for index in range(len(OPEN_HELDOUT_QUESTIONS)) for country in countries]
    items = []
    for number, (index, country) in enumerate(_spread(asked, TEST_QUESTIONS)):
        voice, form = HELDOUT_VOICES[number // 2 % 2], (number + index) % len(OPEN_ANSWERS)
        items.append(_open_question(country, OPEN_HELDOUT_QUESTIONS[index], f"h{index}", (voice,), form))
    return items


def _sqa_valid(facts: list[tuple[Country, Relation]]) -> list[Item]:
    return [
        _question(country, relation, VALID_QUESTIONS[relation], "valid", (HELDOUT_VOICES[number % 2],))
        for number, (country, relation) in enumerate(_spread(facts, SQA_VALID))
    ]


def _voiced(prefix: str, texts: Sequence[str]) -> list[Item]:
    return [_spoken(f"{prefix}-{number:04d}", text) for number, text in enumerate(texts)]


def plan_corpus(known: Collection[Fact], limit: int | None = None, scale: Scale = "demo") -> CorpusPlan:
    """Decide every sentence of every set.

    Args:
        known: facts the text model answers right.
        limit: samples a synthesised set at most, for a cut-down corpus; None is the whole one.
        scale: how much the answer voice says.

    Returns:
        For training `sqa-train`, `asr-train` (its synthetic part) and `tts-train`; for validation `sqa-valid` and
        `tts-valid`; as tests `sqa-heldout-phrasing`, `sqa-heldout-knowledge`, `sqa-heldout-open` and `tts-heldout`;
        and `tts-references`, the answers of the tests as the voice says them. Each is in a fixed random order.
    """
    known = frozenset(known)
    facts = [
        (country, relation) for relation in RELATIONS for country in COUNTRIES if (country.name, relation) in known
    ]
    heldout = choose_heldout(known)
    countries = [country for country in COUNTRIES if any((country.name, relation) in known for relation in RELATIONS)]
    train = [fact for fact in facts if fact[0].name not in heldout]
    kept = [fact for fact in facts if fact[0].name in heldout]
    taught = [country for country in countries if country.name not in heldout]

    voiced = compose(countries, *TTS_TRAIN[scale], "tts-train")
    valid = compose(countries, TTS_VALID, 0, "tts-valid", voiced)
    tests = {
        "sqa-heldout-phrasing": _phrasing_test(train),
        "sqa-heldout-knowledge": _knowledge_test(kept),
        "sqa-heldout-open": _open_test(taught),
    }
    sets = {
        "tts-train": _voiced("train", voiced),
        "tts-valid": _voiced("valid", valid),
        "tts-heldout": _voiced("heldout", compose(countries, TTS_HELDOUT, 0, "tts-heldout", [*voiced, *valid])),
        "sqa-train": _sqa_train(train) + _open_train(taught),
        "sqa-valid": _sqa_valid(train),
        **tests,
        "asr-train": _asr_train(countries, heldout) + _asr_lists(countries, ASR_LISTS[scale]),
    }
    for name, items in sets.items():
        items = sets[name] = random.Random(name).sample(items, len(items))
        if limit is not None:
            sets[name] = _cut(items, limit)
    answers = dict.fromkeys(item.answer_text for name in tests for item in sets[name])
    sets["tts-references"] = _voiced("reference", list(answers))
    return CorpusPlan(sets, heldout)


def _cut(items: list[Item], limit: int) -> list[Item]:
    """The first items that make at most `limit` samples; a sentence's spare voices are dropped first."""
    single = [
        replace(item, utterance=Utterance(text=item.utterance.text, voices=item.utterance.voices[:1])) for item in items
    ]
    return single[:limit]
