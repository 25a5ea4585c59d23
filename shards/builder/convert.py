"""Converts utterances of a corpus to a shard and its record; runs in worker processes, so it imports little."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import soundfile

from echox.audio.containers import is_bare_flac, is_cut
from echox.audio.io import LONGEST_S, SAMPLE_RATE, encode_flac, header_seconds, read_audio, read_span, sayable
from echox.errors import DataError, EchoXError
from echox.files import sha256_file
from echox.stream.format.scan import TURN_MEMBERS
from shards.builder.records import digest, read_json, write_json
from shards.corpus import Audio, FileAudio, Utterance

if TYPE_CHECKING:
    from numpy.typing import NDArray

SHORTEST_S = 0.1
"""Shorter audio holds no word."""
MOST_CHARACTERS = 50_000
"""Of a text."""
SILENT, FULL_SCALE = 1e-4, 8.0
"""Peaks below which nothing is heard, and above which a file of floats holds whole numbers."""
CLIPPED = 0.005
"""Share of samples at full scale above which a recording is noted as clipped."""
_VERSION = 2
"""Of what is done here: another one makes all shards again."""
_NOT_A_FILE = (errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL, errno.ENOTDIR, errno.ENXIO, errno.ENODEV)
"""What the system says of a name that no recording has."""
_KEY_CHARACTERS = 80
"""A tar header has room for 100, and extensions follow."""


class Rejected(Exception):
    """An utterance that cannot become a sample, and why."""


@dataclass(frozen=True)
class Job:
    """What a shard is made from.

    Attributes:
        number: of the shard, from 0.
        root: where the corpus lies.
        longest_s: longest audio in seconds.
        keyed: key and utterance of each sample to be.
        answer_rate: samples a second of spoken answers.
    """

    number: int
    root: Path
    longest_s: float
    keyed: Sequence[tuple[str, Utterance]]
    answer_rate: int = SAMPLE_RATE

    def digest(self) -> str:
        """Hash over all that decides the shard's bytes, save the audio files' own: where the corpus lies does not."""

        def relative(path: Path) -> str:
            return os.path.relpath(path, self.root)

        described = json.dumps([[key, _described(utterance)] for key, utterance in self.keyed], default=relative)
        # The usual rate is left out, so that finished shards from before there was another are still known.
        rate = [self.answer_rate] if self.answer_rate != SAMPLE_RATE else []
        return digest([_VERSION, self.number, self.longest_s, described, *rate])


def _described(utterance: Utterance) -> dict[str, Any]:
    fields = asdict(utterance)
    # As before there were any, so that finished shards are still known.
    if not utterance.turn_audio:
        del fields["turn_audio"]
    for name, audio in fields.items():
        if isinstance(audio, dict) and audio.get("channel", 0) is None:
            fields[name] = {key: value for key, value in audio.items() if key != "channel"}
    return fields


def tar_path(folder: Path, number: int) -> Path:
    """The shard's file while the corpus is being built."""
    return folder / f"part-{number:06d}.tar"


def record_path(folder: Path, number: int) -> Path:
    """What is known of the shard."""
    return folder / f"part-{number:06d}.json"


def keys(utterances: Iterable[Utterance]) -> Iterator[tuple[str, Utterance]]:
    """Give every utterance a key: its id in the letters a key may have, numbered where two would be equal."""
    seen: set[str] = set()
    for number, utterance in enumerate(utterances):
        key = name = re.sub(r"[^A-Za-z0-9_-]+", "_", utterance.id)[:_KEY_CHARACTERS].strip("_") or "utterance"
        while key in seen:
            key, number = f"{name}-{number}", number + 1
        seen.add(key)
        yield key, utterance


def convert(job: Job, identity: str, folder: Path) -> dict[str, Any]:
    """Write a shard and its record, each under its name only when it is complete.

    Args:
        job: the shard.
        identity: `job.digest()` before members of archives were located.
        folder: where they go.

    Returns:
        The record: {"identity", "sha256", "bytes", "samples", "members", "question_s", "answer_s", "clipped",
            "rejected"}; members are counted by their extension.

    Raises:
        EchoXError: the folder cannot be written to.
    """
    record: dict[str, Any] = {"identity": identity, "samples": 0, "members": {}, "rejected": []}
    record |= {"question_s": 0.0, "answer_s": 0.0, "clipped": 0}
    final = tar_path(folder, job.number)
    # A worker that outlives a killed build for a moment must not write into the file of the next one.
    partial = final.with_suffix(f".{os.getpid()}")
    with writing(folder):
        with partial.open("wb") as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for key, utterance in job.keyed:
                try:
                    members = sample_members(utterance, job.longest_s, job.answer_rate)
                except Rejected as rejected:
                    files = [stamp(path) for path in _files(utterance)]
                    record["rejected"].append({"id": utterance.id, "reason": str(rejected), "files": files})
                    continue
                record["samples"] += 1
                record["clipped"] += "clipped" in members["json"]
                for seconds in ("question_s", "answer_s"):
                    record[seconds] += members["json"][seconds] or 0.0
                count_members(record["members"], members)
                write_sample(tar, key, members)
        record |= {"sha256": sha256_file(partial), "bytes": partial.stat().st_size}
        partial.rename(final)
        write_json(record_path(folder, job.number), record)
    return record


def count_members(counts: dict[str, int], extensions: Iterable[str]) -> None:
    """Note that one more sample has these members."""
    for extension in extensions:
        counts[extension] = counts.get(extension, 0) + 1


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn what the system says of a full disk or a lost share into a sentence.

    Raises:
        EchoXError: instead of `OSError`.
    """
    try:
        yield
    except OSError as error:
        raise EchoXError(
            f"Cannot write a shard: {error.strerror or error}",
            where=str(folder),
            fix="Make room or repair the folder and run the same command again: finished shards are kept.",
        ) from error


def is_kept(folder: Path, number: int) -> bool:
    """Whether the shard is the one its record describes, byte for byte."""
    record, tar = read_json(record_path(folder, number)), tar_path(folder, number)
    return bool(record) and tar.is_file() and sha256_file(tar) == record["sha256"]


def may_be_kept(folder: Path, number: int, identity: str) -> dict[str, Any] | None:
    """The record of a shard made from the same utterances, unless audio that was rejected then has changed since."""
    record: dict[str, Any] | None = read_json(record_path(folder, number))
    if not record or record["identity"] != identity:
        return None
    known = [each for rejected in record["rejected"] for each in rejected["files"]]
    return record if all(each == stamp(Path(each[0])) for each in known) else None


def write_sample(tar: tarfile.TarFile, key: str, members: Mapping[str, Any]) -> None:
    """Append a sample's members, byte for byte as webdataset's `TarWriter` does with fixed owner, mode and time."""
    for extension, value in sorted(members.items()):
        data = value if isinstance(value, bytes) else json.dumps(value, ensure_ascii=False, sort_keys=True).encode()
        info = tarfile.TarInfo(f"{key}.{extension}")
        info.size, info.mode, info.mtime = len(data), 0o644, 0
        info.uname = info.gname = "echox"
        tar.addfile(info, io.BytesIO(data))


def sample_members(utterance: Utterance, longest_s: float, answer_rate: int = SAMPLE_RATE) -> dict[str, Any]:
    """Members of the data contract.

    Raises:
        Rejected: a text or sound that the task needs is missing, empty, undecodable or absurdly short or long.
    """
    if utterance.problem:
        raise Rejected(utterance.problem)
    if utterance.task in ("asr", "sqa"):
        _need(utterance.question, "no spoken question" if utterance.task == "sqa" else "no recording")
        _need(utterance.question_text, "no transcript")
    if utterance.task in ("sqa", "tts"):
        _need(utterance.answer_text, "no answer text")
    if utterance.task == "tts":
        _need(utterance.answer or utterance.units, "no spoken answer")
    members: dict[str, Any] = {}
    noted: dict[str, float] = {}
    question_s = answer_s = None
    if utterance.question is not None:
        members["question.flac"], question_s = _flac(utterance.question, "question", longest_s, noted)
    if utterance.answer is not None:
        members["answer.flac"], answer_s = _flac(utterance.answer, "answer", longest_s, noted, answer_rate)
    if utterance.units is not None:
        members["answer.units"] = np.asarray(utterance.units, dtype="<u2").tobytes()
    for what, text, seconds in (
        ("transcript", utterance.question_text, question_s),
        ("answer text", utterance.answer_text, answer_s),
    ):
        _check_length(what, text or "", seconds)
    turns = [dict(turn) for turn in utterance.turns]
    for number, (name, audio) in enumerate(zip(TURN_MEMBERS, utterance.turn_audio, strict=False)):
        if audio is not None:
            members[name], _ = _flac(audio, f"turn {number}", longest_s, {})
            turns[number]["audio"] = name
    members["json"] = {
        "id": utterance.id,
        "question_text": utterance.question_text,
        "answer_text": utterance.answer_text,
        "task": utterance.task,
        "question_s": question_s,
        "answer_s": answer_s,
        "source": utterance.source,
        "split": utterance.split,
        "turns": turns,
        **({"clipped": noted} if noted else {}),
        **utterance.extra,
    }
    return members


def _need(value: object, otherwise: str) -> None:
    if not value:
        raise Rejected(otherwise)


def _check_length(what: str, text: str, seconds: float | None) -> None:
    """Refuse a text that nobody can say in the time: it belongs to other audio, or is none."""
    most = MOST_CHARACTERS if seconds is None else min(MOST_CHARACTERS, sayable(seconds))
    if len(text) > most:
        during = "" if seconds is None else f" for {seconds:.2f} s of audio"
        raise Rejected(f"{what}: {len(text):,} characters{during}, more than {most:,}")


def _flac(
    audio: Audio, what: str, longest_s: float, noted: dict[str, float], rate: int = SAMPLE_RATE
) -> tuple[bytes, float]:
    """Mono FLAC of a rate and its seconds; bytes that are that already stay as they are, once decoded to the end.

    Where it is clipped, `noted` gets the share of its samples that are.
    """
    sound = _checked(audio, what, longest_s, rate)
    if share := _clipped(sound.samples, what, sound.channels):
        noted[what] = share
    return sound.flac or encode_flac(sound.samples, rate), round(len(sound.samples) / rate, 3)


def waveform(audio: Audio) -> NDArray[np.float32]:
    """16 kHz mono samples of a sound.

    Raises:
        Rejected: there are none.
        EchoXError: the storage does not give them.
    """
    return _checked(audio, "sound", LONGEST_S).samples


def _checked(audio: Audio, what: str, longest_s: float, rate: int = SAMPLE_RATE) -> _Sound:
    """A sound, decoded, that is neither cut nor too short or too long."""
    try:
        if isinstance(audio, FileAudio) and audio.is_part:
            sound = _part(audio, longest_s, rate)
        else:
            sound = _read(audio, longest_s, rate)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise Rejected(f"{what}: {'no such file' if error.strerror else error}") from error
    except (DataError, ValueError) as error:
        raise Rejected(f"{what}: {error.what if isinstance(error, DataError) else error}") from error
    except OSError as error:
        if error.errno in _NOT_A_FILE:
            raise Rejected(f"{what}: {error.strerror}") from error
        # Not the utterance's fault: a share that is away must not cost a corpus its samples.
        raise EchoXError(
            f"Cannot read audio: {error.strerror or error}",
            where=str(audio.stands_in()),
            fix="Repair the source and run the same command again: finished shards are kept.",
        ) from error
    seconds = len(sound.samples) / rate
    if sound.is_cut or sound.promised is not None and 0 < seconds < 0.98 * sound.promised <= longest_s:
        raise Rejected(f"{what}: the file is cut short")
    if sound.promised is not None and sound.promised > longest_s:
        raise _outside(what, sound.promised, longest_s)
    if not SHORTEST_S <= seconds <= longest_s:
        raise _outside(what, seconds, longest_s)
    return sound


@dataclass(frozen=True)
class _Sound:
    """A decoded recording.

    Attributes:
        samples: none where it is cut, or too long by its header.
        channels: of the file.
        promised: seconds by its header, if that knows.
        is_cut: whether the file's end is missing.
        flac: its own bytes, where they are what is wanted.
    """

    samples: NDArray[np.float32]
    channels: int
    promised: float | None = None
    is_cut: bool = False
    flac: bytes | None = None


def _read(audio: Audio, longest_s: float, rate: int) -> _Sound:
    data = audio.read()
    try:
        info, promised = soundfile.info(io.BytesIO(data)), header_seconds(data)
    except soundfile.LibsndfileError as error:
        raise ValueError(f"Cannot decode {len(data)} bytes of audio: {error.error_string}") from error
    cut = is_cut(data)
    if cut or promised is not None and promised > longest_s:
        return _Sound(np.zeros(0, np.float32), info.channels, promised, cut)
    channel = audio.channel if isinstance(audio, FileAudio) else None
    samples = read_audio(data, min(longest_s + 1, LONGEST_S), channel, rate)
    fits = (info.format, info.subtype, info.samplerate, info.channels) == ("FLAC", "PCM_16", rate, 1)
    # One of unknown length is encoded again: other programs believe the header. So is one with tags and pictures.
    kept = fits and promised is not None and is_bare_flac(data)
    return _Sound(samples, info.channels, promised, cut, data if kept else None)


def _part(audio: FileAudio, longest_s: float, rate: int) -> _Sound:
    """A part of a recording, which may be a long one."""
    start_s = audio.start_s or 0.0
    samples = read_span(audio.inside(), start_s, audio.seconds, audio.channel, longest_s + 1, rate)
    if samples is not None:
        return _Sound(samples, 1, promised=audio.seconds)
    whole = _whole(replace(audio, start_s=None, seconds=None), rate, *stamp(audio.path))
    first = round(start_s * rate)
    last = None if audio.seconds is None else first + round(audio.seconds * rate)
    return replace(whole, samples=whole.samples[first:last], promised=audio.seconds, flac=None)


@lru_cache(maxsize=1)
def _whole(audio: FileAudio, rate: int, *state: Any) -> _Sound:
    """A recording that has to be decoded for its parts: once, where they follow one another.

    Args:
        audio: all of it.
        rate: samples a second.
        state: of its file, for one that was replaced to be read again.
    """
    return _read(audio, LONGEST_S, rate)


def _outside(what: str, seconds: float, longest_s: float) -> Rejected:
    return Rejected(f"{what}: {seconds:.2f} s of audio, outside {SHORTEST_S:g} to {longest_s:g} s")


def _clipped(samples: NDArray[np.float32], what: str, channels: int) -> float:
    """Share of samples at full scale, 0 where it is small.

    Raises:
        Rejected: there is no sound, or one in another scale.
    """
    peak = float(np.abs(samples).max())
    if peak < SILENT:
        raise Rejected(f"{what}: silent" if channels == 1 else f"{what}: silent, or its {channels} channels cancel out")
    if peak > FULL_SCALE:
        raise Rejected(f"{what}: its samples reach {peak:,.0f} where 1 is full scale: whole numbers as floats")
    share = float((np.abs(samples) >= 0.99).mean())
    return round(share, 4) if share > CLIPPED else 0.0


def _files(utterance: Utterance) -> list[Path]:
    return [audio.stands_in() for audio in utterance.sounds]


def stamp(path: Path) -> list[Any]:
    """Path, size and time of a file: enough to see that it was replaced."""
    try:
        state = path.stat()
    except (OSError, ValueError):
        return [str(path), None, None]
    return [str(path), state.st_size, state.st_mtime_ns]
