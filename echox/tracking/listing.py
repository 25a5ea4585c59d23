"""Lists runs: those of run folders, those of a server, and the ones that a name on the command line means."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echox.config.mistakes import did_you_mean
from echox.errors import NetworkError, RecipeError
from echox.tracking.delivery import ROLE
from echox.tracking.lifecycle import make_client
from echox.tracking.state import STATE_FILE, counted_attempts, read_state

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

LIST_TIMEOUT_S = 10
_ASIDE = "replaced"
"""Folder of runs that made room for a repeated one."""


@dataclass(frozen=True, kw_only=True)
class KnownRun:
    """One stage run, from its folder, its server or both.

    Attributes:
        name: name of the run.
        uri: tracking URI.
        run_id: MLflow id; None while the server has not answered yet.
        folder: run folder, where this machine sees it.
        mlflow: the run on the server; None where the server is away.
        state: contents of `mlflow.json`.
        progress: contents of `progress.json`.
    """

    name: str
    uri: str
    run_id: str | None
    folder: Path | None = None
    mlflow: Run | None = None
    state: Mapping[str, Any] = field(default_factory=dict)
    progress: Mapping[str, Any] = field(default_factory=dict)

    def tag(self, key: str) -> str | None:
        """A tag of the run."""
        tags: Mapping[str, str] = self.mlflow.data.tags if self.mlflow else self.state.get("tags", {})
        return tags.get(key)

    def row(self) -> dict[str, Any]:
        """What a table shows of it; times in seconds, JSON types."""
        metrics = dict(self.mlflow.data.metrics) if self.mlflow else {}
        steps = {metric.key: metric.step for metric in self.mlflow.data._metric_objs} if self.mlflow else {}
        params = self.mlflow.data.params if self.mlflow else {}
        status = self.mlflow.info.status if self.mlflow else self.state.get("status", "UNKNOWN")
        started, ended = self._times(status)
        step = self.progress.get("step", steps.get("loss/total"))
        total = self.progress.get("steps") or params.get("optim.steps")
        attempts = (counted_attempts(self.folder) if self.folder else 0) or int(self.tag("attempt") or 0)
        return {
            "name": self.name,
            "scale": self.tag("scale"),
            "stage": self.tag("stage"),
            "status": status,
            "attempts": attempts,
            "step": None if step is None else int(step),
            "steps": None if total is None else int(total),
            "loss": metrics.get("loss/total", self.progress.get("loss")),
            "eval": {key.removeprefix("eval/"): value for key, value in metrics.items() if key.startswith("eval/")},
            "started": started,
            "duration_s": None if started is None else (ended or time.time()) - started,
            "run_id": self.run_id,
            "folder": None if self.folder is None else str(self.folder),
        }

    def _times(self, status: str) -> tuple[float | None, float | None]:
        if self.mlflow is None:
            return self.state.get("started"), self.state.get("ended")
        start, end = self.mlflow.info.start_time, self.mlflow.info.end_time
        return start / 1000, None if status == "RUNNING" or end is None else end / 1000


def run_folders(storage: Path) -> list[Path]:
    """Folders of runs in a folder, or in the folders in it."""
    found = {file.parent for pattern in (f"*/{STATE_FILE}", f"*/*/{STATE_FILE}") for file in storage.glob(pattern)}
    return sorted(folder for folder in found if _ASIDE not in folder.relative_to(storage).parts)


def of_folders(folders: Iterable[Path]) -> tuple[list[KnownRun], list[str]]:
    """The runs of run folders, and a sentence for every server that is away: those runs show what the folder knows."""
    found, problems = [], dict[str, str]()
    clients: dict[str, MlflowClient] = {}
    for folder in folders:
        state = read_state(folder)
        uri, run_id, run = state.get("uri", ""), state.get("run_id"), None
        if run_id and uri not in problems:
            try:
                client = clients.setdefault(uri, make_client(uri, LIST_TIMEOUT_S))
                run = client.get_run(run_id)
            except Exception as error:
                problems[uri] = f"MLflow at {uri} does not answer ({_first_line(error)}): showing what the folders know"
        found.append(
            KnownRun(
                name=state.get("name", folder.name),
                uri=uri,
                run_id=run_id,
                folder=folder,
                mlflow=run,
                state=state,
                progress=_read_json(folder / "progress.json"),
            )
        )
    return found, list(problems.values())


def of_server(uri: str) -> list[KnownRun]:
    """Every stage run of a server, oldest first.

    Raises:
        NetworkError: the server does not answer.
    """
    try:
        client = make_client(uri, LIST_TIMEOUT_S)
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        runs: list[Run] = []
        token = None
        while experiments:
            page = client.search_runs(experiments, order_by=["start_time ASC"], page_token=token)
            runs += page
            token = page.token
            if not token:
                break
    except Exception as error:
        raise NetworkError(
            f"MLflow at {uri} does not answer: {_first_line(error)}",
            fix="check the address, or list what the folders know with --storage",
        ) from error
    return [_of_run(run, uri) for run in runs if "stage" in run.data.tags and run.data.tags.get(ROLE) != "attempt"]


def find(names: Iterable[str], storage: Path, uri: str | None) -> tuple[list[KnownRun], list[str]]:
    """The runs that names, run folders or MLflow ids mean, and what there is to say about servers that are away.

    Of several runs with one name, the one with a folder counts, else the newest.

    Raises:
        RecipeError: no run is meant.
        NetworkError: `uri` does not answer.
    """
    in_folders, notes = ([], []) if uri else of_folders(run_folders(storage))
    on_server = of_server(uri) if uri else []
    found = []
    for name in names:
        run = next((run for run in [*in_folders, *reversed(on_server)] if name in (run.name, run.run_id)), None)
        if run is None and (Path(name) / STATE_FILE).is_file():
            one, said = of_folders([Path(name).resolve()])
            run, notes = one[0], [*notes, *said]
        if run is None:
            # An older run of a name, one that was set aside, or an attempt: only the server knows it.
            run = next(filter(None, (_by_id(known, name) for known in {uri, *(run.uri for run in in_folders)})), None)
        if run is None:
            known = {run.name for run in (*in_folders, *on_server)}
            raise RecipeError(
                f"there is no run {name} {f'at {uri}' if uri else f'in {storage}'}",
                fix=did_you_mean(name, known, noun="runs")
                if known
                else "name a run folder, or give --storage or --uri",
            )
        found.append(run)
    return found, notes


def _by_id(uri: str | None, run_id: str) -> KnownRun | None:
    if not uri or len(run_id) != 32:
        return None
    from mlflow.exceptions import MlflowException

    try:
        return _of_run(make_client(uri, LIST_TIMEOUT_S).get_run(run_id), uri)
    except MlflowException:
        return None


def _of_run(run: Run, uri: str) -> KnownRun:
    folder = Path(run.data.tags.get("run_folder", ""))
    here = folder if run.data.tags.get("run_folder") and read_state(folder).get("run_id") == run.info.run_id else None
    return KnownRun(
        name=run.info.run_name,
        uri=uri,
        run_id=run.info.run_id,
        folder=here,
        mlflow=run,
        state=read_state(here) if here else {},
        progress=_read_json(here / "progress.json") if here else {},
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return record


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:160] if str(error) else type(error).__name__
