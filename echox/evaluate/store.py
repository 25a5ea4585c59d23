"""Saves and loads an evaluation: scores and samples with their WAV files, so that a report can be made again."""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path
from typing import Any

from echox.errors import DataError
from echox.evaluate.columns import METRICS, QUALITY_COLUMNS, RELATION_COLUMNS
from echox.evaluate.quality import VOICES
from echox.files import read_json
from echox.run_records import metric_rows

SCORES, SAMPLES = "scores.json", "samples.json"
_WAVS = ("question_wav", "answer_wav", "reference_wav", "cascade_wav")
_WAV_NAME = re.compile(r"[0-9A-Za-z_-]+\.wav")
_TEXTS = ("question_text", "answer_text", "reference_text")
_MORE_TEXTS = ("set", "judged_text", "cascade_text", "copy_text")
_OF_ALL = ("command", "judge", "corpus", "language", "phases_command")
_SHARES = ("resynthesis_wer", "original_wer", "t2c_heldout_wer", "t2c_heldout_exact", "peak_memory_gib")
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
        scores = check_scores(dict(read_json(folder / SCORES)))
        for row in samples:
            if any(not isinstance(row[name], str | None) for name in _TEXTS):
                raise TypeError("a text of a sample is none")
            if any(not isinstance(row.get(name), str | None) for name in _MORE_TEXTS):
                raise TypeError("a text of a sample is none")
            row["ok"] = bool(row["ok"])
        return scores, samples
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise DataError(
            f"this is no evaluation: {error}", where=str(folder), fix="run `echox evaluate` again"
        ) from error


def check_scores(scores: dict[str, Any]) -> dict[str, Any]:
    """The scores, and what `result.json` adds to them, whose types are those that a report shows.

    Raises:
        TypeError, AttributeError: others.
    """
    for row in scores.get("sets", {}).values():
        _check_row(row)
        for relation in (row.get("relations") or {}).values():
            _check_row(relation)
    _check_numbers({name: scores.get(name) for name in _SHARES})
    _check_numbers(scores.get("phases", {}))
    _check_numbers(scores.get("streaming", {}))
    if not all(isinstance(scores.get(name), str | None) for name in _OF_ALL):
        raise TypeError("the command or the judge is none")
    if not all(isinstance(name, str) for name in scores.get("reused", ())):
        raise TypeError("reused names no phases")
    return scores


def _check_row(row: dict[str, Any]) -> None:
    _check_numbers({name: row.get(name) for name in (*METRICS, *(column.key for column in RELATION_COLUMNS))})
    for voice, opinions in (row.get("quality") or {}).items():
        if voice not in VOICES or not all(isinstance(opinions[each.key], int | float) for each in QUALITY_COLUMNS):
            raise TypeError("the quality of a set is none")
    if row.get("interval_95"):
        _check_numbers(dict(zip(("low", "high"), row["interval_95"], strict=True)))
    if not all(isinstance(row.get(name), str | None) for name in ("role", "about", "strict_rule")):
        raise TypeError("a set is described by something other than a text")


def _check_numbers(values: dict[str, Any]) -> None:
    for name, value in values.items():
        if not isinstance(value, int | float | None):
            raise TypeError(f"{name} is a {type(value).__name__}, not a number")


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
