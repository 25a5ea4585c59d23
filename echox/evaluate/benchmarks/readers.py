"""Reads benchmarks in their public layouts, one question at a time: parquet of the hub, tsv with WAV files, JSON lines.

Of a parquet file a row group at a time is in memory, of the other layouts a question.
The layout is recognised by what a file holds. Nothing outside the benchmark's folder is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from echox.errors import DataError
from echox.evaluate.benchmarks.questions import (
    LARGEST_SOUND,
    Question,
    checked_golds,
    checked_id,
    checked_text,
)
from echox.files import is_within, names_inside, open_regular, parse_json, read_lines, read_regular

LAYOUTS = (
    "parquet of the Hugging Face hub with columns audio and answer, a .tsv with the columns Questions, Answer and "
    'Wav Filename, or a .jsonl with lines like {"id": 1, "audio": "1.wav", "question": "...", "answers": ["..."]}'
)
_ANSWERS = ("answers", "answer")
_QUESTIONS = ("question", "questions", "question_text", "text")
_TSV = {"question": "questions", "answers": "answer", "audio": "wav filename"}
_ROWS_AT_ONCE = 4
_BUFFER = 1 << 20
_MAGIC = b"PAR1"

Reader = Callable[[Path], Iterator[Question]]


def read_questions(place: Path, limit: int | None = None) -> Iterator[Question]:
    """The questions of a benchmark in their order.

    Args:
        place: its folder, or its file.
        limit: most questions.

    Raises:
        DataError: no such place, of no known layout, a column or file is missing, or lies outside the folder.
    """
    every = (question for file in _files(place) for question in _reader(file)(file))
    found = 0
    for question in islice(every, limit):
        yield replace(question, number=found)
        found += 1
    if not found:
        raise DataError("the benchmark has no question", where=str(place), fix=f"give {LAYOUTS}")


def _files(place: Path) -> list[Path]:
    """The files that list the questions."""
    if not place.is_dir():
        return [place]
    listed = {
        kind: sorted(path for path in place.rglob(pattern) if not path.is_dir())
        for kind, pattern in (("parquet", "*.parquet"), ("tsv", "*.tsv"), ("jsonl", "*.jsonl"))
    }
    # A data set of the hub may have splits; benchmarks are scored on the test split.
    listed["parquet"] = [path for path in listed["parquet"] if "test" in path.name] or listed["parquet"]
    kinds = [kind for kind, paths in listed.items() if paths]
    if not kinds:
        raise DataError("there is no benchmark in the folder", where=str(place), fix=f"name one of {LAYOUTS}")
    files = listed[kinds[0]]
    if len(kinds) > 1 or (kinds != ["parquet"] and len(files) > 1):
        names = ", ".join(path.name for paths in listed.values() for path in paths[:2])
        raise DataError(f"the folder lists questions more than once: {names}", where=str(place), fix="name the file")
    for path in files:
        if not is_within(place, path):
            fix = "name the file itself, or download with --local-dir"
            raise DataError(f"{path.name} is a link out of the folder", where=str(place), fix=fix)
    return files


def _reader(file: Path) -> Reader:
    """By what the file begins with."""
    try:
        with open_regular(file) as descriptor, open(descriptor, "rb", closefd=False) as opened:
            if opened.read(len(_MAGIC)) == _MAGIC:
                return _parquet
        first = next((line for line in read_lines(file) if line.strip()), b"").removeprefix(b"\xef\xbb\xbf")
    except (OSError, ValueError) as error:
        said = getattr(error, "strerror", None) or str(error)
        raise DataError(f"the benchmark cannot be read: {said}", where=str(file), fix=f"give {LAYOUTS}") from error
    if first.lstrip().startswith(b"{"):
        return _json_lines
    if b"\t" in first:
        return _tsv
    raise DataError("this is no benchmark", where=str(file), fix=f"give {LAYOUTS}")


def _parquet(file: Path) -> Iterator[Question]:
    import pyarrow
    import pyarrow.parquet

    fix = "download it again"
    try:
        opened = pyarrow.parquet.ParquetFile(file, buffer_size=_BUFFER, pre_buffer=False)
        names = opened.schema_arrow.names
        audio = _column(names, ("audio",), file)
        answers, question = _column(names, _ANSWERS, file), _column(names, _QUESTIONS)
        id_ = _column(names, ("id",))
        columns = [name for name in (audio, answers, question, id_) if name]
        number = 0
        for batch in opened.iter_batches(_ROWS_AT_ONCE, columns=columns, use_threads=False):
            for row in batch.to_pylist():
                where = f"row {number + 1} of {file}"
                sound, name = _embedded(row[audio], where)
                given = row.get(id_) if id_ else name
                yield Question(
                    number,
                    checked_id(given, number, where),
                    checked_text(row.get(question) if question else None, "question", where),
                    checked_golds(row[answers], where),
                    sound,
                    where,
                )
                number += 1
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        said = str(error).splitlines()[0]
        raise DataError(f"the parquet file cannot be read: {said}", where=str(file), fix=fix) from error


def _column(names: Sequence[str], wanted: Sequence[str], file: Path | None = None) -> str:
    """The first of the wanted columns that is there, whatever its case; with a file, one has to be."""
    by_name = {name.strip().lower(): name for name in reversed(names)}
    found = next((by_name[name] for name in wanted if name in by_name), "")
    if not found and file is not None:
        has = ", ".join(str(name)[:40] for name in names[:12])
        raise DataError(f"there is no column {' or '.join(wanted)}, but {has}", where=str(file), fix=f"give {LAYOUTS}")
    return found


def _embedded(value: Any, where: str) -> tuple[bytes, str | None]:
    """Sound and file name of a cell as the hub stores audio."""
    sound = value.get("bytes") if isinstance(value, Mapping) else None
    if not isinstance(sound, bytes) or not sound:
        fix = "use a parquet file with the audio embedded"
        raise DataError("the audio is not in the file, as {bytes, path}", where=where, fix=fix)
    if len(sound) > LARGEST_SOUND:
        raise DataError(f"the audio has more than {LARGEST_SOUND >> 20} MiB", where=where, fix="leave it out")
    path = value.get("path")
    return sound, Path(path).stem if isinstance(path, str) and path else None


def _tsv(file: Path) -> Iterator[Question]:
    lines = _texts(file)
    _, header = next(lines)
    columns = header.split("\t")
    places = {field: columns.index(_column(columns, (name,), file)) for field, name in _TSV.items()}
    for number, (where, line) in enumerate(lines):
        cells = line.split("\t")
        if len(cells) <= max(places.values()):
            raise DataError(f"the line has {len(cells)} columns", where=where, fix=f"give it {len(columns)}, by tabs")
        name = cells[places["audio"]].strip()
        yield Question(
            number,
            checked_id(Path(name).stem, number, where),
            checked_text(cells[places["question"]], "question", where),
            checked_golds(cells[places["answers"]].strip(), where),
            _own_sound(file.parent, name, where),
            where,
        )


def _json_lines(file: Path) -> Iterator[Question]:
    for number, (where, line) in enumerate(_texts(file)):
        try:
            row = parse_json(line)
        except ValueError as error:
            raise DataError(f"the line is no JSON: {error}", where=where, fix=f"give {LAYOUTS}") from error
        if not isinstance(row, dict) or "audio" not in row or not {"answers", "answer"} & set(row):
            raise DataError("the line is no object with audio and answers", where=where, fix=f"give {LAYOUTS}")
        yield Question(
            number,
            checked_id(row.get("id"), number, where),
            checked_text(row.get("question"), "question", where),
            checked_golds(row.get("answers", row.get("answer")), where),
            _own_sound(file.parent, row["audio"], where),
            where,
        )


def _texts(file: Path) -> Iterator[tuple[str, str]]:
    """Place and text of each line that is not blank."""
    try:
        for number, line in enumerate(read_lines(file), 1):
            text = (line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line).decode("utf-8")
            if text.strip():
                yield f"line {number} of {file}", text
    except (OSError, ValueError) as error:
        raise DataError(f"the list of questions cannot be read: {error}", where=str(file), fix="correct it") from error


def _own_sound(folder: Path, name: Any, where: str) -> bytes:
    """Bytes of an audio file below the benchmark's folder."""
    if not isinstance(name, str) or "\0" in name or not names_inside(name) or not is_within(folder, folder / name):
        fix = "name a file in its folder, by a relative path"
        raise DataError(f"the audio {str(name)[:80]!r} is no file of the benchmark", where=where, fix=fix)
    try:
        return read_regular(folder / name, LARGEST_SOUND)
    except (OSError, ValueError) as error:
        said = getattr(error, "strerror", None) or str(error)
        raise DataError(f"the audio {name[:80]} cannot be read: {said}", where=where, fix="copy it again") from error
