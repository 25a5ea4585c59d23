"""Computes statistics of a dataset: hours, lengths, sources and duplicates from its catalogue, tokens from texts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from echox.stream.format.catalogue import Catalogue
from echox.stream.format.scan import JSON
from echox.stream.storage.store import ShardStore

if TYPE_CHECKING:
    from numpy.typing import NDArray

LENGTHS = {
    "question_s": "question, seconds",
    "answer_s": "answer, seconds",
    "question_chars": "question, characters",
    "answer_chars": "answer, characters",
    "units": "units",
    "turns": "turns",
}
_EXAMPLES = 5
_BATCH = 1024

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Length:
    """Distribution of one length over the samples that have it."""

    samples: int
    total: float
    mean: float
    min: float
    p5: float
    median: float
    p95: float
    max: float


@dataclass(frozen=True)
class Duplicates:
    """Samples that repeat an earlier one; `examples` are pairs of keys."""

    samples: int
    examples: list[tuple[str, str]]


@dataclass(frozen=True)
class Stats:
    """A dataset in numbers.

    Attributes:
        lengths: name, as in `LENGTHS`, to distribution; names that no sample has are left out.
        sources: name to samples, hours and units.
        same_content: by the bytes of all members but `json`; same_text: by question and answer text.
    """

    location: str
    fingerprint: str
    shards: int
    samples: int
    bytes: int
    hours: float
    lengths: dict[str, Length]
    sources: dict[str, dict[str, float]]
    same_content: Duplicates
    same_text: Duplicates

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


def dataset_stats(catalogue: Catalogue, extra: dict[str, NDArray[np.int64]] | None = None) -> Stats:
    """Work out the numbers.

    Args:
        catalogue: the dataset.
        extra: more lengths, such as counts of tokens; each [N].
    """
    records = catalogue.records
    columns = {name: records[name] for name in LENGTHS} | (extra or {})
    seconds = records["question_s"].astype(np.float64) + records["answer_s"]
    return Stats(
        location=catalogue.location,
        fingerprint=catalogue.fingerprint,
        shards=len(catalogue.shard_names),
        samples=catalogue.samples,
        bytes=int(catalogue.shard_bytes.sum()),
        hours=round(float(seconds.sum()) / 3600, 4),
        lengths={name: _length(values[values > 0]) for name, values in columns.items() if (values > 0).any()},
        sources=_sources(catalogue, seconds),
        same_content=_duplicates(catalogue, "checksum"),
        same_text=_duplicates(catalogue, "text"),
    )


def token_counts(catalogue: Catalogue, tokenizer: Path, progress: Progress) -> dict[str, NDArray[np.int64]]:
    """Tokens of the question and the answer text of each sample, without special tokens; each [N].

    Args:
        catalogue: the dataset; every `json` member is read.
        tokenizer: file `tokenizer.json`.
        progress: called with what is done, samples done and samples in all.
    """
    from tokenizers import Tokenizer

    encode = Tokenizer.from_file(str(tokenizer)).encode_batch_fast
    counts = {name: np.zeros(catalogue.samples, dtype=np.int64) for name in ("question_tokens", "answer_tokens")}
    store = ShardStore(catalogue)
    try:
        for start in range(0, catalogue.samples, _BATCH):
            numbers = range(start, min(start + _BATCH, catalogue.samples))
            metas = [store.read(number, {JSON}).meta for number in numbers]
            for name, column in counts.items():
                texts = [meta.get(name.replace("tokens", "text")) or "" for meta in metas]
                column[start : numbers.stop] = [len(row.ids) for row in encode(texts, add_special_tokens=False)]
            progress("tokens", numbers.stop, catalogue.samples)
    finally:
        store.close()
    return counts


def plot_lengths(catalogue: Catalogue, extra: dict[str, NDArray[np.int64]], path: Path) -> None:
    """Draw a histogram of every length that some sample has; the suffix of the file names its format."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    columns = {title: catalogue.records[name] for name, title in LENGTHS.items()}
    columns |= {name.replace("_", ", "): values for name, values in extra.items()}
    shown = {title: values[values > 0] for title, values in columns.items() if (values > 0).any()}
    rows = max(1, -(-len(shown) // 2))
    figure, axes = pyplot.subplots(rows, 2, figsize=(10, 2.8 * rows), layout="constrained", squeeze=False)
    for axis in axes.flat:
        axis.set_visible(False)
    for axis, (title, values) in zip(axes.flat, shown.items(), strict=False):
        axis.set_visible(True)
        axis.hist(values, bins=min(60, len(np.unique(values))), color="#4477aa")
        axis.axvline(float(np.median(values)), color="#cc3311", linewidth=1)
        axis.set(title=f"{title}: {len(values):,} samples, median {float(np.median(values)):.3g}", ylabel="samples")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _length(values: NDArray[Any]) -> Length:
    low, median, high = np.percentile(values, [5, 50, 95])
    numbers = values.sum(dtype=np.float64), values.mean(dtype=np.float64), values.min(), low, median, high, values.max()
    return Length(len(values), *(round(float(number), 3) for number in numbers))


def _sources(catalogue: Catalogue, seconds: NDArray[np.float64]) -> dict[str, dict[str, float]]:
    source, kinds = catalogue.records["source"], len(catalogue.sources)
    samples = np.bincount(source, minlength=kinds)
    hours = np.bincount(source, weights=seconds, minlength=kinds) / 3600
    units = np.bincount(source, weights=catalogue.records["units"], minlength=kinds)
    return {
        name or "(none named)": {"samples": int(n), "hours": round(float(h), 4), "units": int(u)}
        for name, n, h, u in zip(catalogue.sources, samples, hours, units, strict=True)
    }


def _duplicates(catalogue: Catalogue, column: str) -> Duplicates:
    """Samples whose hash an earlier one has; 0 stands for nothing to compare."""
    hashes = catalogue.records[column]
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    repeats = np.flatnonzero((ordered[1:] == ordered[:-1]) & (ordered[1:] != 0))
    examples = [
        (catalogue.key(int(order[position])), catalogue.key(int(order[position + 1])))
        for position in repeats[:_EXAMPLES].tolist()
    ]
    return Duplicates(len(repeats), examples)
