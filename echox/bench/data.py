"""Benchmarks the data layer against webdataset with soundfile, and against reading the same bytes from the page cache.

All numbers of one table come from one run, best of several repeats that take turns, so that what else a machine does
falls on all of them equally.
"""

from __future__ import annotations

import io
import re
import shutil
import tarfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import webdataset

from echox.audio.io import SAMPLE_RATE, encode_flac, read_audio
from echox.bench.table import Row
from echox.stream import cursor
from echox.stream.accounting import Accounts
from echox.stream.collate import Item
from echox.stream.format.catalogue import CATALOGUE_NAME, Catalogue
from echox.stream.format.indexing import CatalogueBuilder, index_folder
from echox.stream.format.scan import ShardTable, scan_shard
from echox.stream.format.tar_headers import walk
from echox.stream.format.writer import write_shards
from echox.stream.quarantine import Allowance
from echox.stream.reader import StreamReader
from echox.stream.sampling.batching import CostBudget, SampleBudget
from echox.stream.sampling.plan import Plan, StepAddress
from echox.stream.sampling.source import Source
from echox.stream.storage.store import ShardStore

Progress = Callable[[str, int, int], None]
QUESTION, UNITS = "question.flac", "answer.units"
_PER_SHARD = 100
_CLIPS = 40
"""Different recordings; they repeat, which reading cannot tell."""
_WALKED = 60_000
"""Headers of the tar that the walk is timed on."""
_LARGE_SHARD = 1000


@dataclass(frozen=True)
class DataBench:
    """What is measured on.

    Attributes:
        folder: an empty folder for the files.
        samples: of the dataset that is read and decoded.
        large: samples of the catalogue that is only opened.
        repeats: times that each measurement is taken.
    """

    folder: Path
    samples: int
    large: int
    repeats: int

    @cached_property
    def dataset(self) -> Path:
        """Shards of synthetic recordings of 2 to 12 seconds, their units and metadata; flac halves them, as speech."""
        choose = np.random.default_rng(0)
        clips = []
        for _ in range(_CLIPS):
            length = int(SAMPLE_RATE * choose.uniform(2, 12))
            envelope = np.repeat(choose.uniform(0, 1, length // 1600 + 1), 1600)[:length]
            clips.append(encode_flac((choose.standard_normal(length) * 0.03 * envelope).astype(np.float32)))

        def samples() -> Iterable[dict[str, object]]:
            for number in range(self.samples):
                clip = clips[number % _CLIPS]
                units = np.tile(np.arange(100, dtype="<u2"), 2).tobytes()
                meta = {"id": f"s{number}", "question_text": "what is it", "answer_text": "a sound", "question_s": 7.0}
                yield {"__key__": f"s{number:08d}", QUESTION: clip, UNITS: units, "json": meta}

        write_shards(self.folder / "set", samples(), _PER_SHARD)
        return self.folder / "set"

    @cached_property
    def shards(self) -> list[str]:
        """Paths of the shards."""
        return sorted(str(path) for path in self.dataset.glob("*.tar"))

    def best(self, runs: Sequence[Callable[[], object]], clock: Callable[[], float] = time.perf_counter) -> list[float]:
        """Seconds of each run, the best of the repeats; the runs take turns, after one round that does not count."""
        times = [[float("inf")] for _ in runs]
        for repeat in range(self.repeats + 1):
            for run, taken in zip(runs, times, strict=True):
                start = clock()
                run()
                if repeat:
                    taken.append(clock() - start)
        return [min(taken) for taken in times]


def measure_data(bench: DataBench, progress: Progress) -> list[Row]:
    """All rows of the table.

    Args:
        bench: what to measure on.
        progress: called with "bench", groups of rows done and groups in all.
    """
    rows: list[Row] = []
    for done, measure in enumerate(MEASURES):
        progress("bench", done, len(MEASURES))
        rows += measure(bench)
    progress("bench", len(MEASURES), len(MEASURES))
    return rows


def reading(bench: DataBench) -> list[Row]:
    """Bytes of samples without decoding: the physical limit, webdataset, and the store in random order."""
    store = ShardStore(Catalogue.open(bench.dataset))
    order = np.random.default_rng(1).permutation(bench.samples).tolist()
    raw, plain, ours = bench.best(
        [
            lambda: _read_all(bench.shards),
            lambda: _consume(webdataset.WebDataset(bench.shards, shardshuffle=False)),
            lambda: _consume(map(store.read, order)),
        ]
    )
    store.close()
    n = bench.samples
    return [
        Row("page cache, read in sequence", n / raw, "samples/s"),
        Row("webdataset, not decoded", n / plain, "samples/s", raw / plain, "page cache"),
        Row("store, random order, checksums verified", n / ours, "samples/s", plain / ours, "webdataset", "≥ 5 ×"),
        Row("store, the same", n / ours, "samples/s", raw / ours, "page cache"),
    ]


def decoding(bench: DataBench) -> list[Row]:
    """Samples with their audio decoded, a core and on two threads."""
    store = ShardStore(Catalogue.open(bench.dataset))
    order = np.random.default_rng(1).permutation(bench.samples).tolist()

    def plain() -> None:
        for sample in webdataset.WebDataset(bench.shards, shardshuffle=False):
            soundfile.read(io.BytesIO(sample[QUESTION]), dtype="float32")

    def decode(sample: int) -> None:
        read_audio(store.read(sample)[QUESTION])

    def threads() -> None:
        with ThreadPoolExecutor(2) as pool:
            _consume(pool.map(decode, order))

    def ours() -> None:
        _consume(map(decode, order))

    plain_cpu, ours_cpu = bench.best([plain, ours], time.process_time)
    one, two = bench.best([ours, threads])
    store.close()
    n = bench.samples
    return [
        Row("webdataset + soundfile", n / plain_cpu, "samples/CPU-s"),
        Row("store + read_audio", n / ours_cpu, "samples/CPU-s", plain_cpu / ours_cpu, "webdataset", "≥ 1.0 ×"),
        Row("store + read_audio, 2 threads", n / two, "samples/s", one / two, "1 thread", "≥ 1.7 ×"),
    ]


def first_sample(bench: DataBench) -> list[Row]:
    """From nothing open to the first sample."""

    def ours() -> None:
        store = ShardStore(Catalogue.open(bench.dataset))
        store.read(bench.samples // 2)
        store.close()

    plain_s, ours_s = bench.best([lambda: next(iter(webdataset.WebDataset(bench.shards, shardshuffle=False))), ours])
    return [
        Row("webdataset, first sample", plain_s * 1e3, "ms"),
        Row("catalogue and store, any sample first", ours_s * 1e3, "ms", ours_s / plain_s, "webdataset"),
    ]


def resuming(bench: DataBench) -> list[Row]:
    """From a checkpoint's record to the first micro-batch, near the start and near the end of an epoch."""
    source = Source(path="set", task="sqa", catalogue=Catalogue.open(bench.dataset))
    plan = Plan([source], seed=1, budget=SampleBudget(step=8, micro_batches=2), window_shards=1)
    windows = plan.order.windows(0) or 1
    addresses = [StepAddress(0, share * windows // 100, 0) for share in (5, 95)]
    saved = [cursor.record(plan, address, Accounts([source.name])) for address in addresses]

    def resume(record: cursor.StreamRecord) -> None:
        reader = StreamReader(
            plan, [ShardStore(source.catalogue)], _Bytes(), rank=0, world_size=1, threads=2, prefetch=2,
            allowance=Allowance(0, 0.0),
        )  # fmt: skip
        reader.start(step=0, run_folder=bench.folder, saved=record)
        reader.step(0)
        reader.close()

    def skip() -> None:
        _consume(islice(webdataset.WebDataset(bench.shards, shardshuffle=False), 95 * bench.samples // 100))

    skipped, early, late = bench.best([skip, lambda: resume(saved[0]), lambda: resume(saved[1])])
    return [
        Row("webdataset, skip to 95 % of an epoch", skipped * 1e3, "ms"),
        Row("resume at 5 % of an epoch", early * 1e3, "ms"),
        Row("resume at 95 % of an epoch", late * 1e3, "ms", late / early, "at 5 %", "< 50 ms"),
    ]


def large_catalogue(bench: DataBench) -> list[Row]:
    """Opening the catalogue of a large dataset, and what it takes."""
    folder = bench.folder / "large"
    folder.mkdir()
    table = _large_table(bench)
    with CatalogueBuilder(folder) as builder:
        for number in range(max(1, bench.large // len(table.keys))):
            name = f"shard-{number:06d}.tar"
            keys = [f"{number:06d}{key}" for key in table.keys]
            records = table.records.copy()
            records["key"] = np.cumsum([0, *map(len, keys[:-1])])
            builder.add(name, ShardTable(**{**vars(table), "keys": keys, "records": records}))
            with (folder / name).open("wb") as file:
                # A hole of the right size, as opening compares the sizes of the shards.
                file.truncate(table.bytes)
        samples = builder.finish()["samples"]
    (taken,) = bench.best([lambda: Catalogue.open(folder)])
    early, late = _planning(bench, folder)
    before = _private_bytes()
    catalogue = Catalogue.open(folder)
    total = float(catalogue.records["question_s"].sum())
    private = max(0, _private_bytes() - before)
    size = (folder / CATALOGUE_NAME).stat().st_size
    del catalogue
    shutil.rmtree(folder)
    assert total > 0
    title = f"catalogue of {samples / 1e6:g} M samples"
    return [
        Row(f"open the {title}", taken * 1e3, "ms", aim="< 100 ms a million"),
        Row("plan a window of 16 shards at 95 % of an epoch", late * 1e3, "ms", late / early, "the first window"),
        Row("catalogue on disk, mapped and shared", size / samples, "MB a million samples"),
        Row("private memory of an open one", private / samples, "MB a million samples"),
    ]


def _planning(bench: DataBench, folder: Path) -> list[float]:
    """Seconds to plan the first window of an epoch, and one at 95 %."""
    source = Source(path="large", task="sqa", catalogue=Catalogue.open(folder))
    plan = Plan([source], seed=1, budget=CostBudget(by="seconds", size=80.0, micro_batches=16))
    late = 95 * (plan.order.windows(0) or 1) // 100
    return bench.best([lambda: plan.window(0, 0), lambda: plan.window(0, late)])


def indexing(bench: DataBench) -> list[Row]:
    """Headers walked a second, alone and with everything that indexing does."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for number in range(_WALKED // 3):
            for extension in (QUESTION, UNITS, "json"):
                tar.addfile(tarfile.TarInfo(f"s{number:08d}.{extension}"))
    data = stream.getvalue()

    def standard_library() -> None:
        stream.seek(0)
        with tarfile.open(fileobj=stream) as tar:
            tar.getmembers()

    walked, listed = bench.best([lambda: walk(data, "x.tar"), standard_library])
    (built,) = bench.best([lambda: index_folder(bench.dataset)])
    headers, size = 3 * bench.samples, sum(Path(path).stat().st_size for path in bench.shards)
    return [
        Row("tarfile, headers listed", _WALKED / listed, "headers/s"),
        Row("index, headers walked", _WALKED / walked, "headers/s", listed / walked, "tarfile", "≥ 150,000"),
        Row("index, with all hashes and metadata, one process", headers / built, "headers/s"),
        Row("the same", size / built / 1e6, "MB/s"),
    ]


MEASURES: tuple[Callable[[DataBench], list[Row]], ...] = (
    reading,
    decoding,
    first_sample,
    resuming,
    large_catalogue,
    indexing,
)
"""Groups of rows, in the order of the table."""


class _Batch:
    account: Any = None


class _Bytes:
    """Members as they are, so that what is timed is the stream and not a decoder."""

    members = frozenset({QUESTION})

    def decode(self, item: Item) -> bytes:
        return item.sample[QUESTION]

    def join(self, rows: Sequence[bytes], step: int) -> _Batch:
        return _Batch()

    def blank(self, step: int) -> _Batch:
        return _Batch()


def _consume(samples: Iterable[object]) -> None:
    """Take each sample and let it go, as training does; kept, they would make every read pay for new memory."""
    for _ in samples:
        pass


def _read_all(paths: Sequence[str]) -> None:
    buffer = bytearray(1 << 20)
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def _large_table(bench: DataBench) -> ShardTable:
    """The rows of a shard of many small samples, to be repeated."""
    count = min(_LARGE_SHARD, bench.large)
    samples = (
        {"__key__": f"{number:06d}", QUESTION: b"", UNITS: b"", "json": {"question_s": 1 + number % 9}}
        for number in range(count)
    )
    write_shards(bench.folder / "one", samples, count)
    return scan_shard(bench.folder / "one" / "shard-000000.tar")


def _private_bytes() -> int:
    """Memory that no other process shares, written to by this one."""
    text = Path("/proc/self/smaps_rollup").read_text()
    found = re.search(r"Private_Dirty:\s+(\d+) kB", text)
    return int(found.group(1)) * 1024 if found else 0
