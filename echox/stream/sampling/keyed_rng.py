"""Draws keyed permutations and random numbers, the same on every machine, world size and thread count."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def key64(*path: int | str) -> int:
    """A 64-bit key of a path of numbers and words."""
    return int.from_bytes(_digest(path, 8), "little")


def raw(count: int, *path: int | str) -> NDArray[np.uint64]:
    """`count` random 64-bit numbers that depend on the path alone.

    Straight from the counter-based Philox generator: numpy promises its bits, not what its distributions make of them.
    """
    bits: NDArray[np.uint64] = np.random.Philox(key=int.from_bytes(_digest(path, 16), "little")).random_raw(count)
    return bits


def permutation(count: int, *path: int | str) -> NDArray[np.int64]:
    """A permutation of `count` places that depends on the path alone."""
    return np.argsort(raw(count, *path), kind="stable").astype(np.int64)


def uniform(count: int, *path: int | str) -> NDArray[np.float64]:
    """`count` numbers in [0, 1) that depend on the path alone."""
    return (raw(count, *path) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def mix64(*columns: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Row-wise 64-bit hash of columns of equal length (the finaliser of SplitMix64, chained)."""
    value = np.zeros(len(columns[0]), dtype=np.uint64)
    with np.errstate(over="ignore"):
        for column in columns:
            value = (value ^ column) + _GOLDEN
            value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            value = value ^ (value >> np.uint64(31))
    return value


def _digest(path: tuple[int | str, ...], size: int) -> bytes:
    return hashlib.blake2b("/".join(map(str, path)).encode(), digest_size=size).digest()
