"""Lists runs: those of run folders, those of a server, and the ones that a name on the command line means."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from echox.config.locations import without_secrets
from echox.config.mistakes import did_you_mean
from echox.errors import NetworkError, RecipeError
from echox.run_records import Progress, read_progress
from echox.tracking.delivery import ROLE
from echox.tracking.names import batches
from echox.tracking.servers import listing_client, refusal
from echox.tracking.state import STATE_FILE, counted_attempts, last_sign, read_state

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

LIST_TIMEOUT_S = 10
_SHOWN = 50
_IDS_PER_REQUEST = 200
_LARGEST_PAGE = 1000
_LAST_TIME = 1e11
_RUN_ID = re.compile(r"[0-9a-f]{32}")
_FOLDERS_KNOW = "showing what the folders know"
_ASK = "(to ask it, set MLFLOW_TRACKING_URI to it, or name it with --uri)"
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
    progress: Progress = field(default_factory=lambda: Progress())

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
        attempts = (counted_attempts(self.folder) if self.folder else 0) or _whole(self.tag("attempt")) or 0
        return {
            "name": self.name,
            "scale": self.tag("scale"),
            "stage": self.tag("stage"),
            "status": status,
            "attempts": attempts,
            "step": _whole(step),
            "steps": _whole(total),
            "loss": metrics.get("loss/total", self.progress.get("loss")),
            "eval": {key.removeprefix("eval/"): value for key, value in metrics.items() if key.startswith("eval/")},
            "started": started,
            "duration_s": None if started is None else (ended or time.time()) - started,
            "run_id": self.run_id,
            "folder": None if self.folder is None else str(self.folder),
        }

    def _times(self, status: str) -> tuple[float | None, float | None]:
        if self.mlflow is None:
            return _time(self.state.get("started")), _time(self.state.get("ended"))
        start, end = self.mlflow.info.start_time, self.mlflow.info.end_time
        return _time(start / 1000), None if status == "RUNNING" or end is None else _time(end / 1000)


def run_folders(storage: Path) -> list[Path]:
    """Folders of runs in a folder, or in the folders in it, the one that changed last at the end; none is opened."""
    found: dict[Path, float] = {}
    for folder in _folders(storage):
        for place in [folder] if (folder / STATE_FILE).is_file() else _folders(folder):
            if place == folder or (place / STATE_FILE).is_file():
                found[place] = last_sign(place)
    return sorted(found, key=lambda folder: (found[folder], folder))


def _folders(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            return [Path(entry.path) for entry in entries if entry.name != _ASIDE and entry.is_dir()]
    except OSError:
        return []


def of_folders(folders: Iterable[Path]) -> tuple[list[KnownRun], list[str]]:
    """The runs of run folders, and a sentence for every server that is away: those runs show what the folder knows."""
    states = {folder: read_state(folder) for folder in folders}
    wanted: dict[str, list[str]] = {}
    problems: dict[str, str] = {}
    for folder, state in states.items():
        uri = state.get("uri", "")
        if state.get("run_id") and uri not in problems:
            if why := refusal(uri, folder):
                problems[uri] = f"MLflow at {without_secrets(uri)} is not asked, for {why}: {_FOLDERS_KNOW} {_ASK}"
            else:
                wanted.setdefault(uri, []).append(state["run_id"])
    answers: dict[tuple[str, str], Run] = {}
    for uri, run_ids in wanted.items():
        try:
            answers |= {(uri, run.info.run_id): run for run in _runs_of(listing_client(uri, LIST_TIMEOUT_S), run_ids)}
        except Exception as error:
            place = without_secrets(uri)
            problems[uri] = f"MLflow at {place} does not answer ({_first_line(error)}): {_FOLDERS_KNOW}"
    found = [
        KnownRun(
            name=state.get("name", folder.name),
            uri=state.get("uri", ""),
            run_id=state.get("run_id"),
            folder=folder,
            mlflow=answers.get((state.get("uri", ""), state.get("run_id") or "")),
            state=state,
            progress=read_progress(folder),
        )
        for folder, state in states.items()
    ]
    return found, list(problems.values())


def _runs_of(client: MlflowClient, run_ids: list[str]) -> Iterator[Run]:
    """The runs of a server that have these ids, in two requests for hundreds of them."""
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    known = [run_id for run_id in run_ids if _RUN_ID.fullmatch(run_id)]
    for some in batches(known, _IDS_PER_REQUEST) if experiments else ():
        named = ", ".join(f"'{run_id}'" for run_id in some)
        yield from client.search_runs(experiments, f"attributes.run_id IN ({named})", max_results=_IDS_PER_REQUEST)


def of_server(uri: str, limit: int | None = None) -> tuple[list[KnownRun], bool]:
    """The newest stage runs of a server, the newest at the end, and whether there may be older ones.

    Args:
        uri: of the server.
        limit: most runs; None is all.

    Raises:
        NetworkError: the server does not answer.
    """
    found: list[Run] = []
    more = False
    try:
        client = listing_client(uri, LIST_TIMEOUT_S)
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        for run in _newest(client, experiments, limit) if experiments else ():
            if more := limit is not None and len(found) == limit:
                break
            found.append(run)
    except Exception as error:
        raise NetworkError(
            f"MLflow at {without_secrets(uri)} does not answer: {_first_line(error)}",
            fix="check the address, or list what the folders know with --storage",
        ) from error
    return [_of_run(run, uri) for run in reversed(found)], more


def _newest(client: MlflowClient, experiments: list[str], limit: int | None) -> Iterator[Run]:
    """Stage runs, newest first, by pages; runs that group stages or are attempts of one are passed over."""
    token = None
    size = _LARGEST_PAGE if limit is None else min(_LARGEST_PAGE, 4 * limit + 1)
    while True:
        page = client.search_runs(
            experiments, "tags.stage LIKE '%'", order_by=["start_time DESC"], max_results=size, page_token=token
        )
        yield from (run for run in page if run.data.tags.get(ROLE) != "attempt")
        token = page.token
        if not token:
            return


def find(names: Iterable[str], storage: Path, uri: str | None) -> tuple[list[KnownRun], list[str]]:
    """The runs that names, run folders or MLflow ids mean, and what there is to say about servers that are away.

    Of several runs with one name, the one with a folder counts, else the newest.

    Raises:
        RecipeError: no run is meant.
        NetworkError: `uri` does not answer.
    """
    folders = [] if uri else run_folders(storage)
    notes: list[str] = []
    found = []
    for name in names:
        run = None if uri is None else _named(uri, name)
        places = [folder for folder in folders if folder.name == name][:1]
        if not places and (Path(name) / STATE_FILE).is_file():
            places = [Path(name).resolve()]
        if run is None and places:
            one, said = of_folders(places)
            run, notes = one[0], [*notes, *said]
        if run is None and _RUN_ID.fullmatch(name):
            # The id of any run, also of one that was set aside or of an attempt: the servers of the newest know it.
            run = next(filter(None, (_by_id(known, name) for known in _servers(uri, folders))), None)
        if run is None:
            known = {folder.name for folder in folders} | {
                run.name for run in (of_server(uri, _SHOWN)[0] if uri else ())
            }
            raise RecipeError(
                f"there is no run {name} {f'at {without_secrets(uri)}' if uri else f'in {storage}'}",
                fix=did_you_mean(name, known, noun="runs")
                if known
                else "name a run folder, or give --storage or --uri",
            )
        found.append(run)
    return found, list(dict.fromkeys(notes))


def _servers(uri: str | None, folders: list[Path]) -> list[str]:
    """The server that was named, or those of the newest folders."""
    if uri:
        return [uri]
    newest = ((folder, read_state(folder).get("uri", "")) for folder in folders[-_SHOWN:])
    return list(dict.fromkeys(place for folder, place in newest if place and not refusal(place, folder)))


def _named(uri: str, name: str) -> KnownRun | None:
    """The newest stage run of a name on a server; only runs of that name are read.

    Raises:
        NetworkError: the server does not answer.
    """
    quote = next((mark for mark in "'\"" if mark not in name), None)
    try:
        client = listing_client(uri, LIST_TIMEOUT_S)
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        if quote is None or not experiments:
            return None
        wanted = f"attributes.run_name = {quote}{name}{quote} and tags.stage LIKE '%'"
        page = client.search_runs(experiments, wanted, order_by=["start_time DESC"], max_results=_SHOWN)
    except Exception as error:
        raise NetworkError(
            f"MLflow at {without_secrets(uri)} does not answer: {_first_line(error)}", fix="check the address"
        ) from error
    return next((_of_run(run, uri) for run in page if run.data.tags.get(ROLE) != "attempt"), None)


def _by_id(uri: str, run_id: str) -> KnownRun | None:
    from mlflow.exceptions import MlflowException

    try:
        return _of_run(listing_client(uri, LIST_TIMEOUT_S).get_run(run_id), uri)
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
        progress=read_progress(here) if here else {},
    )


def _whole(value: object) -> int | None:
    """A number of the store as a whole one; None where it is none, for the store may be someone else's."""
    try:
        return int(cast(Any, value))
    except (TypeError, ValueError, OverflowError):
        return None


def _time(value: object) -> float | None:
    return value if isinstance(value, int | float) and 0 <= value < _LAST_TIME else None


def _first_line(error: Exception) -> str:
    return without_secrets(str(error).splitlines()[0])[:160] if str(error) else type(error).__name__
