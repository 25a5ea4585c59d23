"""The unit language against brute force, and its losslessness."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from echox.errors import DataError
from echox.units.counting import KeyTable, merge_counts
from echox.units.identity import UnitSetIdentity
from echox.units.language import ADD_K, PRIOR_TOKENS, UnitLanguage

N_UNITS = 12


def corpus(seed: int = 0, sequences: int = 120) -> list[np.ndarray]:
    """Units that really come in words, without consecutive duplicates."""
    random = np.random.default_rng(seed)
    words = [random.integers(0, N_UNITS, random.integers(1, 5)) for _ in range(25)]
    made = []
    for _ in range(sequences):
        flat = np.concatenate([words[int(25 * random.random() ** 2)] for _ in range(random.integers(1, 20))])
        made.append(flat[np.concatenate([[True], flat[1:] != flat[:-1]])].astype(np.uint16))
    return made


@pytest.fixture(scope="module", params=[1, 2], ids=["1-gram", "2-gram"])
def language(request: pytest.FixtureRequest) -> UnitLanguage:
    return UnitLanguage.fit(corpus(), N_UNITS, order=request.param, max_word=4, vocab_size=60)


def cuts(language: UnitLanguage, units: tuple[int, ...]) -> Iterator[list[int]]:
    """Every way to cut a sequence into words, found without dynamic programming."""
    number = {word: index for index, word in enumerate(language.words)}
    for ends in itertools.product([False, True], repeat=max(0, len(units) - 1)):
        borders = [0, *(place + 1 for place, end in enumerate(ends) if end), len(units)]
        pieces = [units[start:end] for start, end in itertools.pairwise(borders)] if units else []
        if all(piece in number for piece in pieces):
            yield [number[piece] for piece in pieces]


def score(language: UnitLanguage, ids: list[int]) -> float:
    """The model's definition, straight from its counts."""
    total = language.counts.sum() + ADD_K * language.size
    single = [(count + ADD_K) / total for count in language.counts]
    pairs = {(first, second): count for first, second, count in language.bigrams.tolist()}
    result = 0.0
    for place, word in enumerate(ids):
        probability = single[word]
        if place and language.order == 2:
            before = ids[place - 1]
            seen = sum(count for (first, _), count in pairs.items() if first == before)
            probability = (pairs.get((before, word), 0) + PRIOR_TOKENS * probability) / (seen + PRIOR_TOKENS)
        result += math.log(probability)
    return result


def test_encode_is_as_good_as_brute_force(language: UnitLanguage) -> None:
    random = np.random.default_rng(1)
    known = np.concatenate(corpus()[:30])
    longer = 0
    for length in range(1, 11):
        for trial in range(4):
            start = int(random.integers(0, len(known) - length))
            units = random.integers(0, N_UNITS, length) if trial == 0 else known[start : start + length]
            found = language.encode(units)
            best = max(score(language, cut) for cut in cuts(language, tuple(units.tolist())))
            assert score(language, found) == pytest.approx(best, abs=1e-9)
            assert language.log_probability(found) == pytest.approx(best, abs=1e-9)
            longer += len(found) < length
    assert longer > 20, "words of several units are never used"


def test_probabilities_of_a_next_word_sum_to_one(language: UnitLanguage) -> None:
    for before in (0, language.size - 1):
        first = score(language, [before])
        total = sum(math.exp(score(language, [before, word]) - first) for word in range(language.size))
        assert total == pytest.approx(1.0)


def test_decode_undoes_encode_for_any_units(language: UnitLanguage) -> None:
    random = np.random.default_rng(3)
    sequences = [random.integers(0, N_UNITS, length) for length in (0, 1, 2, 3, 4, 5, 17, 200, 0, 33)] + corpus(4, 20)
    together = language.encode_batch(sequences)
    for units, words in zip(sequences, together, strict=True):
        assert language.decode(words) == units.tolist()
        assert words.tolist() == language.encode(units), "a sequence's cut depends on what it is batched with"


def test_every_single_unit_is_a_word_and_words_are_short(language: UnitLanguage) -> None:
    assert language.words[:N_UNITS] == [(unit,) for unit in range(N_UNITS)]
    assert all(2 <= len(word) <= 4 for word in language.words[N_UNITS:])
    assert len(set(language.words)) == language.size
    # Words that no cut uses are dropped.
    assert 50 < language.size <= 60


def test_words_shorten_the_corpus(language: UnitLanguage) -> None:
    held_out = corpus(seed=0, sequences=160)[120:]
    units = sum(map(len, held_out))
    assert units / sum(map(len, language.encode_batch(held_out))) > 1.8


def test_save_and_load_keep_every_cut(language: UnitLanguage, tmp_path: Path) -> None:
    language.save(tmp_path / "language.json")
    again = UnitLanguage.load(tmp_path / "language.json")
    sequences = corpus(5, 10)
    assert [row.tolist() for row in again.encode_batch(sequences)] == [
        row.tolist() for row in language.encode_batch(sequences)
    ]
    assert again.log_probability([0, 1, 2]) == language.log_probability([0, 1, 2])


def test_joined_tokens_split_into_units_again(language: UnitLanguage) -> None:
    units = corpus(6, 1)[0]
    text = "".join(language.token(word) for word in language.encode(units))
    bodies = text.replace("<|unit_", "").replace("|>", "")
    assert [int(unit) for unit in bodies.split("▁")[1:]] == units.tolist()


def test_a_unit_out_of_range_is_named(language: UnitLanguage) -> None:
    with pytest.raises(DataError, match=f"Unit {N_UNITS} is outside"):
        language.encode([0, N_UNITS])
    with pytest.raises(DataError, match=f"Unit word {language.size}"):
        language.decode([language.size])
    with pytest.raises(DataError, match="outside"):
        UnitLanguage.fit([[0, N_UNITS]], N_UNITS, vocab_size=20)


@pytest.mark.parametrize("content", ["", "[]", json.dumps({"version": 9}), '{"version": 1}'])
def test_a_damaged_file_is_one_sentence(tmp_path: Path, content: str) -> None:
    path = tmp_path / "language.json"
    path.write_text(content)
    with pytest.raises(DataError, match="Cannot read the unit language"):
        UnitLanguage.load(path)


def test_key_table_finds_what_a_dict_finds() -> None:
    random = np.random.default_rng(7)
    keys = np.unique(random.integers(0, 1 << 40, 3000))
    asked = np.concatenate([keys, random.integers(0, 1 << 40, 3000), np.array([0, 1, (1 << 62) - 1])])
    expected = {key: place for place, key in enumerate(keys.tolist())}
    values, found = KeyTable(keys, np.arange(len(keys))).get(asked)
    assert found.tolist() == [key in expected for key in asked.tolist()]
    assert values.tolist() == [expected.get(key, 0) for key in asked.tolist()]


def test_merged_counts_are_those_of_the_whole() -> None:
    keys, counts = merge_counts(np.array([1, 5]), np.array([2, 3]), np.array([0, 5, 9]), np.array([1, 4, 1]))
    assert (keys.tolist(), counts.tolist()) == ([0, 1, 5, 9], [1, 2, 7, 1])


def test_it_keeps_its_unit_set_and_its_hash_is_that_of_the_words(tmp_path: Path) -> None:
    unit_set = UnitSetIdentity(features="log_mel", clusters=N_UNITS, centroids="aa")
    fitted = UnitLanguage.fit(corpus(), N_UNITS, vocab_size=60, unit_set=unit_set)
    bare = UnitLanguage.fit(corpus(), N_UNITS, vocab_size=60)
    other = UnitLanguage.fit(corpus(1), N_UNITS, vocab_size=60, unit_set=unit_set)
    for language in (fitted, bare, other):
        language.save(tmp_path / "l.json")
        again = UnitLanguage.load(tmp_path / "l.json")
        assert again.unit_set == language.unit_set and again.sha256 == language.sha256
    assert fitted.sha256 == bare.sha256 != other.sha256
    assert str(fitted) == f"{fitted.sha256[:8]}, {fitted.size} words of {unit_set}"
    content = json.loads((tmp_path / "l.json").read_text())
    (tmp_path / "l.json").write_text(json.dumps({**content, "unit_set": {"features": 3}}))
    with pytest.raises(DataError, match="record of a unit set"):
        UnitLanguage.load(tmp_path / "l.json")
