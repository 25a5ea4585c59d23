"""Normalisation, word error rate against a plain edit distance, and the answer rule."""

from __future__ import annotations

import random

import jiwer
import pytest

from echox.errors import DataError
from echox.evaluate.text import answer_match, strict_match, strictly_said, wer, word_edits


def edit_distance(reference: list[str], heard: list[str]) -> int:
    """Levenshtein distance by its recurrence."""
    row = list(range(len(heard) + 1))
    for i, want in enumerate(reference, 1):
        previous, row[0] = row[0], i
        for j, word in enumerate(heard, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (want != word))
    return row[-1]


def test_wer_is_edit_distance_over_reference_words() -> None:
    chance = random.Random(0)
    words = ["lima", "paris", "cat", "dog", "green", "house"]
    references = [" ".join(chance.choices(words, k=chance.randint(1, 9))) for _ in range(30)]
    heard = [" ".join(chance.choices(words, k=chance.randint(0, 9))) for _ in range(30)]
    errors = sum(edit_distance(r.split(), h.split()) for r, h in zip(references, heard, strict=True))
    assert wer(references, heard) == pytest.approx(errors / sum(len(r.split()) for r in references))


def test_wer_in_a_language_without_spaces_is_of_characters() -> None:
    """Five of six characters as they are, the last one another, and one more: 2 of 6. In words, all would be wrong."""
    assert wer(["利马是首都。"], ["利马是首府吗"], "zh") == pytest.approx(2 / 5)
    assert wer(["利马是首都。"], ["利马是首府吗"], "en") == 1.0
    assert wer(["น้ำตก"], ["น้ำตา"], "th") == pytest.approx(1 / 4)
    assert word_edits("利马是首都。", "利马是首府", "zh") == [("利 马 是 首", "利 马 是 首"), ("都", "府")]


def test_wer_in_other_languages_is_that_of_jiwer_on_texts_normalised_by_hand() -> None:
    references = ["Всё, что он сказал: «Да»!", "Что ж?"]
    heard = ["все что она сказала да", "Что ж."]
    by_hand = jiwer.wer(["все что он сказал да", "что ж"], ["все что она сказала да", "что ж"])
    assert wer(references, heard, "ru") == pytest.approx(by_hand) == pytest.approx(2 / 7)
    by_hand = jiwer.cer(["مرحبا يا صديقي"], ["مرحبا صديقي"])
    assert by_hand == pytest.approx(3 / 14)  # of characters, spaces too, as jiwer counts them
    assert wer(["مَرْحَبًا، يَا صَدِيقِي!"], ["مرحبا صديقي"], "ar") == pytest.approx(1 / 3)
    assert wer(["東京は高い。"], ["東京は安い"], "ja") == jiwer.cer("東京は高い", "東京は安い") == pytest.approx(1 / 5)


def test_wer_at_the_edges() -> None:
    assert wer(["Lima."], ["lima"]) == 0.0
    assert wer(["lima", ""], ["lima", "two words"]) == 2.0
    assert wer([], []) == wer([""], ["..."]) == 0.0
    assert wer([""], ["noise"]) == 1.0
    with pytest.raises(DataError, match="1 references"):
        wer(["a"], [])


@pytest.mark.parametrize(
    ("prediction", "golds", "expected"),
    [
        ("The capital of France is Paris.", "Paris", True),
        ("the capital is PARIS", ["paris"], True),
        ("It is Parisian.", "Paris", False),
        ("Buenos nice Aires", "Buenos Aires", False),
        ("It is Buenos Aires, in Argentina", ["Lima", "Buenos Aires"], True),
        ("Bras\u00edlia", "Brasi\u0301lia", True),
        ("Brasilia", "Bras\u00edlia", False),
        ("Port-au-Prince", "Port au Prince", False),
        ("It is Port-au-Prince.", "port-au-prince", True),
        ("Washington, D.C.!", "D.C.", True),
        ("the answer is 12", "1", False),
        ("anything", "", False),
        ("anything", ["", "   "], False),
        ("", "Paris", False),
        ("Paris", [], False),
        ("Lima", "Lima", True),
        ("no, Lima", ["Rome", "no , Lima"], True),
        ("Lima no", "Lima no yes", False),
        ("", "", False),
        ("a1 b", "a1", True),
        ("a 1", "a1", False),
        ("1a", ["a"], False),
        ("x\u0301y", "x", False),
        ("$5", "5", True),
        ("5$", "$", True),
        ("a\u200bb", "b", True),
        ("Столица Перу — Лима.", "лима", True),
        ("Столица Перу — Лима.", "лим", False),
        ("लीमा पेरू में है", "लीमा", True),
        ("लीमा पेरू में है", "लीम", False),
    ],
)
def test_answer_match(prediction: str, golds: str | list[str], expected: bool) -> None:
    assert answer_match(prediction, golds) is expected


@pytest.mark.parametrize(
    ("language", "prediction", "gold", "expected"),
    [
        ("zh", "秘鲁的首都是利马。", "利马", True),
        ("zh", "秘鲁的首都是利马。", "马利", False),
        ("th", "เมืองหลวงคือลิมา", "ลิมา", True),
        ("ja", "これはペルーです", "ペル", True),  # a mark of length is a letter of its own
        ("ja", "これはペルーです", "へルー", False),
        ("zh", "CPU是A", "cpu", True),
        ("zh", "CPU是A", "是 a", True),
    ],
)
def test_an_answer_is_found_in_a_sentence_without_spaces(
    language: str, prediction: str, gold: str, expected: bool
) -> None:
    assert answer_match(prediction, gold, language) is expected
    assert strict_match(prediction, gold, language=language) is expected
    assert strictly_said(prediction, prediction, gold, language=language) is expected
    assert not answer_match(prediction, gold), "the published rule, under which the sentence is one token"


@pytest.mark.parametrize(
    ("heard", "expected"),
    [
        ("Timbabwe is in Africa", False),  # the answer about another country
        ("Ghana is in Asia.", False),  # another answer about the country
        ("Ghana is in Africa.", True),
        ("ghana is in africa", True),
        ("In Africa lies Ghana", True),
        ("Ghanaian is in Africa", False),
        ("", False),
    ],
)
def test_speech_counts_with_entity_and_answer(heard: str, expected: bool) -> None:
    assert strictly_said(heard, "Ghana is in Africa.", ["Africa"], ["Ghana"]) is expected
    assert strict_match(heard, ["Africa"], ["Ghana"]) is expected
    assert strictly_said(heard, "I do not know.", ["Africa"], ["Ghana"]) is expected


def test_a_transcript_that_is_the_text_has_lost_nothing() -> None:
    text, golds, entity = "The capital of Brazil is Bras\u00edlia.", ["Bras\u00edlia"], "Brazil"
    heard = "the capital of brazil is brasilia"
    assert not strict_match(heard, golds, entity) and strictly_said(heard, text, golds, entity)
    assert not strictly_said("the capital of brazil was brasilia", text, golds, entity)
    # The same words, which were wrong in the text already.
    assert not strictly_said("Peru is in Africa", "Peru is in Africa.", ["Africa"], ["Ghana"])


def test_without_an_entity_the_answer_alone_counts_and_any_form_of_an_entity_does() -> None:
    assert strict_match("It is Paris.", "Paris") and strict_match("It is Paris.", ["Rome", "Paris"], [])
    forms = ["Ivory Coast", "Cote d'Ivoire"]
    assert strict_match("Ivory Coast is in Africa", "Africa", forms)
    assert strict_match("Cote d'Ivoire is in Africa", "Africa", forms)
    assert not strict_match("Ivory is in Africa", "Africa", forms)


def test_one_name_is_not_both_the_entity_and_the_answer() -> None:
    assert strict_match("The capital of Guatemala is Guatemala City.", "Guatemala City", "Guatemala")
    assert not strict_match("It is Guatemala City.", "Guatemala City", "Guatemala")
    assert not strict_match("The capital of Peru is Guatemala City.", "Guatemala City", "Guatemala")
    assert strict_match("Singapore is the capital of Singapore.", "Singapore", "Singapore")
    assert not strict_match("It is Singapore.", "Singapore", "Singapore")


def test_word_edits_are_as_few_as_the_edit_distance_and_lose_no_word() -> None:
    random_ = random.Random(5)
    for _ in range(200):
        wanted, heard = (random_.choices("abcd", k=random_.randrange(7)) for _ in range(2))
        edits = word_edits(" ".join(wanted), " ".join(heard))
        assert " ".join(word for word, _ in edits if word).split() == wanted
        assert " ".join(word for _, word in edits if word).split() == heard
        wrong = sum(max(len(one.split()), len(other.split())) for one, other in edits if one != other)
        assert wrong == edit_distance(wanted, heard), (wanted, heard, edits)
    assert word_edits("It's Lima.", "it is lima") == [("it is lima", "it is lima")]
    assert word_edits("", "...") == []
