"""Saves and loads an evaluation: scores and samples with their WAV files, so that a report can be made again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from echox.errors import DataError

SCORES, SAMPLES = "scores.json", "samples.json"
_WAVS = ("question_wav", "answer_wav", "reference_wav")


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
    """Scores and samples as `save_evaluation` got them.

    Raises:
        DataError: the folder holds no evaluation.
    """
    if not (folder / SCORES).is_file():
        raise DataError("no evaluation found", where=str(folder), fix="run `echox evaluate` first")
    samples = json.loads((folder / SAMPLES).read_text(encoding="utf-8"))
    for row in samples:
        for name in _WAVS:
            if row.get(name):
                row[name] = (folder / row[name]).read_bytes()
    return json.loads((folder / SCORES).read_text(encoding="utf-8")), samples


def read_metrics(run_folder: Path) -> list[dict[str, float]]:
    """The rows of a run's `metrics.jsonl`, in order; empty if there is none. A last line that was cut is left out."""
    file = run_folder / "metrics.jsonl"
    rows: list[dict[str, float]] = []
    for line in file.read_text().splitlines() if file.is_file() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows
