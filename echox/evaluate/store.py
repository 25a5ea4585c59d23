"""Saves and loads an evaluation: scores and samples with their WAV files, so that a report can be made again."""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path
from typing import Any

from echox.engine.monitor.run_dir import metric_rows
from echox.errors import DataError
from echox.files import read_json

SCORES, SAMPLES = "scores.json", "samples.json"
_WAVS = ("question_wav", "answer_wav", "reference_wav")
_WAV_NAME = re.compile(r"[0-9A-Za-z_-]+\.wav")
_LARGEST_WAV = 64 << 20


def save_evaluation(folder: Path, scores: dict[str, Any], samples: list[dict[str, Any]]) -> None:
    """Write scores and samples; `*_wav` entries of a sample are WAV bytes or None."""
    folder.mkdir(parents=True, exist_ok=True)
    listed = []
    for index, sample in enumerate(samples):
        row = dict(sample)
        for name in _WAVS:
            if row.get(name):
                file = f"{index:03d}-{name.removesuffix('_wav')}.wav"
                (folder / file).write_bytes(row[name])
                row[name] = file
        listed.append(row)
    (folder / SAMPLES).write_text(json.dumps(listed, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / SCORES).write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")


def load_evaluation(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Scores and samples as `save_evaluation` got them; an evaluation of others can name no file but its own.

    Raises:
        DataError: the folder holds no evaluation, or one that names what is no WAV file of its own.
    """
    if not (folder / SCORES).is_file():
        raise DataError("no evaluation found", where=str(folder), fix="run `echox evaluate` first")
    try:
        samples = read_json(folder / SAMPLES)
        for row in samples:
            for name in _WAVS:
                if row.get(name):
                    row[name] = _own_wav(folder, row[name])
        return dict(read_json(folder / SCORES)), samples
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise DataError(
            f"this is no evaluation: {error}", where=str(folder), fix="run `echox evaluate` again"
        ) from error


def _own_wav(folder: Path, name: object) -> bytes:
    """Bytes of one of the evaluation's own files: a page that people pass on must not hold others of this machine."""
    if not isinstance(name, str) or not _WAV_NAME.fullmatch(name):
        raise ValueError(f"{str(name)[:80]!r} is not the name of a WAV file in the folder")
    # A link may lead anywhere, and a named pipe would wait for its writer.
    descriptor = os.open(folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_size > _LARGEST_WAV:
            raise ValueError(f"{name} is no file of at most {_LARGEST_WAV >> 20} MiB")
        content = file.read()
    if content[:4] != b"RIFF":
        raise ValueError(f"{name} is no WAV file")
    return content


def read_metrics(run_folder: Path) -> list[dict[str, float]]:
    """The rows of a run's `metrics.jsonl`, in order; empty if there is none. A last line that was cut is left out."""
    return list(metric_rows(run_folder))
