"""Defines what a corpus recipe lists: utterances in a fixed order, and where the audio of each one lies."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from echox.errors import DataError
from echox.files import read_regular
from echox.units.identity import UnitSetIdentity

LARGEST = 2 << 30
"""Bytes of a recording."""


@dataclass(frozen=True)
class FileAudio:
    """A file of its own.

    Attributes:
        path: the file.
        root: the folder that it has to lie in, links followed; None where the corpus itself has listed it.
        start_s, seconds: the part that is meant; None is from the start, and to the end.
        channel: the channel that is meant, from 0; None is the mean of all.
    """

    path: Path
    root: Path | None = None
    start_s: float | None = None
    seconds: float | None = None
    channel: int | None = None

    @property
    def is_part(self) -> bool:
        """Whether it is less than the file."""
        return bool(self.start_s or self.seconds) or self.channel is not None

    def read(self) -> bytes:
        """Its bytes, whatever libsndfile decodes.

        Raises:
            OSError: it cannot be read, or is no regular file.
            ValueError: no file can have that name, or it lies elsewhere.
        """
        return read_regular(self.inside(), LARGEST)

    def inside(self) -> Path:
        """The file, once it is sure that it lies where it has to.

        Raises:
            ValueError: no file can have that name, or it lies elsewhere.
        """
        # Not `resolve`, which raises an error of its own where links lead in a circle.
        real, root = (Path(os.path.realpath(path)) for path in (self.path, self.root or "/"))
        if not real.is_relative_to(root):
            raise ValueError(f"{self.path} lies outside {self.root}; a manifest's --audio-root names its folder")
        return self.path

    def stands_in(self) -> Path:
        """The file whose change means that the audio may have changed."""
        return self.path


@dataclass(frozen=True)
class SpanAudio:
    """Bytes within a larger file, such as a member of an uncompressed tar.

    Attributes:
        path: the file.
        offset: where the audio starts, bytes.
        size: its length, bytes.
        origin: the file of the corpus that this one was made from, or is.
    """

    path: Path
    offset: int
    size: int
    origin: Path

    def read(self) -> bytes:
        """The bytes of the span.

        Raises:
            ValueError: they are more than a recording has.
        """
        if self.size > LARGEST:
            raise ValueError(f"a member of {self.size / 2**30:.1f} GiB is no recording")
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)

    def stands_in(self) -> Path:
        """The file whose change means that the audio may have changed."""
        return self.origin


@dataclass(frozen=True)
class MemberAudio:
    """A member of a tar or tar.gz; `Archives` finds its span before anything reads it.

    Attributes:
        archive: the tar.
        name: the member's name, without a leading `./`.
    """

    archive: Path
    name: str

    def read(self) -> bytes:
        """Not readable before it was located."""
        raise FileNotFoundError(f"{self.archive.name} has no member {self.name}")

    def stands_in(self) -> Path:
        """The file whose change means that the audio may have changed."""
        return self.archive


@dataclass(frozen=True)
class ParquetAudio:
    """A cell of a parquet file, as Hugging Face stores audio: a struct with a field `bytes`.

    Attributes:
        path: the parquet file.
        group: row group.
        row: row within the group.
        column: name of the struct.
    """

    path: Path
    group: int
    row: int
    column: str = "audio"

    def read(self) -> bytes:
        """The bytes of the cell."""
        cell = _row_group(self.path, self.group, self.column)[self.row].as_py()
        if not cell or not cell["bytes"]:
            raise FileNotFoundError(f"row {self.row} of row group {self.group} of {self.path.name} has no audio bytes")
        return bytes(cell["bytes"])

    def stands_in(self) -> Path:
        """The file whose change means that the audio may have changed."""
        return self.path


@lru_cache(maxsize=1)
def _row_group(path: Path, group: int, column: str) -> Any:
    # Utterances of a shard lie side by side, so that the row group last read serves the next ones too.
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path).read_row_group(group, columns=[f"{column}.bytes"])[column]
    except ValueError as error:
        raise DataError(f"row group {group} of {path.name} is damaged: {error}") from error


Audio = FileAudio | SpanAudio | MemberAudio | ParquetAudio


@dataclass(frozen=True, kw_only=True)
class Utterance:
    """One sample to be.

    Attributes:
        id: name within the corpus.
        task: "asr", "sqa" or "tts".
        source: corpus it comes from.
        split: train, dev or test, or the corpus's own finer name.
        question: the spoken question, or the recording to transcribe.
        question_text: its transcript.
        answer: the spoken answer.
        answer_text: the answer as text.
        units: the answer's units, where the corpus has them instead of sound.
        turns: the dialogue before the question, `{"role", "text"}` each; empty for a first or only turn.
        turn_audio: the sound of each of these turns, where it is wanted and there is one; empty: of none.
        extra: further fields of the json member.
        problem: why it cannot be used, where the recipe has found that out already.
    """

    id: str
    task: str
    source: str
    split: str = "train"
    question: Audio | None = None
    question_text: str | None = None
    answer: Audio | None = None
    answer_text: str | None = None
    units: tuple[int, ...] | None = None
    turns: tuple[Mapping[str, str], ...] = ()
    turn_audio: tuple[Audio | None, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)
    problem: str | None = None

    @property
    def sounds(self) -> list[Audio]:
        """All that is to be read for it."""
        return [audio for audio in (self.question, self.answer, *self.turn_audio) if audio is not None]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is wanted of a corpus.

    Attributes:
        task: "asr", "sqa" or "tts", or "" to let a manifest's fields decide.
        split: "train", "dev" or "test", or a finer name the corpus has.
        answers: spoken answers are wanted besides spoken questions.
        history: the sounds of earlier user turns are wanted beside their text.
        audio_root: folder that a manifest's audio files have to lie in; None is the manifest's own.
    """

    task: str
    split: str = "train"
    answers: bool = False
    history: bool = False
    audio_root: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """A recipe.

    Attributes:
        name: on the command line.
        summary: one line of what it is.
        page: where its owners publish it.
        licence: as they state it.
        layout: the files that are expected below the source.
        tasks: tasks it can serve, the default first.
        discover: utterances below a source, always in the same order; a wrong source raises `DataError`.
        has_splits: whether `--split` chooses among its parts.
        example: a command line.
        unit_set: which units its samples have where they have units instead of sound.
        kind: says in which of several formats a source is.
    """

    name: str
    summary: str
    page: str
    licence: str
    layout: str
    tasks: tuple[str, ...]
    discover: Callable[[Path, Request], Iterator[Utterance]]
    has_splits: bool = False
    example: str = ""
    unit_set: UnitSetIdentity | None = None
    kind: Callable[[Path], str] | None = None


def wrong_source(corpus: str, source: Path, looked_for: str) -> DataError:
    """The error of a folder that is not the corpus, naming what was looked for."""
    state = "there is no such file or folder" if not source.exists() else f"no {looked_for} is there"
    return DataError(
        f"Cannot find {corpus}: {state}",
        where=str(source),
        fix=f"Name the place that holds {looked_for}; `echox shards build {corpus} --help` shows the layout.",
    )


def clean(text: Any) -> str | None:
    """A text in Unicode's composed form, without the white space around it; None for what is no text or says nothing.

    Half a surrogate pair, which JSON can hold and UTF-8 cannot, becomes a question mark. Control characters are left
    out, line ends and tabs stay; a text of characters that have no shape, such as zero-width spaces, says nothing.
    """
    if not isinstance(text, str):
        return None
    if text.isascii() and text.isprintable():
        return text.strip() or None
    composed = unicodedata.normalize("NFC", text.encode("utf-8", "replace").decode())
    kept = "".join(each for each in composed if unicodedata.category(each) != "Cc" or each in "\n\t\r")
    return kept.strip() if any(map(_has_shape, kept)) else None


def _has_shape(character: str) -> bool:
    return not character.isspace() and unicodedata.category(character) not in ("Cf", "Cc", "Cn", "Co", "Cs")


def in_split(part: str, split: str) -> bool:
    """Whether the corpus's part, such as `train-clean-100` or `partial-train.100`, belongs to a split or is it."""
    name = part.removeprefix("partial-").replace(".", "-").lower()
    return name == split or name.startswith(f"{split}-")


def sorted_paths(paths: Iterable[Path]) -> list[Path]:
    """Paths in an order that does not depend on the file system or the locale."""
    return sorted(paths, key=lambda path: path.as_posix())
