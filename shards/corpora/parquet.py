"""Reads rows of the parquet files in which Hugging Face stores speech, without their audio."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from echox.errors import DataError
from shards.corpus import ParquetAudio, in_split, sorted_paths


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        values: the columns asked for, None where the file lacks one; `audio.path` under that name.
        audio: where its sound is.
        part: the part of the corpus it belongs to, such as `train.clean.100`.
    """

    values: dict[str, Any]
    audio: ParquetAudio
    part: str


def parquet_rows(source: Path, split: str, columns: Sequence[str]) -> Iterator[Row]:
    """Rows of every parquet file below a folder that belongs to a split, read a row group at a time.

    The split is in the file's name (`train.clean.100-00000-of-00014.parquet`) or in that of a folder
    (`clean/train.100/0000.parquet`).

    Raises:
        DataError: a file cannot be read, or has no column `audio`.
    """
    for path in sorted_paths(source.rglob("*.parquet")):
        names = [path.name.partition("-0")[0], *reversed(path.relative_to(source).parts[:-1]), source.absolute().name]
        part = next((name for name in names if in_split(name, split)), None)
        if part is None:
            continue
        import pyarrow.parquet

        try:
            file = pyarrow.parquet.ParquetFile(path)
            known = set(file.schema_arrow.names)
            if "audio" not in known:
                raise ValueError("it has no column audio")
            wanted = [name for name in columns if name in known]
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, columns=[*wanted, "audio.path"])
                for number, row in enumerate(table.to_pylist()):
                    path_in_row = (row.pop("audio", None) or {}).get("path")
                    values = {**dict.fromkeys(columns), **row, "audio.path": path_in_row}
                    yield Row(values, ParquetAudio(path, group, number), part)
        except (ValueError, OSError) as error:
            raise DataError(
                f"Cannot read the parquet file: {error}", where=str(path), fix="Download it again."
            ) from error
