"""Cuts speech units into words of at most K units (unit language), by dynamic programming under a 1- or 2-gram model.

Source: Unit Language (arXiv 2505.15333). A sequence of units u_1..u_n is cut into the words w_1..w_m, each of at most K
units, that maximise P(w_1..w_m). Probabilities are relative frequencies on a unit corpus; how they are smoothed and
which words are kept is not published, see `UnitLanguage.fit`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from echox.errors import DataError
from echox.files import read_json
from echox.units.counting import KeyTable, count_keys, merge_counts
from echox.units.identity import UnitSetIdentity

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Ints = NDArray[np.int64]
    Floats = NDArray[np.float64]
    Progress = Callable[[str, int, int], None]

VERSION = 1
MOST_UNITS = 1 << 16
"""Units are stored as 16-bit numbers."""
ADD_K = 0.5
"""Added to every word's count, so that no word has probability zero."""
PRIOR_TOKENS = 10.0
"""Weight of the 1-gram in the 2-gram: P(w|v) = (c(v,w) + 10 P(w)) / (c(v) + 10), a Dirichlet prior."""
OVERSAMPLE = 4
"""Candidate words counted as n-grams for each word kept in the end."""
_CHUNK_UNITS = 1 << 19


class UnitLanguage:
    """A vocabulary of unit words with the probabilities that decide how a sequence is cut.

    Word ids 0 to n_units - 1 are the single units, so that every sequence can be encoded.

    Args:
        n_units: number of units (k-means clusters).
        words: the words of two and more units, in id order.
        counts: occurrences of every word, single units first; [size].
        bigrams: (word, next word, occurrences) rows; [pairs, 3], empty for order 1.
        order: 1 or 2.
        max_word: most units a word may have.
        unit_set: which units; None where it is not known.
    """

    def __init__(
        self,
        n_units: int,
        words: Sequence[tuple[int, ...]],
        counts: Ints,
        bigrams: Ints,
        order: int,
        max_word: int,
        unit_set: UnitSetIdentity | None = None,
    ) -> None:
        self.n_units = n_units
        self.unit_set = unit_set
        self.words: list[tuple[int, ...]] = [(unit,) for unit in range(n_units)] + [tuple(word) for word in words]
        self.counts = np.asarray(counts, dtype=np.int64)
        self.bigrams = np.asarray(bigrams, dtype=np.int64).reshape(-1, 3)
        self.order = order
        self.max_word = max_word
        smoothed = self.counts + ADD_K
        self._unigram: Floats = np.log(smoothed / smoothed.sum())
        before = np.bincount(self.bigrams[:, 0], weights=self.bigrams[:, 2], minlength=self.size)
        self._back_off: Floats = np.log(PRIOR_TOKENS / (before + PRIOR_TOKENS))
        first, second, count = self.bigrams.T
        bigram = np.log((count + PRIOR_TOKENS * np.exp(self._unigram[second])) / (before[first] + PRIOR_TOKENS))
        self._bigram = KeyTable(first * self.size + second, bigram)
        self._build_trie()

    @property
    def size(self) -> int:
        """Number of words U, single units included."""
        return len(self.words)

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of all that decides how units are cut into words and which id a word has, the unit set aside."""
        return hashlib.sha256(json.dumps(self._content(), sort_keys=True).encode()).hexdigest()

    def __str__(self) -> str:
        of = "units that are not recorded" if self.unit_set is None else str(self.unit_set)
        return f"{self.sha256[:8]}, {self.size} words of {of}"

    def _build_trie(self) -> None:
        nodes: dict[tuple[int, ...], int] = {(unit,): unit for unit in range(self.n_units)}
        for word in self.words:
            for end in range(2, len(word) + 1):
                nodes.setdefault(word[:end], len(nodes))
        keys = [nodes[path[:-1]] * self.n_units + path[-1] for path in nodes if len(path) > 1]
        self._children = KeyTable(
            np.array(keys, dtype=np.int64), np.array([node for path, node in nodes.items() if len(path) > 1], np.int64)
        )
        self._word_of_node = np.full(len(nodes), -1, dtype=np.int64)
        for index, word in enumerate(self.words):
            self._word_of_node[nodes[word]] = index

    # Encoding ---------------------------------------------------------------------------------------------------

    def encode(self, units: Sequence[int] | NDArray[Any]) -> list[int]:
        """Word ids of the most probable cut of one sequence; `decode` gives the sequence back.

        Raises:
            DataError: a unit outside 0 .. n_units - 1.
        """
        return [int(word) for word in self.encode_batch([units])[0]]

    def encode_batch(self, sequences: Sequence[Sequence[int] | NDArray[Any]]) -> list[Ints]:
        """`encode` for many sequences at once: one vector operation per position, over all sequences of a chunk."""
        arrays = [np.asarray(sequence, dtype=np.int64) for sequence in sequences]
        for array in arrays:
            self.check(array)
        encoded: list[Ints] = [np.zeros(0, dtype=np.int64)] * len(arrays)
        for chunk in _chunks([len(array) for array in arrays], _CHUNK_UNITS):
            for index, words in zip(chunk, self._viterbi([arrays[index] for index in chunk]), strict=True):
                encoded[index] = words
        return encoded

    def check(self, units: NDArray[Any]) -> None:
        """Raise `DataError` for a unit outside 0 .. n_units - 1."""
        _check_range(units, self.n_units, "Use the unit language that was fitted together with these units.")

    def _candidates(self, units_BT: Ints, lengths_B: Ints) -> Ints:
        """Word that starts at each position with each length, -1 for none; [B, T, K]."""
        batch, time = units_BT.shape
        words_BTK = np.full((batch, time, self.max_word), -1, dtype=np.int64)
        row, start = np.nonzero(np.arange(time) < lengths_B[:, None])
        node = units_BT[row, start]
        for length in range(1, self.max_word + 1):
            if length > 1:
                inside = start + length <= lengths_B[row]
                row, start, node = row[inside], start[inside], node[inside]
                node, found = self._children.get(node * self.n_units + units_BT[row, start + length - 1])
                row, start, node = row[found], start[found], node[found]
            words_BTK[row, start, length - 1] = self._word_of_node[node]
        return words_BTK

    def _transition_scores(self, words_BTK: Ints) -> NDArray[np.float64]:
        """Log P(word starting at t of length k | word ending at t of length l); [T, B, L, K], -inf where impossible."""
        batch, time, longest = words_BTK.shape
        previous_TBL = np.full((time, batch, longest), -1, dtype=np.int64)
        for length in range(1, longest + 1):
            previous_TBL[length:, :, length - 1] = words_BTK[:, : max(0, time - length), length - 1].T
        next_TBK = words_BTK.transpose(1, 0, 2)
        scores = np.full((time, batch, longest, longest), -np.inf)
        # The first word of a sequence has no previous one; it takes the row of length 1.
        scores[0, :, 0] = np.where(next_TBK[0] >= 0, self._unigram[next_TBK[0]], -np.inf)
        at, row, last, now = np.nonzero((previous_TBL >= 0)[..., :, None] & (next_TBK >= 0)[..., None, :])
        word = next_TBK[at, row, now]
        value = self._unigram[word]
        if self.order == 2:
            previous = previous_TBL[at, row, last]
            seen_value, seen = self._bigram.get(previous * self.size + word)
            value = np.where(seen, seen_value, self._back_off[previous] + value)
        scores[at, row, last, now] = value
        return scores

    def _viterbi(self, sequences: Sequence[Ints]) -> list[Ints]:
        lengths_B = np.array([len(sequence) for sequence in sequences], dtype=np.int64)
        batch, time, longest = len(sequences), int(lengths_B.max(initial=0)), self.max_word
        if time == 0:
            return [np.zeros(0, dtype=np.int64) for _ in sequences]
        units_BT = np.zeros((batch, time), dtype=np.int64)
        for row, sequence in enumerate(sequences):
            units_BT[row, : len(sequence)] = sequence
        words_BTK = self._candidates(units_BT, lengths_B)
        scores = self._transition_scores(words_BTK)
        best = np.full((time + longest + 1, batch, longest), -np.inf)
        back = np.zeros((time + longest + 1, batch, longest), dtype=np.int8)
        best[0, :, 0] = 0.0
        for at in range(time):
            arriving = best[at][:, :, None] + scores[at]
            best_last = arriving.argmax(axis=1)
            reached = np.take_along_axis(arriving, best_last[:, None, :], axis=1)[:, 0]
            for now in range(longest):
                best[at + now + 1, :, now] = reached[:, now]
                back[at + now + 1, :, now] = best_last[:, now]
        return _trace_back(words_BTK, lengths_B, best, back)

    # Decoding ---------------------------------------------------------------------------------------------------

    def decode(self, ids: Sequence[int] | NDArray[Any]) -> list[int]:
        """Units of a sequence of word ids.

        Raises:
            DataError: an id outside 0 .. size - 1.
        """
        units: list[int] = []
        for index in np.asarray(ids, dtype=np.int64).tolist():
            if not 0 <= index < self.size:
                raise DataError(f"Unit word {index} is outside 0 to {self.size - 1}")
            units += self.words[index]
        return units

    def log_probability(self, ids: Sequence[int]) -> float:
        """Log probability of a cut, the quantity `encode` maximises."""
        if len(ids) == 0:
            return 0.0
        words = np.asarray(ids, dtype=np.int64)
        total = float(self._unigram[words[0]])
        if self.order == 1:
            return total + float(self._unigram[words[1:]].sum())
        value, seen = self._bigram.get(words[:-1] * self.size + words[1:])
        return total + float(np.where(seen, value, self._back_off[words[:-1]] + self._unigram[words[1:]]).sum())

    @property
    def separable(self) -> bool:
        """Whether each word has its units by itself, whatever stands beside it."""
        return True

    def token(self, index: int) -> str:
        """A word as text, with a mark before every unit: joined tokens can be split into units again."""
        return "<|unit_" + "".join(f"▁{unit}" for unit in self.words[index]) + "|>"

    # Fitting ----------------------------------------------------------------------------------------------------

    @classmethod
    def fit(
        cls,
        sequences: Sequence[Sequence[int] | NDArray[Any]],
        n_units: int,
        order: int = 2,
        max_word: int = 4,
        vocab_size: int = 7500,
        *,
        rounds: int = 2,
        unit_set: UnitSetIdentity | None = None,
        progress: Progress | None = None,
    ) -> UnitLanguage:
        """Find the words and their probabilities on a unit corpus.

        Candidates are the n-grams of 2 to `max_word` units that occur at least twice, `OVERSAMPLE` times as many as are
        kept, by count times length. Rounds of encode and recount under the 1-gram then halve them down to the size
        asked for, keeping those that save most units; `rounds` more rounds refine the probabilities, under the
        2-gram where `order` is 2.

        Args:
            sequences: unit sequences, consecutive duplicates removed.
            n_units: number of units; every one of them is a word.
            order: 1 or 2.
            max_word: most units a word may have (K).
            vocab_size: words wanted, single units included (U); fewer where the corpus has fewer repeated n-grams.
            rounds: encode-recount rounds after the vocabulary is final.
            unit_set: which units these are; None where it is not known.
            progress: called with (what, done, of).

        Raises:
            DataError: no sequences, a unit out of range, an order other than 1 or 2, a vocabulary smaller than n_units.
        """
        if order not in (1, 2) or max_word < 1 or vocab_size < n_units:
            raise DataError(
                f"A unit language of order {order}, {max_word} units a word and {vocab_size} words "
                f"over {n_units} units cannot be made",
                fix="Use order 1 or 2, at least 1 unit a word, and at least as many words as units.",
            )
        arrays = [np.asarray(sequence, dtype=np.int64) for sequence in sequences]
        if not any(len(array) for array in arrays):
            raise DataError("No units to fit a unit language on")
        for array in arrays:
            _check_range(array, n_units, "Say the number of clusters that they were made with.")
        wanted = vocab_size - n_units
        words, counts = _frequent_ngrams(arrays, n_units, max_word, OVERSAMPLE * wanted)
        language = cls(n_units, words, counts, np.zeros((0, 3), np.int64), 1, max_word)
        kept = len(words)
        steps = [max(wanted, kept >> shift) for shift in (1, 2)] + [wanted] * rounds
        for index, size in enumerate(steps):
            if progress is not None:
                progress("fit the unit language", index, len(steps))
            final = index >= 2
            language = _recount(language, arrays, size, order if final else 1)
        if progress is not None:
            progress("fit the unit language", len(steps), len(steps))
        language.unit_set = unit_set
        return language

    def _content(self) -> dict[str, Any]:
        return {
            "n_units": self.n_units,
            "order": self.order,
            "max_word": self.max_word,
            "words": self.words[self.n_units :],
            "counts": self.counts.tolist(),
            "bigrams": self.bigrams.tolist(),
        }

    def save(self, path: str | Path) -> None:
        """Write one JSON file."""
        content = {"version": VERSION, **self._content()}
        if self.unit_set is not None:
            content["unit_set"] = asdict(self.unit_set)
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, separators=(",", ":")) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> UnitLanguage:
        """Read what `save` wrote.

        Raises:
            DataError: no such file, or not a unit language.
        """
        try:
            content = read_json(Path(path))
            if content["version"] != VERSION:
                raise ValueError(f"version {content['version']}, not {VERSION}")
            if "bodies" in content:
                from echox.units.pieces import PieceLanguage

                return PieceLanguage.parse(content, str(path))
            _check_content(content)
            return cls(
                int(content["n_units"]),
                [tuple(word) for word in content["words"]],
                np.array(content["counts"], dtype=np.int64),
                np.array(content["bigrams"], dtype=np.int64),
                int(content["order"]),
                int(content["max_word"]),
                UnitSetIdentity.parse(content["unit_set"], str(path)) if "unit_set" in content else None,
            )
        except (OSError, ValueError, KeyError, TypeError, IndexError, OverflowError) as error:
            raise DataError(
                f"Cannot read the unit language: {type(error).__name__} {error}",
                where=str(path),
                fix="Make it with `echox unit-language fit`.",
            ) from error


def _check_range(units: NDArray[Any], n_units: int, fix: str) -> None:
    if units.size and (units.min() < 0 or units.max() >= n_units):
        bad = int(units.max() if units.max() >= n_units else units.min())
        raise DataError(f"Unit {bad} is outside 0 to {n_units - 1}", fix=fix)


def _check_content(content: Mapping[str, Any]) -> None:
    """Raise ValueError or TypeError for numbers that no fitted language has: the file may come from anywhere."""
    units, order, longest = (content[name] for name in ("n_units", "order", "max_word"))
    if not all(isinstance(value, int) for value in (units, order, longest)):
        raise TypeError("n_units, order and max_word are whole numbers")
    if not (0 < units <= MOST_UNITS and order in (1, 2) and 0 < longest <= MOST_UNITS):
        raise ValueError(f"{units} units, order {order}, words of {longest} units")
    size = units + len(content["words"])
    if any(not 1 < len(word) <= longest or not all(0 <= unit < units for unit in word) for word in content["words"]):
        raise ValueError(f"a word that is not of 2 to {longest} units below {units}")
    if len(content["counts"]) != size or min(content["counts"]) < 0:
        raise ValueError(f"counts that are not of {size} words")
    if any(not (0 <= one < size and 0 <= two < size and count >= 0) for one, two, count in content["bigrams"]):
        raise ValueError(f"pairs that are not of {size} words")


def _chunks(lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Groups of indices of similar length whose padded size is at most `most`; empty sequences are left out."""
    group: list[int] = []
    for index in np.argsort(np.asarray(lengths, dtype=np.int64), kind="stable").tolist():
        if lengths[index] == 0:
            continue
        if group and (len(group) + 1) * lengths[index] > most:
            yield group
            group = []
        group.append(index)
    if group:
        yield group


def _trace_back(words_BTK: Ints, lengths_B: Ints, best: Floats, back: NDArray[np.int8]) -> list[Ints]:
    rows = np.arange(len(lengths_B))
    at_B = lengths_B.copy()
    last_B = best[at_B, rows].argmax(axis=1)
    columns: list[Ints] = []
    while (at_B > 0).any():
        start_B = np.maximum(at_B - last_B - 1, 0)
        columns.append(np.where(at_B > 0, words_BTK[rows, start_B, last_B], -1))
        last_B, at_B = back[at_B, rows, last_B].astype(np.int64), start_B
    reversed_BM = np.stack(columns[::-1], axis=1)
    return [row[row >= 0] for row in reversed_BM]


def _frequent_ngrams(
    arrays: Sequence[Ints], n_units: int, max_word: int, most: int
) -> tuple[list[tuple[int, ...]], Ints]:
    """The `most` n-grams of 2 units and more by count times length, and the counts of all words, singles first."""
    flat = np.concatenate(arrays)
    ends = np.cumsum([len(array) for array in arrays])
    remaining = np.repeat(ends, [len(array) for array in arrays]) - np.arange(len(flat))
    singles = np.bincount(flat, minlength=n_units)
    if len(singles) > n_units:
        raise DataError(f"Unit {len(singles) - 1} is outside 0 to {n_units - 1}")
    # A prefix is a node, a node with one more unit a child: keys never outgrow 64 bits whatever K is.
    node = flat.copy()
    alive = np.arange(len(flat))
    paths: list[tuple[int, ...]] = [(unit,) for unit in range(n_units)]
    found: list[tuple[int, ...]] = []
    counts: list[int] = []
    for length in range(2, max_word + 1):
        inside = remaining[alive] >= length
        alive, node = alive[inside], node[inside]
        keys, totals = count_keys(node * n_units + flat[alive + length - 1])
        common = totals >= 2
        keys, totals = keys[common], totals[common]
        if len(keys) == 0:
            break
        numbers = np.arange(len(keys)) + len(paths)
        paths += [(*paths[key // n_units], key % n_units) for key in keys.tolist()]
        found += paths[numbers[0] :]
        counts += totals.tolist()
        node, known = KeyTable(keys, numbers).get(node * n_units + flat[alive + length - 1])
        alive, node = alive[known], node[known]
    total = np.array(counts, dtype=np.int64)
    lengths = np.array([len(path) for path in found], dtype=np.int64)
    chosen = np.sort(np.argsort(-total * lengths, kind="stable")[:most])
    return [found[index] for index in chosen], np.concatenate([singles, total[chosen]])


def _recount(language: UnitLanguage, arrays: Sequence[Ints], keep: int, order: int) -> UnitLanguage:
    """Encode the corpus, keep the `keep` words that save most units, count again."""
    size = language.size
    counts = np.zeros(size, dtype=np.int64)
    keys = np.zeros(0, dtype=np.int64)
    totals = np.zeros(0, dtype=np.int64)
    for chunk in _chunks([len(array) for array in arrays], 1 << 22):
        encoded = language.encode_batch([arrays[index] for index in chunk])
        flat = np.concatenate(encoded)
        counts += np.bincount(flat, minlength=size)
        pairs = flat[:-1] * size + flat[1:]
        within = np.ones(len(pairs), dtype=bool)
        within[np.cumsum([len(words) for words in encoded])[:-1] - 1] = False
        keys, totals = merge_counts(keys, totals, *count_keys(pairs[within]))
    lengths = np.array([len(word) for word in language.words[language.n_units :]], dtype=np.int64)
    saved = counts[language.n_units :] * (lengths - 1)
    chosen = np.sort(np.argsort(-saved, kind="stable")[:keep])
    chosen = chosen[saved[chosen] > 0] if len(chosen) else chosen
    kept = np.concatenate([np.arange(language.n_units), language.n_units + chosen])
    number = np.full(size, -1, dtype=np.int64)
    number[kept] = np.arange(len(kept))
    pairs_P3 = np.stack([number[keys // size], number[keys % size], totals], axis=1)
    pairs_P3 = pairs_P3[(pairs_P3[:, :2] >= 0).all(axis=1)] if order == 2 else pairs_P3[:0]
    words = [language.words[index] for index in kept[language.n_units :]]
    return UnitLanguage(language.n_units, words, counts[kept], pairs_P3, order, language.max_word)
