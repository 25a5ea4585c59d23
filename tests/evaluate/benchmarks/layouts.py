"""Tiny copies of the benchmarks' public layouts: three spoken questions in parquet, tsv with WAV files, JSON lines."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

ASKED = ("What is the capital of France?", 'Who wrote "Emma"?', "Name a colour")
GOLDS = (("Paris",), ("Jane Austen", "Austen"), ("red", "green"))
RATES = (16_000, 8_000, 44_100)


def sound(number: int, seconds: float = 0.25, rate: int | None = None) -> bytes:
    """A tone whose loudness and length tell its number."""
    rate = rate or RATES[number % 3]
    time = np.arange(round((seconds + 0.05 * number) * rate)) / rate
    buffer = io.BytesIO()
    soundfile.write(buffer, (0.1 + 0.05 * number) * np.sin(2 * np.pi * 300 * time), rate, format="WAV")
    return buffer.getvalue()


def write_parquet(
    file: Path, columns: Mapping[str, Sequence[Any]], sounds: Sequence[bytes | None], **more: Any
) -> Path:
    """A file as the hub's viewer converts data sets: audio is a struct of bytes and path."""
    import pyarrow as pa
    import pyarrow.parquet

    cells = [{"bytes": data, "path": f"q{number}.wav"} for number, data in enumerate(sounds)]
    audio = pa.array(cells, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    file.parent.mkdir(parents=True, exist_ok=True)
    pa.parquet.write_table(pa.table({**{k: pa.array(v) for k, v in columns.items()}, "audio": audio}), file, **more)
    return file


def write_tsv(folder: Path, rows: Sequence[tuple[str, str, str]] | None = None) -> Path:
    """Llama Questions: WAV files named by number, and a tsv with Windows line ends and none after the last."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(3):
        (folder / f"{number + 1}.wav").write_bytes(sound(number))
    given = rows or [(ASKED[n], GOLDS[n][0], f"{n + 1}.wav") for n in range(3)]
    lines = ["\t".join(row) for row in (("Questions", "Answer", "Wav Filename"), *given)]
    (folder / "llama_questions.tsv").write_bytes("\r\n".join(lines).encode())
    return folder
