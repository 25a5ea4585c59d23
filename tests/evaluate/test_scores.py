"""Scores of a set against brute force and published intervals."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import binomtest

from echox.evaluate.scores import SpokenItem, by_relation, question_score, share, transcription_score, wilson


def item(text: str, heard: str = "", entity: str = "Ghana", **more: str | None) -> SpokenItem:
    return SpokenItem(
        id="x",
        question="?",
        question_audio=np.zeros(1, np.float32),
        golds=["Africa"],
        reference="Ghana is in Africa.",
        text=text,
        heard=heard,
        entity=[entity] if entity else [],
        **more,  # type: ignore[arg-type]
    )


def test_wilson_is_the_published_interval() -> None:
    for right, n in ((0, 5), (5, 5), (1, 10), (53, 60), (9, 36), (400, 1000)):
        expected = binomtest(right, n).proportion_ci(0.95, method="wilson")
        assert wilson(right, n) == pytest.approx([expected.low, expected.high], abs=1e-12)
    # Newcombe, Statistics in Medicine 17 (1998), table I: 81 of 263 and 15 of 148.
    assert wilson(81, 263) == pytest.approx([0.2553, 0.3662], abs=5e-5)
    assert wilson(15, 148) == pytest.approx([0.0624, 0.1605], abs=5e-5)
    assert wilson(0, 0) is None
    none, every = wilson(0, 150), wilson(150, 150)
    assert none is not None and none[0] == 0.0 and every is not None and every[1] == 1.0


def test_paired_retention_and_the_shares_by_brute_force() -> None:
    chance = random.Random(3)
    said = ("Ghana is in Africa.", "Timbabwe is in Africa", "Ghana is in Asia.", "no idea")
    for _ in range(20):
        items = [
            item(chance.choice(said), chance.choice(said), cascade_heard=chance.choice(said),
                 copy_heard=chance.choice((None, *said)))
            for _ in range(chance.randint(1, 12))
        ]  # fmt: skip
        right = [(i.text == said[0], i.heard == said[0], i.cascade_heard == said[0], i.copy_heard) for i in items]
        score = question_score(items)
        kept = [speech for text, speech, _, _ in right if text]
        copies = [copy == said[0] for *_, copy in right if copy is not None]
        assert score.retention_paired == (sum(kept) / len(kept) if kept else None)
        assert score.s2t_strict_acc == sum(text for text, *_ in right) / len(right)
        assert score.s2s_strict_acc == sum(speech for _, speech, *_ in right) / len(right)
        assert score.cascade_acc == sum(cascade for _, _, cascade, _ in right) / len(right)
        assert score.copy_acc == (sum(copies) / len(copies) if copies else None) and score.copy_n == len(copies)
        assert score.exact == sum(i.text == i.heard for i in items) / len(items)
        gold = [i.heard in said[:2] for i in items]
        assert score.s2s_acc == sum(gold) / len(gold)
        taught = score.cascade_acc
        assert score.retention_cascade == (score.s2s_strict_acc / taught if taught else None)
        assert score.interval_95 == wilson(sum(speech for _, speech, *_ in right), len(right))


def test_a_set_says_by_which_rule_it_was_judged() -> None:
    strict, loose = item("Ghana is in Africa.", "Togo is in Africa."), item("in Africa", "Togo is in Africa.", "")
    assert [each.speech_strict for each in (strict, loose)] == [False, True]
    for items, rule, known in (
        ([strict, strict], "entity and answer", 2),
        ([loose], "answer alone", 0),
        ([strict, loose], "entity and answer where there is one", 1),
    ):
        score = question_score(items, text_llm_acc=0.5)
        assert (score.strict_rule, score.entity_n, score.text_llm_acc) == (rule, known, 0.5)


def test_what_was_not_spoken_has_no_share() -> None:
    alone = item("Ghana is in Africa.", "Ghana is in Africa.")
    assert alone.cascade_strict is None and alone.copy_strict is None
    score = question_score([alone])
    assert (score.cascade_acc, score.copy_acc, score.copy_n, score.retention_cascade) == (None, None, 0, None)
    assert share([]) is None and share([None]) is None and share([True, None, False]) == 0.5


def test_items_without_a_relation_are_in_no_group() -> None:
    items = [item("Ghana is in Africa.", relation=relation) for relation in ("b", "", "a", "b")]
    assert {name: row["n"] for name, row in by_relation(items).items()} == {"a": 1, "b": 2}
    assert list(by_relation(items)) == ["a", "b"]


def test_transcripts_are_judged_against_the_reference_alone() -> None:
    score = transcription_score([item("Ghana is in Asia.", "whatever")])
    assert (score.n, score.wer, score.s2s_strict_acc, score.strict_rule) == (1, 0.25, None, None)


def test_a_copy_is_compared_with_the_reference_and_a_cascade_with_the_models_text() -> None:
    words = {"golds": ["Bras\u00edlia"], "entity": ["Brazil"]}
    copied = replace(item("no idea", copy_heard="brazil has brasilia", cascade_heard="no idea"), **words)  # type: ignore[arg-type]
    copied = replace(copied, reference="Brazil has Bras\u00edlia.")
    assert copied.copy_strict is True and copied.cascade_strict is False
    taught = replace(copied, text="Brazil has Bras\u00edlia!", cascade_heard="Brazil has Brasilia", reference="no idea")
    assert taught.copy_strict is False and taught.cascade_strict is True
