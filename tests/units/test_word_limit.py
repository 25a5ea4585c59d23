"""Words a text token needs, against a search over all hundredths; texts that it was learned from are not cut."""

from __future__ import annotations

import numpy as np
import pytest

from echox.units.word_limit import MARGIN, SPARE_WORDS, words_per_token


def searched(tokens: list[int], words: list[int]) -> float:
    """The smallest number of hundredths that is enough, tried one after the other."""
    hundredths = 0
    while True:
        hundredths += 1
        most = hundredths / 100 / MARGIN
        fitting = sum(said <= most * size + SPARE_WORDS + 1e-9 for size, said in zip(tokens, words, strict=True))
        left_out = len(tokens) - fitting
        mean = sum(words) / sum(tokens)
        if 1000 * left_out <= len(tokens) and most >= mean - 1e-12:
            return hundredths / 100


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("texts", [1, 2, 9, 300, 999, 1000, 2500])
def test_the_smallest_number_with_which_nearly_all_texts_fit(seed: int, texts: int) -> None:
    random = np.random.default_rng((seed, texts))
    tokens_N = random.integers(1, 40 + 60 * (seed % 3), texts)
    words_N = (tokens_N * random.lognormal(1.0, 0.2 + 0.3 * (seed % 2), texts)).astype(int) + random.integers(1, 20)
    learned = words_per_token(tokens_N, words_N)
    assert learned == searched(tokens_N.tolist(), words_N.tolist())
    cut = words_N > tokens_N * learned + SPARE_WORDS
    assert cut.sum() <= texts // 1000
    assert (tokens_N * learned + SPARE_WORDS).mean() > words_N.mean()


def test_one_text_in_a_thousand_that_is_not_of_its_recording_counts_for_nothing() -> None:
    tokens_N, words_N = np.full(2000, 20), np.full(2000, 80)
    usual = words_per_token(tokens_N, words_N)
    for mistakes, same in ((2, True), (3, False)):
        wrong_N = words_N.copy()
        wrong_N[:mistakes] = 500
        # Their words count in the mean, by a hundredth or so.
        assert (words_per_token(tokens_N, wrong_N) < usual + 0.1) is same


def test_short_texts_are_enough_to_learn_what_long_ones_need() -> None:
    tokens_N = np.arange(1, 9)
    learned = words_per_token(tokens_N, 3 * tokens_N + 2)
    assert 100 * learned + SPARE_WORDS > 3 * 100 + 2, "all of these fit into the spare words; a hundred tokens do not"


def test_a_text_of_one_token_does_not_set_the_pace_of_long_ones() -> None:
    tokens_N = np.array([1, *[50] * 99])
    assert words_per_token(tokens_N, np.array([30, *[150] * 99])) < 4


def test_no_text_is_no_number() -> None:
    with pytest.raises(ValueError, match="from no texts"):
        words_per_token(np.zeros(0), np.zeros(0))
