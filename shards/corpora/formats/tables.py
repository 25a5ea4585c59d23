"""Reads tables of recordings: Hugging Face's audiofolder and parquet files, Common Voice, any CSV or TSV like them."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from echox.errors import DataError
from shards.corpora.formats.rows import LONGEST, Line, Row, Unusable, beginning, json_rows, opened, renamed
from shards.corpus import ParquetAudio, sorted_paths

_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_QUESTION, _ANSWER = ("audio", "question_audio"), ("answer_audio",)
_SPLITS = ("train", "validation", "validated", "dev", "test")
_COMMON_VOICE = {"client_id", "path", "sentence"}


def metadata(source: Path) -> list[Path]:
    """The metadata files of an audiofolder, whose splits are folders; those of a file are itself."""
    if source.is_file():
        return [source] if source.name in _METADATA else []
    folders = [source, *sorted_paths(each for each in source.iterdir() if each.is_dir())]
    return [folder / name for folder in folders for name in _METADATA if (folder / name).is_file()]


def common_voice(source: Path) -> list[Path]:
    """The lists of a language of Common Voice: the one that is named, or train, dev and test."""
    found = [source] if source.is_file() else [source / f"{name}.tsv" for name in ("train", "dev", "test")]
    return [path for path in found if path.is_file() and set(header(path)) >= _COMMON_VOICE]


def parquets(source: Path) -> list[Path]:
    """Parquet files that hold sound."""
    found = [source] if source.is_file() else sorted_paths(source.rglob("*.parquet"))
    return [path for path in found if path.suffix == ".parquet" and _sounds(path)]


def header(path: Path) -> list[str]:
    """Names of the columns of a CSV or TSV file."""
    first = beginning(path).splitlines()[:1]
    return next(csv.reader(first, delimiter=_delimiter(path)), []) if first else []


def audiofolder_rows(source: Path) -> Iterator[Line]:
    """A row for each line of each metadata file; sounds lie beside it."""
    base = source if source.is_dir() else source.parent
    for path in metadata(source):
        beside = path.parent.relative_to(base)
        for where, row in _read(path):
            yield where, row if isinstance(row, Unusable) else _beside(renamed(row), beside)


def common_voice_rows(source: Path) -> Iterator[Line]:
    """A row for each recording; sounds are in `clips`."""
    for path in common_voice(source):
        for where, row in csv_rows(path):
            if isinstance(row, Unusable):
                yield where, row
                continue
            kept = {name: row[name] for name in ("gender", "age", "accents", "locale") if row.get(name)}
            yield where, {"audio": f"clips/{row['path']}", "text": row["sentence"], "speaker": row["client_id"],
                          "split": path.stem, **kept}  # fmt: skip


def csv_rows(path: Path) -> Iterator[Line]:
    """Rows of a CSV or TSV file by the names of its columns."""
    # Common Voice writes quotes as they are said.
    quoting: Literal[0, 3] = csv.QUOTE_NONE if _delimiter(path) == "\t" else csv.QUOTE_MINIMAL
    with opened(path) as file:
        text = (line.decode("utf-8-sig" if not number else "utf-8", "replace") for number, line in enumerate(file))
        reader = csv.reader(text, delimiter=_delimiter(path), quoting=quoting)
        csv.field_size_limit(LONGEST)
        names = next(reader, [])
        while True:
            where = f"line {reader.line_num + 1} of {path.name}"
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield where, Unusable(f"no table: {error}")
                continue
            if cells:
                same = len(cells) == len(names)
                wrong = Unusable(f"{len(cells)} cells under {len(names)} names")
                yield where, dict(zip(names, cells, strict=True)) if same else wrong


def parquet_rows(source: Path) -> Iterator[Line]:
    """A row for each row of each parquet file; its sounds stay where they are."""
    for path in parquets(source):
        yield from _of_parquet(path, with_sound=True)


def _of_parquet(path: Path, *, with_sound: bool) -> Iterator[Line]:
    import pyarrow.parquet

    sounds = _sounds(path) if with_sound else {}
    split = next((name for name in _SPLITS if path.name.startswith(name)), None)
    try:
        file = pyarrow.parquet.ParquetFile(path)
        plain = [field.name for field in file.schema_arrow if _is_plain(field.type)]
        for group in range(file.num_row_groups):
            for number, row in enumerate(file.read_row_group(group, columns=plain).to_pylist()):
                own = {own: ParquetAudio(path, group, number, column) for own, column in sounds.items()}
                where = f"row {number} of row group {group} of {path.name}"
                named = {} if split is None else {"split": split}
                yield where, {"id": f"{path.stem}-{group}-{number}", **named, **renamed(row), **own}
    except (ValueError, OSError) as error:
        raise DataError(f"Cannot read the parquet file: {error}", where=str(path), fix="Download it again.") from error


def _sounds(path: Path) -> dict[str, str]:
    """Columns with sound, by the field of a manifest that each is."""
    import pyarrow
    import pyarrow.parquet

    try:
        schema = pyarrow.parquet.read_schema(path)
    except (ValueError, OSError):
        return {}
    structs = [field.name for field in schema if pyarrow.types.is_struct(field.type) and _has_bytes(field.type)]
    named = {own: _first(structs, names) for own, names in (("audio", _QUESTION), ("answer_audio", _ANSWER))}
    return {own: column for own, column in named.items() if column is not None}


def _first(columns: Sequence[str], names: Sequence[str]) -> str | None:
    return next((name for name in names if name in columns), None)


def _has_bytes(struct: Any) -> bool:
    return bool(struct.get_field_index("bytes") >= 0)


def _is_plain(kind: Any) -> bool:
    import pyarrow

    tests = (pyarrow.types.is_string, pyarrow.types.is_large_string, pyarrow.types.is_integer,
             pyarrow.types.is_floating, pyarrow.types.is_boolean)  # fmt: skip
    return any(test(kind) for test in tests)


def _read(path: Path) -> Iterator[Line]:
    if path.suffix == ".parquet":
        return _of_parquet(path, with_sound=False)
    return csv_rows(path) if path.suffix == ".csv" else json_rows(path)


def _beside(row: Row, folder: Path) -> Row:
    """Sounds are named from the folder of their metadata; a folder of a split names it."""
    found = dict(row)
    for name in ("audio", "answer_audio"):
        if isinstance(found.get(name), str):
            found[name] = (folder / found[name]).as_posix()
    if folder.name in _SPLITS:
        found.setdefault("split", folder.name)
    return found


def _delimiter(path: Path) -> str:
    return "\t" if ".tsv" in path.suffixes else ","
