"""Phrases what the demo says: questions, answers, statements with any value, and carriers that state no fact."""

from __future__ import annotations

from shards.demo.facts import RELATIONS, Country, Relation

TRAIN_QUESTIONS: dict[Relation, tuple[str, ...]] = {
    "capital": (
        "What is the capital of {country}?",
        "Which city is the capital of {country}?",
        "Can you tell me the capital of {country}?",
        "What is the name of the capital of {country}?",
        "Name the capital city of {country}.",
        "What city is the capital of {country}?",
        "Please name the capital of {country}.",
        "Do you have an idea what the capital of {country} is?",
        "I want to know the capital of {country}.",
        "Tell me which city is the capital of {country}, please.",
    ),
    "continent": (
        "Which continent is {country} in?",
        "On which continent is {country}?",
        "What continent is {country} part of?",
        "Can you tell me which continent {country} is in?",
        "Name the continent where {country} is.",
        "Which continent does {country} belong to?",
        "Please name the continent of {country}.",
        "Do you have an idea which continent {country} is on?",
        "I want to know what continent {country} is in.",
        "Tell me which continent {country} is part of, please.",
    ),
    "language": (
        "What is the official language of {country}?",
        "Which language is spoken in {country}?",
        "What language do people speak in {country}?",
        "Can you tell me the official language of {country}?",
        "Name the main language of {country}.",
        "What is the main language spoken in {country}?",
        "Please name the official language of {country}.",
        "Do you have an idea what people speak in {country}?",
        "I want to know the official language of {country}.",
        "Tell me what language is spoken in {country}, please.",
    ),
}
"""Questions heard in training, by relation."""

HELDOUT_QUESTIONS: dict[Relation, tuple[str, ...]] = {
    "capital": ("Do you know the capital of {country}?", "Please tell me what the capital of {country} is."),
    "continent": ("Do you know which continent {country} is in?", "Please tell me what continent {country} is on."),
    "language": ("Do you know the official language of {country}?", "Please tell me what language {country} speaks."),
}
"""Questions never heard in training, by relation."""

VALID_QUESTIONS: dict[Relation, str] = {
    "capital": "I wonder what the capital of {country} is.",
    "continent": "I wonder which continent {country} is on.",
    "language": "I wonder what language people speak in {country}.",
}
"""Questions of the validation set, by relation: neither in training nor in the tests."""

ANSWERS: dict[Relation, str] = {
    "capital": "The capital of {country} is {answer}.",
    "continent": "{country} is in {answer}.",
    "language": "The official language of {country} is {answer}.",
}
"""The canonical answer sentence, by relation."""

OPEN_TRAIN_QUESTIONS: tuple[str, ...] = (
    "Tell me about {country}.",
    "What do you know about {country}?",
    "Can you tell me something about {country}?",
    "Please describe {country}.",
    "I would like to hear about {country}.",
    "Say a few words about {country}.",
)
"""Open questions heard in training."""

OPEN_HELDOUT_QUESTIONS: tuple[str, ...] = (
    "What can you say about {country}?",
    "Please tell me a little about {country}.",
    "Do you know anything about {country}?",
)
"""Open questions never heard in training."""

OPEN_ANSWERS: tuple[tuple[str, str], ...] = (
    ("{country} is in {continent}.", "Its capital is {capital}."),
    ("{country} is a country in {continent}.", "Its capital is {capital}."),
    ("The capital of {country} is {capital}.", "People there speak {language}."),
    ("{capital} is the capital of {country}.", "It is in {continent}."),
)
"""Answers to an open question: two sentences, one of which names the capital. Which of them is said is open."""

STATEMENTS: tuple[tuple[Relation, str, int], ...] = (
    ("capital", "The capital of {country} is {answer}.", 4),
    ("continent", "{country} is in {answer}.", 4),
    ("language", "The official language of {country} is {answer}.", 3),
    ("capital", "{answer} is the capital of {country}.", 2),
    ("continent", "{country} is a country in {answer}.", 2),
    ("capital", "Its capital is {answer}.", 2),
    ("language", "People there speak {answer}.", 1),
    ("continent", "It is in {answer}.", 1),
)
"""Sentences that the answer voice says with any country and value: relation, pattern, how often."""

ASR_COUNTRY_CARRIERS: tuple[str, ...] = (
    "My sister is flying to {country} next month.",
    "We watched a long film about {country} last night.",
    "There was a story from {country} in the news.",
    "She drew a map of {country} on the wall.",
    "He has never been to {country} before.",
    "The weather in {country} is nice this week.",
    "I bought a small flag of {country}.",
    "Did you send the letter to {country}?",
    "They moved to {country} three years ago.",
    "{country} won the match on Sunday.",
    "What is the population of {country}?",
    "Which river runs through {country}?",
    "The history of {country} is a long one.",
    "Can you show me {country} on the map?",
    "Do you know anyone who has been to {country}?",
    "Please tell me about your trip to {country}.",
    "Do you know the way to {country}?",
    "Please tell me what you saw in {country}.",
)
"""Sentences to transcribe that name a country."""


def sentence(text: str) -> str:
    """With a capital first letter, so that "the Netherlands" may begin it."""
    return text[0].upper() + text[1:]


def question(template: str, country: Country) -> str:
    """A question about one country."""
    return sentence(template.format(country=country.name))


def statement(pattern: str, country: Country, value: str) -> str:
    """A sentence about a country with any value, true or not: "The capital of France is Lima."."""
    return sentence(pattern.format(country=country.name, answer=value))


def answer_text(country: Country, relation: Relation) -> str:
    """The canonical answer sentence of a fact, such as "The capital of France is Paris."."""
    return statement(ANSWERS[relation], country, country.answer(relation))


def open_answer_text(country: Country, form: int) -> str:
    """An answer to an open question about a country, in one of the forms of `OPEN_ANSWERS`."""
    said: dict[str, str] = {relation: country.answer(relation) for relation in RELATIONS}
    said["country"] = country.name
    return " ".join(sentence(part.format(**said)) for part in OPEN_ANSWERS[form])
