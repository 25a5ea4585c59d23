"""Keyed randomness against known answers: another value on some machine would be another stream there."""

from __future__ import annotations

import hashlib
from fractions import Fraction

import numpy as np

from echox.stream.sampling.keyed_rng import key64, mix64, permutation, raw, uniform


def column(*values: int) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    return np.array(values, dtype=np.uint64)


def test_mix64_of_one_column_is_the_published_splitmix64() -> None:
    assert mix64(column(0, 1234567)).tolist() == [0xE220A8397B1DCDAF, 6457827717110365317]


def test_mix64_chains_columns_like_one_number_at_a_time() -> None:
    def splitmix(state: int) -> int:
        mask = (1 << 64) - 1
        value = (state + 0x9E3779B97F4A7C15) & mask
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
        return value ^ (value >> 31)

    numbers = np.random.default_rng(0).integers(0, 2**64, (3, 200), dtype=np.uint64)
    expected = [splitmix(splitmix(splitmix(a) ^ b) ^ c) for a, b, c in numbers.T.tolist()]
    assert mix64(*numbers).tolist() == expected


def test_a_key_is_a_hash_of_its_path() -> None:
    assert key64(3, "shards", 1) == int.from_bytes(hashlib.blake2b(b"3/shards/1", digest_size=8).digest(), "little")


def test_values_are_the_same_everywhere() -> None:
    assert raw(2, 7, "shards", 0).tolist() == [17045757670228934863, 15345364352231562079]
    assert permutation(10, 7, "shards", 0).tolist() == [3, 9, 4, 7, 6, 5, 1, 2, 8, 0]
    assert [f"{value:.6f}" for value in uniform(3, 7, "jitter")] == ["0.437287", "0.695221", "0.813983"]


def test_uniform_is_the_upper_53_bits_exactly() -> None:
    exact = [Fraction(number >> 11, 2**53) for number in raw(500, 1).tolist()]
    values = uniform(500, 1).tolist()
    assert [Fraction(value) for value in values] == exact
    assert 0 <= min(values) < 0.05 and 0.95 < max(values) < 1


def test_a_permutation_holds_every_place_once() -> None:
    for count in (0, 1, 2, 3, 100):
        assert sorted(permutation(count, 5, "samples").tolist()) == list(range(count))


def test_every_part_of_the_path_makes_another_order() -> None:
    paths = [(seed, word, epoch) for seed in (0, 1) for word in ("shards", "samples") for epoch in (0, 1, 10)]
    assert len({tuple(permutation(20, *path).tolist()) for path in paths}) == len(paths)


def test_every_place_is_as_likely_to_come_first() -> None:
    firsts = np.bincount([permutation(5, seed)[0] for seed in range(2000)], minlength=5)
    assert np.all(np.abs(firsts - 400) < 4 * np.sqrt(2000 * 0.2 * 0.8))
