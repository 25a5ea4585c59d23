"""The rule by which answers count, against DPR's tokeniser as a regular expression and a search of all places."""

from __future__ import annotations

import random
import unicodedata

import pytest
import regex

from echox.evaluate.text import answer_match

TOKEN = regex.compile(r"[\p{L}\p{N}\p{M}]+|[^\p{Z}\p{C}]")
"""Of DPR's SimpleTokenizer, which UltraEval-Audio's evaluator takes over."""
ALPHABET = [
    *("a", "b", "A", "1", "\u00bd", "é", "e\u0301", "\u0301", "ß", "İ", "Σ", "ς", "σ", "ﬁ", "中", "文"),
    *("'", "-", ".", ",", "$", "€", " ", "  ", "\t", "\n", "\u00a0", "\u200b", "\u0007", "_", "🙂"),
]


def tokens(text: str) -> list[str]:
    return [token.lower() for token in TOKEN.findall(unicodedata.normalize("NFD", text))]


def by_brute_force(prediction: str, golds: list[str]) -> bool:
    """Any gold's tokens at any place; no answer is right by an accepted answer without a token."""
    said = tokens(prediction)
    for gold in golds:
        wanted = tokens(gold)
        for start in range(len(said)):
            for end in range(start + 1, len(said) + 1):
                if said[start:end] == wanted:
                    return True
    return False


def test_it_is_the_rule_on_random_texts() -> None:
    chance = random.Random(5)
    right = 0
    for _ in range(4000):
        prediction = "".join(chance.choices(ALPHABET, k=chance.randint(0, 12)))
        golds = ["".join(chance.choices(ALPHABET, k=chance.randint(0, 3))) for _ in range(chance.randint(1, 3))]
        expected = by_brute_force(prediction, golds)
        assert answer_match(prediction, golds) is expected, (prediction, golds)
        right += expected
    assert 200 < right < 3800, "both outcomes are met"


def test_any_part_of_a_reply_by_its_own_tokens_is_an_answer() -> None:
    chance = random.Random(6)
    for _ in range(500):
        prediction = "".join(chance.choices(ALPHABET, k=10))
        said = tokens(prediction)
        if said:
            start = chance.randrange(len(said))
            part = " ".join(said[start : chance.randint(start + 1, len(said))])
            assert answer_match(prediction, part) is by_brute_force(prediction, [part])
            assert answer_match(prediction, said[start])


@pytest.mark.parametrize("silent", ["", " ", "\n", "\u200b"])
@pytest.mark.parametrize("golds", ["", ["", " "], "Paris", ["", "Paris"], []])
def test_silence_is_never_right(silent: str, golds: str | list[str]) -> None:
    assert not answer_match(silent, golds)


def test_a_word_is_lower_cased_as_a_whole() -> None:
    assert answer_match("ΟΔΟΣ", "οδος") and not answer_match("ΟΔΟΣ", "οδοσ")
