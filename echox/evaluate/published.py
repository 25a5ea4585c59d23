"""Writes the pages of an evaluation, the report and the model card, and adds them to the run in MLflow."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from echox.engine.checkpoint.manifest import newest_manifest, read_manifest
from echox.errors import DataError
from echox.evaluate.card import CARD, DEMO_CORPORA, write_card
from echox.evaluate.columns import metrics
from echox.evaluate.report import write_report
from echox.evaluate.store import SCORES, read_metrics

REPORT = "report.html"


@dataclass(frozen=True)
class Pages:
    """What people read of an evaluation: the report and the model card."""

    report: Path
    card: Path


def write_pages(
    storage: Path,
    runs: Mapping[str, Path],
    result: Mapping[str, Any],
    samples: Sequence[Mapping[str, Any]],
    report: Path | None = None,
) -> Pages:
    """Write `report.html` and, beside it, `MODEL_CARD.md`.

    Args:
        storage: folder of the runs.
        runs: run folder of each stage that there is.
        result, samples: see `write_report`.
        report: the HTML file; None for that in the storage.
    """
    curves = {stage: read_metrics(folder) for stage, folder in runs.items()}
    commands = {stage: training_command(folder) for stage, folder in runs.items()}
    if result.get("corpus") in DEMO_CORPORA:
        commands["text_llm_acc"] = shlex.join(["echox", "shards", "build", "demo", "--scale", result["corpus"]])
    if phases := result.get("phases_command"):
        commands["phases"] = phases
    page = write_report(report or storage / REPORT, result, curves, samples, commands)
    return Pages(page, write_card(page.parent / CARD, runs, result, commands))


def training_command(run: Path) -> str:
    """The command that trains a run, or goes on with it."""
    return shlex.join(["echox", "train", str(run / "recipe.json")])


def publish(run: Path, scores: Mapping[str, Any], pages: Pages, evaluation: Path, own: bool = False) -> None:
    """Add scores, report and card to the run in MLflow, at the step of its newest checkpoint.

    Args:
        run: run folder of the echo stage.
        scores: what the evaluation found.
        pages: go to the artifacts as they are called.
        evaluation: folder of the saved evaluation, whose scores go below `evaluation`.
        own: whether the folder is of a run of ours, so that whatever server it names is followed.

    Raises:
        DataError: the run was not tracked, a foreign folder may not name that server, or the server is away.
    """
    from echox.tracking.run import record, uri_of
    from echox.tracking.servers import refusal

    uri = uri_of(run)
    reason = "it was not tracked" if uri is None else "" if own else refusal(uri, run)
    found = {f"eval/{name}/{key}": value for name, row in scores["sets"].items() for key, value in metrics(row).items()}
    files = {pages.report: None, pages.card: None, evaluation / SCORES: "evaluation"}
    if reason or not record(run, metrics=found, artifacts=files, step=_step(run)):
        why = reason or "the tracking server does not answer"
        raise DataError(f"the report cannot be added to the run: {why}", where=str(run), fix="leave out --track")


def _step(run: Path) -> int:
    manifest = newest_manifest(run)
    if manifest is not None:
        return int(read_manifest(manifest.parent).get("step", 0))
    return int(max((row["step"] for row in read_metrics(run)), default=0))
