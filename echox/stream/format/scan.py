"""Scans one shard to its rows of the catalogue: where each sample is, how long, what it says, and its hashes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import soundfile
from xxhash import xxh3_64_intdigest

from echox.audio.io import SAMPLE_RATE, header_seconds, read_audio
from echox.errors import DataError
from echox.files import parse_json
from echox.stream.format.speakers import answer_speaker
from echox.stream.format.tar_headers import LARGEST_SAMPLE, Spans, defect, mapped, walk

if TYPE_CHECKING:
    from numpy.typing import NDArray

JSON = "json"
AUDIO = "question.flac"
ENCODED = "question.encoded.npy"
"""What the frozen speech encoder makes of the question: float16 [frames, width], margin included."""
UNITS = "answer.units"
TURN_MEMBERS = tuple(f"turn-{number:02d}.flac" for number in range(100))
"""Sounds of earlier turns of the dialogue, by the number of the turn in `turns` of the `json` member."""

RECORD = np.dtype(
    [
        ("offset", "<u8"),
        ("size", "<u8"),
        ("checksum", "<u8"),
        ("text", "<u8"),
        ("first", "<u8"),
        ("key", "<u8"),
        ("shard", "<u4"),
        ("source", "<u4"),
        ("units", "<u4"),
        ("question_chars", "<u4"),
        ("answer_chars", "<u4"),
        ("question_s", "<f4"),
        ("answer_s", "<f4"),
        ("layout", "<u2"),
        ("turns", "<u2"),
    ]
)
"""One sample.

`offset`, `size`: its bytes in the shard, headers included. `checksum`: of its members but `json`, so that samples of
equal content have equal ones; `text`: the same of its question and answer text; both 0 where there is nothing. `first`:
its first row of the member table. `key`: where its name begins among the names. `source`, `layout`: numbers into the
catalogue's lists. `units`, `question_chars`, `answer_chars`, `question_s`, `answer_s`: lengths, 0 where absent.
"""

TASKS = ("", "asr", "sqa", "tts")
"""What a sample's own `task` may be; the catalogue holds its place here, 0 where there is none or another."""

MEMBER = np.dtype([("checksum", "<u8"), ("offset", "<u4"), ("size", "<u4")])
"""One file. `checksum`: XXH3-64 of its bytes. `offset`: from the start of its sample."""


@dataclass(frozen=True)
class ShardTable:
    """What the catalogue holds of one shard; numbers of shard, source, layout, member and name count from 0 here.

    Attributes:
        bytes, sha256: of the file.
        keys: sample names.
        records, members: rows, see `RECORD` and `MEMBER`; [N], [M].
        tasks: places in `TASKS`; [N].
        speakers: who speaks each answer: a place in `speaker_names`, counted from 1; 0 where nothing says it; [N].
        sources, layouts, speaker_names: what `source`, `layout` and `speakers` number.
        end: where the last sample ends.
    """

    bytes: int
    sha256: str
    keys: list[str]
    records: NDArray[Any]
    members: NDArray[Any]
    tasks: NDArray[np.uint8]
    speakers: NDArray[np.uint32]
    sources: list[str]
    layouts: list[tuple[str, ...]]
    speaker_names: list[str]
    end: int

    @property
    def starts(self) -> NDArray[np.uint64]:
        """First byte of each sample, then the end of the last: the content of `x.tar.idx`; [N + 1]."""
        return np.append(self.records["offset"], np.uint64(self.end)).astype("<u8")


def scan_shard(shard: Path, optional: Collection[str] = ()) -> ShardTable:
    """Walk, check and hash one shard.

    Args:
        shard: the tar.
        optional: extensions that a sample may lack; the others are the same in every sample.

    Raises:
        ShardDefect: see `walk`; also a sample without `json`, with members unlike its neighbours', with metadata that
            is not an object or has lengths that are not numbers, or larger than 4 GiB.
    """
    with mapped(shard) as data:
        return _table(memoryview(data), walk(data, shard), shard, frozenset(optional))


def member_rule(
    extensions: Collection[str], required: Collection[str] | None, optional: Collection[str]
) -> tuple[frozenset[str], str]:
    """Extensions that every sample must have, and how a sample with `extensions` breaks the rule ("" if it does not).

    All samples of a dataset have the same members, but for those declared optional; `json` is always there.
    """
    found = frozenset(extensions)
    must = found - frozenset(optional) | {JSON} if required is None else frozenset(required)
    if JSON not in found:
        return must, f"has no {JSON} member"
    for missing in sorted(must - found):
        return must, f"has no {missing} member, which the samples before it have"
    for extra in sorted(found - must - frozenset(optional)):
        return must, f"has a member {extra}, which the samples before it lack"
    return must, ""


def write_index(shard: Path, table: ShardTable) -> None:
    """Write `x.tar.idx` beside a shard: N + 1 little-endian u64, first byte of each sample and end of the last."""
    path = shard.with_name(f"{shard.name}.idx")
    scratch = path.with_name(f".{path.name}.part")
    try:
        scratch.write_bytes(table.starts.tobytes())
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def _table(view: memoryview, spans: Spans, shard: Path, optional: frozenset[str]) -> ShardTable:
    count = len(spans.keys)
    records = np.zeros(count, dtype=RECORD)
    members = np.zeros(len(spans.members.names), dtype=MEMBER)
    sizes = np.diff(spans.starts)
    if count and int(sizes.max()) > LARGEST_SAMPLE:
        worst = int(sizes.argmax())
        raise defect(shard, int(spans.starts[worst]), f"sample {spans.keys[worst]} is larger than 4 GiB")
    records["offset"], records["size"] = spans.starts[:-1], sizes
    records["first"] = spans.firsts[:-1]
    encoded = [len(key.encode()) for key in spans.keys]
    records["key"] = np.cumsum([0, *encoded])[:-1]
    members["offset"] = spans.members.data - np.repeat(spans.starts[:-1], np.diff(spans.firsts))
    members["size"] = spans.members.sizes
    members["checksum"] = [
        xxh3_64_intdigest(view[start : start + size])
        for start, size in zip(spans.members.data.tolist(), spans.members.sizes.tolist(), strict=True)
    ]
    tasks = np.zeros(count, dtype=np.uint8)
    speakers = np.zeros(count, dtype="<u4")
    sources: dict[str, int] = {}
    names: dict[str, int] = {}
    layouts: dict[tuple[str, ...], int] = {}
    required: frozenset[str] | None = None
    for number, (key, extensions, offset) in enumerate(
        zip(spans.keys, spans.extensions, spans.starts.tolist(), strict=False)
    ):
        if extensions not in layouts:
            required, broken = member_rule(extensions, required, optional)
            if broken:
                fix = "repair the sample, or declare the member optional" if JSON in extensions else "add it"
                raise defect(shard, offset, f"sample {key} {broken}", fix)
        first = int(spans.firsts[number])
        rows = {extension: first + place for place, extension in enumerate(extensions)}
        payload = {
            extension: view[int(spans.members.data[row]) :][: int(spans.members.sizes[row])]
            for extension, row in rows.items()
        }
        try:
            described = describe(payload)
        except ValueError as error:
            raise defect(shard, offset, f"sample {key}: {error}", "repair its json member") from error
        source, tasks[number] = described.pop("source"), TASKS.index(described.pop("task"))
        if speaker := described.pop("speaker"):
            speakers[number] = names.setdefault(speaker, len(names) + 1)
        record = records[number]
        record["source"] = sources.setdefault(source, len(sources))
        record["layout"] = layouts.setdefault(extensions, len(layouts))
        record["checksum"] = _content(extensions, members["checksum"][first : first + len(extensions)])
        for name, value in described.items():
            record[name] = value
    return ShardTable(
        bytes=len(view),
        sha256=hashlib.sha256(view).hexdigest(),
        keys=spans.keys,
        records=records,
        members=members,
        tasks=tasks,
        speakers=speakers,
        sources=list(sources),
        layouts=list(layouts),
        speaker_names=list(names),
        end=int(spans.starts[-1]),
    )


def _content(extensions: tuple[str, ...], checksums: NDArray[Any]) -> int:
    parts = [(name, int(value)) for name, value in zip(extensions, checksums, strict=True) if name != JSON]
    return xxh3_64_intdigest(repr(sorted(parts)).encode()) if parts else 0


def describe(members: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata of one sample as the catalogue has it: lengths, turns, hash of the texts, source, task, speaker.

    Durations that the metadata leaves out are those of the audio.

    Raises:
        ValueError: `json` holds no object, or lengths that are not numbers.
    """
    meta = decode_meta(members[JSON])
    question, answer = (_text(meta, name) for name in ("question_text", "answer_text"))
    turns = meta.get("turns")
    return {
        "question_s": _seconds(meta, members, "question"),
        "answer_s": _seconds(meta, members, "answer"),
        "question_chars": len(question),
        "answer_chars": len(answer),
        "units": len(members[UNITS]) // 2 if UNITS in members else 0,
        "turns": min(len(turns) if isinstance(turns, list) else turns if isinstance(turns, int) else 1, 65535),
        "text": xxh3_64_intdigest(f"{question}\0{answer}".encode()) if question or answer else 0,
        "source": str(meta.get("source") or ""),
        "task": meta["task"] if meta.get("task") in TASKS else "",
        "speaker": answer_speaker(meta),
    }


def decode_meta(member: bytes | memoryview) -> dict[str, Any]:
    """The object in a `json` member.

    Raises:
        ValueError: it holds something else.
    """
    try:
        meta = parse_json(bytes(member))
    except ValueError as error:
        raise ValueError(f"its json member cannot be read: {error}") from error
    if not isinstance(meta, dict):
        raise ValueError(f"its json member holds a {type(meta).__name__}, not an object")
    return meta


def _text(meta: Mapping[str, Any], name: str) -> str:
    value = meta.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"{name} is a {type(value).__name__}, not text")
    return value


def _seconds(meta: Mapping[str, Any], members: Mapping[str, Any], side: str) -> float:
    value = meta.get(f"{side}_s")
    if value is None:
        audio = next((data for name, data in members.items() if name == f"{side}.flac" or name == f"{side}.wav"), None)
        return 0.0 if audio is None else audio_seconds(audio)
    if not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise ValueError(f"{side}_s is {value!r}, not a length in seconds")
    return float(value)


def audio_seconds(audio: bytes | memoryview) -> float:
    """Length of an encoded clip by its header, decoded where that does not know it; 0 where it cannot be read.

    What is wrong with it, decoding will say in full.
    """
    try:
        seconds = header_seconds(audio)
        return len(read_audio(bytes(audio))) / SAMPLE_RATE if seconds is None else seconds
    except (soundfile.LibsndfileError, OSError, DataError):
        return 0.0


def check_optional(optional: Collection[str]) -> None:
    """Refuse a declaration that `json` is optional.

    Raises:
        DataError: it is among them.
    """
    if JSON in optional:
        raise DataError("The json member cannot be optional: it says what the sample is", fix="leave it out")
