"""How a unit language is fitted, against counting with dictionaries; nothing is counted across ends of sentences."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from echox.errors import DataError
from echox.units.language import OVERSAMPLE, UnitLanguage, _chunks, _recount

N_UNITS = 6
Word = tuple[int, ...]


def corpus(sequences: int = 40, seed: int = 0) -> list[list[int]]:
    random = np.random.default_rng(seed)
    pieces = [random.integers(0, N_UNITS, size).tolist() for size in (1, 2, 2, 3, 3, 4, 5)]
    return [
        [unit for place in random.integers(0, len(pieces), random.integers(1, 9)) for unit in pieces[place]]
        for _ in range(sequences)
    ]


def frequent(sentences: list[list[int]], max_word: int, most: int) -> dict[Word, int]:
    """The `most` repeated n-grams by count times length; of equals, the shorter and then the smaller first."""
    counts = Counter(
        tuple(sentence[start : start + size])
        for sentence in sentences
        for size in range(2, max_word + 1)
        for start in range(len(sentence) - size + 1)
    )
    found = sorted((word for word, count in counts.items() if count > 1), key=lambda word: (len(word), word))
    best = sorted(found, key=lambda word: -counts[word] * len(word))[:most]
    return {word: counts[word] for word in found if word in best}


def recounted(language: UnitLanguage, sentences: list[list[int]], keep: int, order: int) -> UnitLanguage:
    """Encode, keep the words that save most, count those and their pairs within each sentence."""
    cuts = [[language.words[word] for word in language.encode(sentence)] for sentence in sentences]
    counts = Counter(word for cut in cuts for word in cut)
    pairs = Counter(pair for cut in cuts for pair in zip(cut, cut[1:], strict=False))
    longer = language.words[language.n_units :]
    best = sorted(longer, key=lambda word: -counts[word] * (len(word) - 1))[:keep]
    kept = [*language.words[: language.n_units], *(word for word in longer if word in best and counts[word])]
    number = {word: index for index, word in enumerate(kept)}
    rows = [(number[a], number[b], count) for (a, b), count in pairs.items() if a in number and b in number]
    bigrams = np.array(sorted(rows) if order == 2 else [], dtype=np.int64).reshape(-1, 3)
    return UnitLanguage(
        language.n_units, kept[language.n_units :], np.array([counts[w] for w in kept]), bigrams, order,
        language.max_word,
    )  # fmt: skip


def fitted(sentences: list[list[int]], order: int, max_word: int, vocab: int, rounds: int) -> UnitLanguage:
    """The procedure that `UnitLanguage.fit` describes."""
    wanted = vocab - N_UNITS
    words = frequent(sentences, max_word, OVERSAMPLE * wanted)
    singles = Counter(unit for sentence in sentences for unit in sentence)
    counts = [singles[unit] for unit in range(N_UNITS)] + list(words.values())
    language = UnitLanguage(N_UNITS, list(words), np.array(counts), np.zeros((0, 3)), 1, max_word)
    for size in (len(words) // 2, len(words) // 4):
        language = recounted(language, sentences, max(wanted, size), 1)
    for _ in range(rounds):
        language = recounted(language, sentences, wanted, order)
    return language


@pytest.mark.parametrize(
    ("order", "max_word", "vocab", "rounds"),
    [(1, 4, 20, 2), (2, 4, 20, 2), (2, 3, 12, 1), (2, 5, 60, 3), (1, 1, 9, 1), (2, 4, N_UNITS, 1), (2, 4, 14, 0)],
)
def test_fitting_equals_counting_by_hand(order: int, max_word: int, vocab: int, rounds: int) -> None:
    sentences = corpus()
    sentences.insert(3, [])
    expected = fitted(sentences, order, max_word, vocab, rounds)
    found = UnitLanguage.fit(sentences, N_UNITS, order, max_word, vocab, rounds=rounds)
    assert found.words == expected.words
    assert found.counts.tolist() == expected.counts.tolist()
    assert sorted(map(tuple, found.bigrams.tolist())) == list(map(tuple, expected.bigrams.tolist()))
    assert (found.order, found.max_word) == (order if rounds else 1, max_word)
    if rounds:
        assert (len(found.bigrams) > 0) is (order == 2)
        assert found.size <= vocab


@pytest.mark.parametrize("keep", [0, 1, 2, 3, 5, 8, 13, 40])
@pytest.mark.parametrize("order", [1, 2])
def test_a_round_keeps_the_words_that_save_most_and_the_pairs_of_those(keep: int, order: int) -> None:
    """Longer words are rarer here, so that neither counts nor lengths alone rank them."""
    sentences = corpus(60, seed=4)
    arrays = [np.array(sentence) for sentence in sentences]
    words = frequent(sentences, 5, 40)
    counts = np.array([10] * N_UNITS + list(words.values()))
    language = UnitLanguage(N_UNITS, list(words), counts, np.zeros((0, 3)), 1, 5)
    found, expected = _recount(language, arrays, keep, order), recounted(language, sentences, keep, order)
    assert found.words == expected.words and found.counts.tolist() == expected.counts.tolist()
    assert sorted(map(tuple, found.bigrams.tolist())) == list(map(tuple, expected.bigrams.tolist()))


def test_no_pair_reaches_across_the_end_of_a_sentence() -> None:
    """Every sentence begins with unit 0 and ends with unit 1, which stand nowhere else."""
    middle = [[unit % 4 + 2 for unit in sentence] for sentence in corpus(60, seed=2)]
    language = UnitLanguage.fit([[0, *units, 1] for units in middle], N_UNITS, vocab_size=16)
    ends = [index for index, word in enumerate(language.words) if word[-1] == 1]
    starts = [index for index, word in enumerate(language.words) if word[0] == 0]
    assert sum(int(language.counts[index]) for index in ends) == 60
    assert not set(ends) & set(language.bigrams[:, 0].tolist())
    assert not set(starts) & set(language.bigrams[:, 1].tolist())
    assert int(language.bigrams[:, 2].sum()) == int(language.counts.sum()) - 60


def test_a_corpus_that_repeats_nothing_has_words_of_one_unit() -> None:
    language = UnitLanguage.fit([[0, 1, 2, 3, 4, 5], [0, 2, 4]], N_UNITS, vocab_size=20)
    assert language.words == [(unit,) for unit in range(N_UNITS)] and language.encode([3, 4, 5]) == [3, 4, 5]


def test_a_path_may_be_text_and_its_folder_is_made(tmp_path: Path) -> None:
    language = UnitLanguage.fit(corpus(5), N_UNITS, vocab_size=9)
    language.save(str(tmp_path / "new" / "language.json"))
    assert UnitLanguage.load(str(tmp_path / "new" / "language.json")).sha256 == language.sha256


def test_progress_goes_from_nothing_to_all() -> None:
    said: list[tuple[str, int, int]] = []
    UnitLanguage.fit(corpus(10), N_UNITS, vocab_size=9, rounds=1, progress=lambda *done: said.append(done))
    assert [(done, of) for _, done, of in said] == [(0, 3), (1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("wrong", [{"order": 0}, {"order": 3}, {"max_word": 0}, {"vocab_size": N_UNITS - 1}])
def test_a_language_that_cannot_be_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(DataError, match="cannot be made"):
        UnitLanguage.fit(corpus(3), N_UNITS, **{"vocab_size": 12, **wrong})
    for nothing in ([], [[], []]):
        with pytest.raises(DataError, match="No units"):
            UnitLanguage.fit(nothing, N_UNITS, vocab_size=12)


def test_units_below_zero_are_named_too() -> None:
    language = UnitLanguage.fit(corpus(5), N_UNITS, vocab_size=9)
    with pytest.raises(DataError, match="Unit -2 is outside 0 to 5"):
        language.encode([3, -2, 1])
    with pytest.raises(DataError, match="Unit 6 is outside 0 to 5"):
        language.encode([3, 6, 1])
    with pytest.raises(DataError, match="Unit word -1"):
        language.decode([0, -1])
    language.check(np.array([0, N_UNITS - 1]))
    language.check(np.array([], dtype=np.int64))


def test_chunks_hold_every_sentence_once_and_no_more_than_there_is_room_for() -> None:
    lengths = [5, 0, 2, 9, 2, 7, 0, 3, 3, 20, 1]
    for most in (1, 4, 10, 12, 40, 1000):
        groups = list(_chunks(lengths, most))
        assert sorted(index for group in groups for index in group) == [i for i, n in enumerate(lengths) if n]
        sizes = [len(group) * max(lengths[index] for index in group) for group in groups]
        assert all(size <= most or len(group) == 1 for size, group in zip(sizes, groups, strict=True))
        flat = [lengths[index] for group in groups for index in group]
        assert flat == sorted(flat), "sentences of like length go together"
        for group, following in zip(groups, groups[1:], strict=False):
            assert (len(group) + 1) * lengths[following[0]] > most, "a sentence that had room"
    assert list(_chunks([0, 0], 10)) == []


def test_encoding_in_many_chunks_is_encoding_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sentences = [*corpus(20, seed=5), [], [3]]
    language = UnitLanguage.fit(corpus(), N_UNITS, vocab_size=20)
    whole = [row.tolist() for row in language.encode_batch(sentences)]
    monkeypatch.setattr("echox.units.language._CHUNK_UNITS", 30)
    assert [row.tolist() for row in language.encode_batch(sentences)] == whole
    assert [language.decode(row) for row in whole] == sentences


def test_every_best_cut_of_every_short_sequence_is_found() -> None:
    """All sequences of up to five of three units, against all cuts; probabilities with their smoothing by hand."""
    words = [(0, 1), (1, 2), (0, 1, 2), (2, 2), (1, 1, 0)]
    counts = np.array([9, 4, 6, 8, 3, 7, 0, 2])
    bigrams = np.array([[0, 4, 5], [3, 2, 7], [4, 3, 2], [5, 0, 1], [2, 2, 9], [7, 1, 3]])
    language = UnitLanguage(3, words, counts, bigrams, 2, 3)
    all_words = language.words
    single = {word: (counts[index] + 0.5) / (counts.sum() + 4.0) for index, word in enumerate(all_words)}
    pairs = {(all_words[a], all_words[b]): count for a, b, count in bigrams.tolist()}

    def log_probability(cut: list[Word]) -> float:
        total = np.log(single[cut[0]])
        for before, word in zip(cut, cut[1:], strict=False):
            after = sum(count for (first, _), count in pairs.items() if first == before)
            total += np.log((pairs.get((before, word), 0) + 10.0 * single[word]) / (after + 10.0))
        return float(total)

    def cuts(units: Word) -> list[list[Word]]:
        if not units:
            return [[]]
        return [[units[:n], *rest] for n in (1, 2, 3) if units[:n] in single and len(units) >= n
                for rest in cuts(units[n:])]  # fmt: skip

    sequences = [tuple(np.unravel_index(number, (3,) * size)) for size in range(1, 6) for number in range(3**size)]
    sequences = [tuple(int(unit) for unit in units) for units in sequences]
    for units, found in zip(sequences, language.encode_batch(sequences), strict=True):
        best = max(map(log_probability, cuts(units)))
        cut = [all_words[word] for word in found.tolist()]
        assert [unit for word in cut for unit in word] == list(units)
        assert log_probability(cut) == pytest.approx(best, abs=1e-12)
        assert language.log_probability(found.tolist()) == pytest.approx(best, abs=1e-12)
    assert language.log_probability([]) == 0.0
