"""What the demo corpus says: nothing held out may leak, and every word an answer needs must be spoken somewhere."""

from __future__ import annotations

import random

import pytest

from shards.demo.compositions import compose
from shards.demo.facts import COUNTRIES, RELATIONS, Relation, accepted
from shards.demo.phrasing import (
    ASR_COUNTRY_CARRIERS,
    HELDOUT_QUESTIONS,
    OPEN_ANSWERS,
    OPEN_HELDOUT_QUESTIONS,
    OPEN_TRAIN_QUESTIONS,
    STATEMENTS,
    TRAIN_QUESTIONS,
    VALID_QUESTIONS,
    open_answer_text,
    statement,
)
from shards.demo.plan import CorpusPlan, Fact, Item, choose_heldout, plan_corpus
from shards.demo.prompts import words
from shards.demo.speech import HELDOUT_VOICES

EVERYTHING: list[Fact] = [(country.name, relation) for country in COUNTRIES for relation in RELATIONS]
BY_NAME = {country.name: country for country in COUNTRIES}


def some(share: float, seed: int) -> list[Fact]:
    rng = random.Random(seed)
    return [fact for fact in EVERYTHING if rng.random() < share]


@pytest.fixture(scope="module", params=[1.0, 0.5])
def plan(request: pytest.FixtureRequest) -> CorpusPlan:
    return plan_corpus(some(request.param, 3))


def says(item: Item, phrase: str) -> bool:
    text = f"{item.question_text or ''} | {item.answer_text}"
    return f" {words(phrase)} " in f" {words(text)} "


def says_name(text: str, name: str) -> bool:
    return f" {words(name)} " in f" {words(text)} "


def texts(items: list[Item]) -> set[str]:
    return {words(item.utterance.text) for item in items}


def test_table_is_sound() -> None:
    names = [country.name for country in COUNTRIES]
    assert len(COUNTRIES) >= 90 and len(set(names)) == len(names)
    assert len({country.capital for country in COUNTRIES}) == len(COUNTRIES)
    assert {country.continent for country in COUNTRIES} == {
        "Africa",
        "Asia",
        "Europe",
        "North America",
        "Oceania",
        "South America",
    }
    assert accepted(BY_NAME["Ukraine"], "capital") == ["Kyiv", "Kiev"]


def test_there_are_enough_phrasings_and_none_is_both_trained_and_held_out() -> None:
    for relation in RELATIONS:
        train, heldout = set(TRAIN_QUESTIONS[relation]), set(HELDOUT_QUESTIONS[relation])
        assert len(train) >= 6 and len(heldout) >= 2 and not train & heldout
        assert VALID_QUESTIONS[relation] not in train | heldout
    assert not set(OPEN_TRAIN_QUESTIONS) & set(OPEN_HELDOUT_QUESTIONS)


def test_no_training_sentence_states_a_held_out_fact(plan: CorpusPlan) -> None:
    assert 8 <= len(plan.heldout_countries) <= 20
    for name in ("sqa-train", "asr-train", "sqa-valid", "sqa-heldout-phrasing", "sqa-heldout-open"):
        for item in plan.sets[name]:
            for country in plan.heldout_countries:
                if not says(item, country):
                    continue
                assert item.entity is None
                for relation in RELATIONS:
                    assert not any(says(item, answer) for answer in accepted(BY_NAME[country], relation)), item


def test_no_carrier_states_any_fact(plan: CorpusPlan) -> None:
    for item in plan.sets["asr-train"]:
        for country in COUNTRIES:
            if country.capital == country.name:
                continue
            # "Mexico City" is a capital, it does not name Mexico.
            rest = words(item.answer_text).replace(words(country.capital), "")
            if f" {words(country.name)} " in f" {rest} ":
                assert not any(says(item, other.capital) for other in COUNTRIES if other.capital != other.name), item


def test_the_voice_never_says_a_true_statement_and_none_of_a_test(plan: CorpusPlan) -> None:
    true = {
        words(statement(pattern, country, answer))
        for country in COUNTRIES
        for relation, pattern, _ in STATEMENTS
        for answer in accepted(country, relation)
        if "{country}" in pattern
    }
    opened = {words(open_answer_text(country, form)) for country in COUNTRIES for form in range(len(OPEN_ANSWERS))}
    trained = texts(plan.sets["tts-train"])
    assert len(trained) > 2000 and not {text for text in trained if any(fact in text for fact in true)}
    tests = texts(plan.sets["tts-heldout"]) | texts(plan.sets["tts-references"]) | texts(plan.sets["tts-valid"])
    assert not trained & (tests | opened)
    assert not texts(plan.sets["tts-valid"]) & (texts(plan.sets["tts-heldout"]) | texts(plan.sets["tts-references"]))


def test_every_name_stands_beside_many_others() -> None:
    said = compose(COUNTRIES, 900, 300, "any", without=["Peru."])
    assert (
        len(said) == len(set(said)) == 1200
        and "Peru." not in said
        and said == compose(COUNTRIES, 900, 300, "any", ["Peru."])
    )
    assert compose(COUNTRIES, 5, 5, "other") != compose(COUNTRIES, 5, 5, "any")
    for country in COUNTRIES:
        own = [text for text in said[:900] if f" {words(country.name)} " in f" {words(text)} "]
        assert len(own) >= 2, country.name
    assert all(text.count(",") <= 2 and "capital" not in text for text in said[900:])
    few = compose(COUNTRIES[:3], 20, 10, "few")
    assert not any(says_name(text, country.name) for text in few for country in COUNTRIES[3:])
    assert compose([], 5, 5, "none") == []
    spoken = " ".join(words(text) for text in said[900:])
    for country in COUNTRIES:
        assert all(words(name) in spoken for name in (country.name, country.capital, country.language))


def test_held_out_names_are_heard_and_every_answer_word_is_spoken(plan: CorpusPlan) -> None:
    heard = [item for item in plan.sets["asr-train"] if item.task == "asr"]
    for country in plan.heldout_countries:
        own = [item for item in heard if says(item, country)]
        assert len(own) >= 10 and len({voice for item in own for voice in item.utterance.voices}) >= 6
    spoken = " ".join(texts(plan.sets["tts-train"])).split()
    for name in ("sqa-train", "sqa-heldout-phrasing", "sqa-heldout-knowledge", "sqa-heldout-open"):
        for item in plan.sets[name]:
            assert set(words(item.answer_text).split()) <= set(spoken), item.answer_text


def test_held_out_names_and_their_answers_are_spoken_apart(plan: CorpusPlan) -> None:
    spoken = texts(plan.sets["tts-train"])
    for item in plan.sets["sqa-heldout-knowledge"]:
        for phrase in (str(item.entity), item.answers[0]):
            assert sum(f" {words(phrase)} " in f" {text} " for text in spoken) >= 2, phrase


def test_held_out_sets_share_no_question_text_or_voice_with_training(plan: CorpusPlan) -> None:
    train = plan.sets["sqa-train"]
    train_voices = {voice for item in train for voice in item.utterance.voices}
    assert not texts(plan.sets["sqa-heldout-phrasing"]) & texts(train)
    assert not texts(plan.sets["sqa-heldout-open"]) & texts(train)
    valid = texts(plan.sets["sqa-valid"])
    assert valid and not any(valid & texts(items) for name, items in plan.sets.items() if name != "sqa-valid")
    assert not texts(plan.sets["sqa-heldout-knowledge"]) & texts(train)
    used = {voice for item in plan.sets["sqa-heldout-phrasing"] for voice in item.utterance.voices}
    assert used == set(HELDOUT_VOICES) and not used & train_voices and len(train_voices) == 8
    assert not texts(plan.sets["tts-heldout"]) & texts(plan.sets["tts-train"])


def test_sizes_and_keys(plan: CorpusPlan) -> None:
    counts = {name: sum(len(item.keys()) for item in items) for name, items in plan.sets.items()}
    assert 900 <= counts["sqa-train"] <= 1700 and 400 <= counts["asr-train"] <= 900
    for name in ("phrasing", "open"):
        assert counts[f"sqa-heldout-{name}"] == 150
    assert 100 <= counts["sqa-heldout-knowledge"] <= 200 and counts["tts-heldout"] == 60
    answers = {item.answer_text for name in plan.sets if "sqa-heldout" in name for item in plan.sets[name]}
    assert answers == {item.answer_text for item in plan.sets["tts-references"]}
    for items in plan.sets.values():
        keys = sum((item.keys() for item in items), [])
        assert len(set(keys)) == len(keys) and not any("." in key or "/" in key for key in keys)


def test_only_known_facts_are_asked_and_the_plan_is_a_function_of_them() -> None:
    known = some(0.4, 9)
    first = plan_corpus(known)
    assert first == plan_corpus(set(known)) == plan_corpus(known[::-1])
    for name in ("sqa-train", "sqa-heldout-phrasing", "sqa-heldout-knowledge"):
        for item in first.sets[name]:
            assert item.relation == "open" or (item.entity, item.relation) in known


def test_every_training_phrasing_is_used_for_every_relation() -> None:
    items = plan_corpus(some(0.4, 9)).sets["sqa-train"]
    for relation in RELATIONS:
        used = {item.stem.rsplit("-", 1)[1] for item in items if f"-{relation}-" in item.stem}
        assert used == {f"p{index}" for index in range(len(TRAIN_QUESTIONS[relation]))}


def test_a_name_that_gives_the_capital_away_is_not_held_out() -> None:
    assert "Mexico" in BY_NAME and "Singapore" in BY_NAME
    giving: list[Relation] = ["capital"]
    known = [
        (name, relation)
        for name in ("Mexico", "Singapore", "Guatemala", "France", "Kenya", "Peru")
        for relation in giving
    ]
    assert set(choose_heldout(known)) <= {"France", "Kenya", "Peru"}


@pytest.mark.parametrize("limit", [1, 5])
def test_a_limit_cuts_every_set(limit: int) -> None:
    plan = plan_corpus(EVERYTHING, limit)
    sizes = {name: sum(len(item.keys()) for item in items) for name, items in plan.sets.items()}
    assert all(1 <= size <= (3 * limit if name == "tts-references" else limit) for name, size in sizes.items())
    assert plan_corpus([]).sets["sqa-train"] == []


def test_carriers_leave_room_for_a_name() -> None:
    for carrier in (*ASR_COUNTRY_CARRIERS,):
        assert carrier.count("{country}") == 1
