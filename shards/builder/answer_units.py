"""Extracts units of spoken answers in finished shards, `answer.flac` to `answer.units`, on a GPU where there is one."""

from __future__ import annotations

import shutil
import tarfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echox.audio.io import SAMPLE_RATE, read_audio
from echox.errors import DataError
from echox.files import sha256_file
from echox.stream.format.catalogue import DATASET_NAME, Catalogue
from echox.stream.format.scan import UNITS
from echox.units.identity import UnitPart, UnitSetIdentity, check_same_unit_set, read_unit_set, write_unit_set
from shards.builder.convert import count_members, is_kept, record_path, tar_path, write_sample, writing
from shards.builder.publish import add_shard, complete, finish_publishing, index, stage
from shards.builder.records import digest, read_json, write_json
from shards.builder.rewrite import read_shard
from shards.builder.workers import alone

if TYPE_CHECKING:
    from echox.units.extract import UnitExtractor

Progress = Callable[[str], None]

AUDIO = "answer.flac"
RECORD = "units.json"
"""What a pass over the shards has made, beside the record of the unit set."""
_KMEANS = "kmeans.npz"
_SHOW_EVERY_S = 2.0


def add_answer_units(
    folder: Path, units: Path, progress: Progress | None = None, *, keep_audio: bool = False, workers: int = 1
) -> dict[str, Any]:
    """Write `answer.units` and `answer.durations` into every sample with a spoken answer, and record the unit set.

    Interrupted, it goes on with the next shard when it is called again; the folder is replaced when all are done.

    Args:
        folder: shards with `answer.flac`.
        units: folder of `kmeans.npz`, as `echox units fit` writes it.
        progress: called with one line now and then; None is silent.
        keep_audio: leave `answer.flac` beside the units; it is a hundred times their size.
        workers: threads that decode audio.

    Returns:
        The content of `units.json`: {"identity", "features", "clusters", "answers", "units_per_s"}.

    Raises:
        DataError: no shards or no spoken answers there, units of another unit set, or the k-means cannot be read.
        MissingModelError: the feature model is not there.
    """
    from echox.units.extract import unit_set_of

    say: Progress = progress or (lambda line: None)
    finish_interrupted(folder)
    work = _work(folder)
    with alone(work):
        identity, unit_set = digest([_fingerprint(units), keep_audio]), unit_set_of(units)
        done: dict[str, Any] | None = read_json(folder / RECORD)
        if done is not None and done["identity"] == identity:
            write_unit_set(folder, unit_set)
            say(f"{folder.name}: already has these units")
            return done
        described = read_json(folder / DATASET_NAME)
        if described is None:
            raise DataError("There are no shards", where=str(folder), fix="Build the corpus first.")
        _check_units(folder, units, unit_set)
        return _Pass(folder, work, units, identity, unit_set, keep_audio, say).run(described, workers)


def record_published(folder: Path, unit_set: UnitSetIdentity) -> None:
    """Record the unit set of a corpus that comes with units, unless a pass has made its units here."""
    if not (folder / RECORD).is_file() and any(UNITS in layout for layout in Catalogue.open(folder).layouts):
        write_unit_set(folder, unit_set)


def _check_units(folder: Path, units: Path, unit_set: UnitSetIdentity) -> None:
    """Refuse to make units in shards that hold those of another set."""
    layouts = Catalogue.open(folder).layouts
    if not any(UNITS in layout for layout in layouts):
        return
    check_same_unit_set(
        [UnitPart(f"dataset {folder}", read_unit_set(folder)), UnitPart(f"k-means {units}", unit_set)],
        fix="Build the shards again without units (--replace) and then with these, or name another --out.",
    )
    kept = any(UNITS in layout and AUDIO not in layout for layout in layouts)
    if kept and any(AUDIO in layout for layout in layouts):
        raise DataError(
            f"Some samples have {AUDIO}, and others units without it, which would stay beside those made here",
            where=str(folder),
            fix="Build corpora with sound and corpora with units into folders of their own.",
        )


def finish_interrupted(folder: Path) -> None:
    """Put the shards with units in their place where a pass was killed in its last step."""
    if _work(folder).is_dir():
        with alone(_work(folder)):
            finish_publishing(_work(folder), folder)


def _work(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.units")


def _fingerprint(units: Path) -> str:
    path = units / _KMEANS
    if not path.is_file():
        raise DataError(f"There is no {_KMEANS}", where=str(units), fix="Make it with `echox units fit`.")
    return sha256_file(path)


class _Pass:
    """One pass over the shards of a folder."""

    def __init__(
        self,
        folder: Path,
        work: Path,
        units: Path,
        identity: str,
        unit_set: UnitSetIdentity,
        keep_audio: bool,
        say: Progress,
    ) -> None:
        self._folder, self._work, self._units = folder, work, units
        self._identity, self._unit_set, self._keep_audio, self._say = identity, unit_set, keep_audio, say
        self._loaded: UnitExtractor | None = None

    def run(self, described: dict[str, Any], workers: int) -> dict[str, Any]:
        """All shards, then the folder in the place of the old one."""
        start, shown, fresh, seen = time.monotonic(), 0.0, 0, 0
        records: list[dict[str, Any]] = []
        with ThreadPoolExecutor(workers) as threads:
            for number, shard in enumerate(described["shards"]):
                made_from = digest([self._identity, shard["sha256"]])
                record = read_json(record_path(self._work, number))
                if record is None or record["identity"] != made_from or not is_kept(self._work, number):
                    record = self._shard(number, self._folder / shard["name"], made_from, threads)
                    fresh += record["samples"]
                records.append(record)
                seen += record["samples"]
                now = time.monotonic()
                if now - shown < _SHOW_EVERY_S:
                    continue
                shown, rate = now, fresh / (now - start)
                left = f", {rate:.1f}/s, {(described['samples'] - seen) / rate:.0f} s left" if rate else ""
                self._say(f"{self._folder.name}: units of {seen:,} of {described['samples']:,} samples{left}")
        if not any(record["answers"] for record in records):
            shutil.rmtree(self._work)
            raise DataError(
                f"No sample has {AUDIO}, of which units could be made",
                where=str(self._folder),
                fix="Build the corpus for task tts, or with --keep-answer-audio, or leave --units away.",
            )
        return self._publish(described, records)

    def _shard(self, number: int, shard: Path, made_from: str, threads: ThreadPoolExecutor) -> dict[str, Any]:
        samples = list(read_shard(shard))
        recorded = [sample for sample in samples if AUDIO in sample]
        clips = list(threads.map(read_audio, (sample[AUDIO] for sample in recorded)))
        found = self._extractor().extract(clips) if clips else []
        for sample, (units, durations) in zip(recorded, found, strict=True):
            sample["answer.units"] = units.astype("<u2").tobytes()
            sample["answer.durations"] = durations.astype("<u2").tobytes()
            if not self._keep_audio:
                del sample[AUDIO]
        members: dict[str, int] = {}
        partial = tar_path(self._work, number).with_suffix(".part")
        with writing(self._work):
            with tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as tar:
                for sample in samples:
                    key = sample.pop("__key__")
                    count_members(members, sample)
                    write_sample(tar, key, sample)
            record = {
                "identity": made_from,
                "sha256": sha256_file(partial),
                "bytes": partial.stat().st_size,
                "samples": len(samples),
                "members": members,
                "answers": len(recorded),
                "units": sum(len(units) for units, _ in found),
                "audio_s": round(sum(map(len, clips)) / SAMPLE_RATE, 3),
            }
            partial.rename(tar_path(self._work, number))
            write_json(record_path(self._work, number), record)
        return record

    def _extractor(self) -> UnitExtractor:
        if self._loaded is None:
            from echox.units.extract import UnitExtractor

            self._loaded = UnitExtractor.load(self._units)
        return self._loaded

    def _publish(self, described: dict[str, Any], records: list[dict[str, Any]]) -> dict[str, Any]:
        ready = stage(self._work)
        for number, shard in enumerate(described["shards"]):
            add_shard(tar_path(self._work, number), ready / shard["name"])
        for path in self._folder.iterdir():
            if path.suffix in (".json", ".jsonl") and path.name != DATASET_NAME:
                shutil.copyfile(path, ready / path.name)
        index(ready, records, workers=1)
        extractor = self._extractor()
        answered_s = sum(record["audio_s"] for record in records)
        made = {
            "identity": self._identity,
            "features": asdict(extractor.features.config),
            "clusters": extractor.n_units,
            "answers": sum(record["answers"] for record in records),
            "units_per_s": round(sum(record["units"] for record in records) / answered_s, 2),
        }
        write_json(ready / RECORD, made)
        write_unit_set(ready, self._unit_set)
        complete(self._work, self._folder)
        self._say(f"{self._folder.name}: {made['answers']:,} answers, {made['units_per_s']} units a second")
        return made
