"""Verifies a dataset in full: every header, checksum, recording, unit sequence and metadata of every sample."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from xxhash import xxh3_64_intdigest

from echox.audio.io import SAMPLE_RATE, read_audio
from echox.errors import DataError
from echox.stream.format.catalogue import Catalogue
from echox.stream.format.indexing import earlier_optional, find_shards
from echox.stream.format.scan import JSON, decode_meta, describe, member_rule
from echox.stream.format.tar_headers import ShardDefect, Spans, mapped, walk

AUDIO = (".flac", ".wav", ".ogg", ".mp3", ".opus")
_TEXTS = {"asr": {"question_text"}, "sqa": {"question_text", "answer_text"}, "tts": {"answer_text"}}
_TOLERANCE_S = 0.05
"""Most that a length in the metadata may differ from the audio's."""

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Defect:
    """Something wrong in a dataset.

    Attributes:
        shard: the tar; empty for the dataset as a whole.
        byte: where in it; -1 for the whole file.
        sample: name of the sample, where one can be named.
        reason: what is wrong.
    """

    shard: str
    byte: int
    sample: str
    reason: str

    def __str__(self) -> str:
        place = ", ".join(
            part
            for part in (
                self.shard,
                f"byte {self.byte}" if self.byte >= 0 else "",
                self.sample and f"sample {self.sample}",
            )
            if part
        )
        return f"{place}: {self.reason}" if place else self.reason


@dataclass(frozen=True)
class Verdict:
    """Outcome of one shard: samples looked at and what was found."""

    samples: int
    defects: list[Defect]


def check_folder(folder: Path, *, workers: int = 1, progress: Progress | None = None) -> Iterator[Verdict]:
    """Check a dataset shard by shard; the first verdict is that of its catalogue.

    Args:
        folder: shards and their index.
        workers: processes; 1 works in this one.
        progress: called with "check", shards done and shards in all.

    Raises:
        DataError: there are no shards at all.
    """
    shards = find_shards(folder)
    catalogue, faults = _catalogue(folder)
    listed = list(catalogue.shard_names) if catalogue is not None else []
    if catalogue is not None:
        extra = sorted({shard.name for shard in shards} - set(listed))
        faults += [Defect(name, -1, "", "the shard is not in the catalogue") for name in extra]
    yield Verdict(0, faults)
    check = partial(check_shard, indexed=catalogue is not None, optional=earlier_optional(folder))
    for done, verdict in enumerate(_each(check, shards, workers), 1):
        if progress:
            progress("check", done, len(shards))
        yield verdict


def _each(check: Callable[[Path], Verdict], shards: list[Path], workers: int) -> Iterator[Verdict]:
    if min(workers, len(shards)) < 2:
        yield from map(check, shards)
        return
    with ProcessPoolExecutor(min(workers, len(shards)), mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(check, shards)


def _catalogue(folder: Path) -> tuple[Catalogue | None, list[Defect]]:
    try:
        catalogue = Catalogue.open(folder)
        catalogue.verify()
    except DataError as error:
        return None, [Defect("", -1, "", f"{error.what}; {error.fix}")]
    return catalogue, []


def check_shard(shard: Path, *, indexed: bool, optional: tuple[str, ...] = ()) -> Verdict:
    """Check one shard: its structure, and where that is sound every sample.

    Args:
        shard: the tar.
        indexed: whether its folder has a sound catalogue to compare with.
        optional: members that a sample may lack.
    """
    try:
        with mapped(shard) as data:
            view, spans = memoryview(data), walk(data, shard)
            defects = _index_defects(shard, spans)
            recorded = _recorded(shard) if indexed else {}
            required: frozenset[str] | None = None
            for number, (key, extensions) in enumerate(zip(spans.keys, spans.extensions, strict=True)):
                found: list[str] = []
                before = required
                required, broken = member_rule(extensions, required, optional)
                if broken:
                    found.append(broken)
                    required = before if JSON in extensions else required
                rows = range(int(spans.firsts[number]), int(spans.firsts[number + 1]))
                places = [(int(spans.members.data[row]), int(spans.members.sizes[row])) for row in rows]
                members = {name: view[at : at + size] for name, (at, size) in zip(extensions, places, strict=True)}
                found += _sample_defects(members, recorded.get(key, {} if not indexed else None))
                defects += [Defect(shard.name, int(spans.starts[number]), key, reason) for reason in found]
    except ShardDefect as error:
        name, _, reason = error.what.partition(": ")
        return Verdict(0, [Defect(shard.name, int(name.rpartition(" ")[2]), "", reason)])
    except DataError as error:
        return Verdict(0, [Defect(shard.name, -1, "", error.what)])
    return Verdict(len(spans.keys), defects)


def _recorded(shard: Path) -> dict[str, dict[str, int]]:
    """What the catalogue says of a shard: key to extension to checksum."""
    catalogue = Catalogue.open(shard.parent)
    if shard.name not in catalogue.shard_names:
        return {}
    number = catalogue.shard_names.index(shard.name)
    samples = range(int(catalogue.shard_starts[number]), int(catalogue.shard_starts[number + 1]))
    return {
        catalogue.key(sample): {name: checksum for name, (*_, checksum) in catalogue.member_spans(sample).items()}
        for sample in samples
    }


def _index_defects(shard: Path, spans: Spans) -> list[Defect]:
    path = shard.with_name(f"{shard.name}.idx")
    try:
        found = np.fromfile(path, dtype="<u8")
    except OSError:
        return [Defect(shard.name, -1, "", f"{path.name} is missing; run `echox shards index {shard.parent}`")]
    if found.tolist() != spans.starts.tolist():
        return [Defect(shard.name, -1, "", f"{path.name} does not fit the shard")]
    return []


def _sample_defects(members: Mapping[str, memoryview], recorded: Mapping[str, int] | None) -> Iterator[str]:
    if recorded is None:
        yield "it is not in the catalogue"
    elif recorded:
        for name, content in members.items():
            if recorded.get(name) != xxh3_64_intdigest(content):
                yield f"member {name} has changed since it was indexed"
    meta: dict[str, Any] = {}
    if JSON in members:
        try:
            describe(members)
            meta = decode_meta(members[JSON])
        except ValueError as error:
            yield str(error)
        else:
            if not isinstance(meta.get("id"), str) or not meta["id"]:
                yield "its json member has no id"
            yield from _text_defects(meta)
    for name, content in members.items():
        if name.endswith(AUDIO):
            yield from _audio_defects(name, content, meta)
        elif name.endswith(".units"):
            yield from _unit_defects(name, content, members)


def _text_defects(meta: Mapping[str, Any]) -> Iterator[str]:
    said = {name for name in ("question_text", "answer_text") if str(meta.get(name) or "").strip()}
    task = str(meta.get("task") or "")
    missing = sorted(_TEXTS.get(task, set()) - said)
    if missing:
        yield f"its json member has no {' and no '.join(missing)}, which task {task} needs"
    elif not said:
        yield "its json member has no question_text and no answer_text"


def _audio_defects(name: str, content: memoryview, meta: Mapping[str, Any]) -> Iterator[str]:
    try:
        seconds = len(read_audio(bytes(content))) / SAMPLE_RATE
    except DataError as error:
        yield f"member {name}: {error.what}"
        return
    said = meta.get(f"{name.partition('.')[0]}_s")
    if isinstance(said, int | float) and abs(said - seconds) > _TOLERANCE_S:
        yield f"member {name} lasts {seconds:.2f} s where its json member says {said:.2f} s"


def _unit_defects(name: str, content: memoryview, members: Mapping[str, memoryview]) -> Iterator[str]:
    if len(content) % 2:
        yield f"member {name} has {len(content)} bytes, which are no 16-bit numbers"
        return
    units = np.frombuffer(content, dtype="<u2")
    if (units[1:] == units[:-1]).any():
        yield f"member {name} repeats a unit at once; consecutive duplicates belong removed"
    durations = members.get(name.removesuffix("units") + "durations")
    if durations is not None and len(durations) != len(content):
        yield f"member {name} has {len(units)} units but {len(durations) // 2} durations"
