"""Phrases the demo's sentences: questions and answers about facts, and carriers that name things but state no fact."""

from __future__ import annotations

from shards.demo.facts import Country, Relation

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

ANSWERS: dict[Relation, str] = {
    "capital": "The capital of {country} is {answer}.",
    "continent": "{country} is in {answer}.",
    "language": "The official language of {country} is {answer}.",
}
"""The canonical answer sentence, by relation."""

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


def swapped_text(country: Country, relation: Relation, value: str) -> str:
    """The answer sentence with any value, true or not: "The capital of France is Lima."."""
    return sentence(ANSWERS[relation].format(country=country.name, answer=value))


def answer_text(country: Country, relation: Relation) -> str:
    """The canonical answer sentence of a fact, such as "The capital of France is Paris."."""
    return swapped_text(country, relation, country.answer(relation))
