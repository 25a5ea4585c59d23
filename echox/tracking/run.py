"""The life of an MLflow run: found or created by the driver, continued on resume, ended exactly once."""

from __future__ import annotations

import atexit
import getpass
import json
import logging
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echox.tracking.client import MlflowTracker, RunHandle, make_client, send
from echox.tracking.names import check_uri, default_uri, metric_name

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

    from echox.config.schema import Recipe

log = logging.getLogger("echox.tracking")

STATE_FILE = "mlflow.json"
CREATE_S = 60.0
"""Creating the tables of a new SQLite store takes several seconds; a server that needs longer counts as away."""


def open_run(recipe: Recipe, params: Mapping[str, Any], *, storage: Path, recipe_name: str = "") -> MlflowTracker:
    """Create the run of a recipe, or continue it if its folder has one; the returned tracker owns it.

    The stage runs of one `tracking.parent_run` are children of one parent run. An unreachable server gives one
    warning, and everything goes to the spool until `finish` tries again.

    Args:
        recipe: the run.
        params: the resolved recipe, nested.
        storage: absolute folder of runs.
        recipe_name: the file the recipe came from, a tag.

    Raises:
        RecipeError: `tracking.uri` is a plain folder.
    """
    uri = check_uri(recipe.tracking.uri or default_uri(storage))
    run_folder = storage / recipe.name
    run_folder.mkdir(parents=True, exist_ok=True)
    state = _read_state(run_folder)
    same = state.get("uri") == uri
    handle = RunHandle(
        uri=uri,
        run_id=state.get("run_id") if same else None,
        parent_id=state.get("parent_id") if same else None,
        attempt=int(state.get("attempt", 0)) + 1,
        run_folder=run_folder,
    )
    details = {
        "name": recipe.name,
        "experiment": recipe.tracking.experiment,
        "parent": recipe.tracking.parent_run or recipe.name,
        "artifacts": str(storage / "mlflow-artifacts"),
        "tags": {
            "scale": recipe.scale,
            "stage": recipe.stage,
            "recipe": recipe_name or recipe.name,
            "attempt": str(handle.attempt),
            "run_folder": str(run_folder),
        },
    }
    _write_state(run_folder, {**details, "uri": uri, "run_id": handle.run_id, "attempt": handle.attempt})
    handle = _create_in_time(handle)
    tracker = MlflowTracker(handle, writer="driver", owner=True)
    atexit.register(tracker.finish, "FAILED")  # does nothing after an orderly finish
    tracker.log_params(params)
    return tracker


def attach(handle: RunHandle, writer: str) -> MlflowTracker:
    """A tracker for another process of the same run; its `finish` sends what is queued and leaves the run open."""
    return MlflowTracker(handle, writer=writer)


def create_runs(client: MlflowClient, handle: RunHandle) -> RunHandle:
    """Find or create the parent and the stage run that the state file describes; returns the complete handle."""
    from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NAME, MLFLOW_USER

    state = _read_state(handle.run_folder)
    experiment = client.get_experiment_by_name(state["experiment"])
    if experiment is None:
        local = handle.uri.startswith("sqlite:")
        experiment_id = client.create_experiment(
            state["experiment"], artifact_location=Path(state["artifacts"]).as_uri() if local else None
        )
    else:
        experiment_id = experiment.experiment_id
    user = {MLFLOW_USER: _user()}
    parent_id = handle.parent_id or _find_parent(client, experiment_id, state["parent"])
    if parent_id is None:
        tags = {MLFLOW_RUN_NAME: state["parent"], "group": state["parent"], "scale": state["tags"]["scale"], **user}
        parent_id = client.create_run(experiment_id, tags=tags, run_name=state["parent"]).info.run_id
    else:
        client.update_run(parent_id, status="RUNNING")
    run_id = handle.run_id
    if run_id is None:
        tags = {MLFLOW_RUN_NAME: state["name"], MLFLOW_PARENT_RUN_ID: parent_id, **state["tags"], **user}
        run_id = client.create_run(experiment_id, tags=tags, run_name=state["name"]).info.run_id
    else:
        client.update_run(run_id, status="RUNNING")
        client.set_tag(run_id, "attempt", state["tags"]["attempt"])
    handle = replace(handle, run_id=run_id, parent_id=parent_id)
    _write_state(handle.run_folder, {**state, "run_id": run_id, "parent_id": parent_id})
    return handle


def end_runs(client: MlflowClient, handle: RunHandle, status: str) -> None:
    """End the stage run, and its parent with the same status: the parent is RUNNING only while a stage is."""
    assert handle.run_id is not None
    client.set_terminated(handle.run_id, status)
    if handle.parent_id is not None:
        client.set_terminated(handle.parent_id, status)


def close_orphan(run_folder: Path, status: str = "KILLED") -> bool:
    """End the run of a folder whose driver was killed before it could; True if one was still RUNNING."""
    state = _read_state(run_folder)
    if not state.get("run_id"):
        return False
    client = make_client(state["uri"])
    if client.get_run(state["run_id"]).info.status != "RUNNING":
        return False
    handle = RunHandle(
        uri=state["uri"],
        run_id=state["run_id"],
        parent_id=state.get("parent_id"),
        attempt=state["attempt"],
        run_folder=run_folder,
    )
    end_runs(client, handle, status)
    return True


def _create_in_time(handle: RunHandle) -> RunHandle:
    """`create_runs` in a thread that is given up after `CREATE_S`."""
    made: list[RunHandle] = []
    failed: list[BaseException] = []

    def create() -> None:
        try:
            client = make_client(handle.uri)
            try:
                made.append(create_runs(client, handle))
            except Exception:
                if handle.run_id is None and handle.parent_id is None:
                    raise
                # The store was moved or emptied since the last attempt: start afresh in it.
                made.append(create_runs(client, replace(handle, run_id=None, parent_id=None)))
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=create, name="mlflow-create", daemon=True)
    thread.start()
    thread.join(CREATE_S)
    if made:
        return made[0]
    reason = str(failed[0]).splitlines()[0][:200] if failed and str(failed[0]) else f"no answer in {CREATE_S:.0f} s"
    log.warning(
        "MLflow at %s does not answer (%s); training goes on, and the run is recorded in %s until it is back",
        handle.uri,
        reason,
        handle.spool_folder,
    )
    return replace(handle, run_id=None, parent_id=None)


def _find_parent(client: MlflowClient, experiment_id: str, group: str) -> str | None:
    quoted = group.replace("'", "")
    found = client.search_runs([experiment_id], f"tags.`group` = '{quoted}'", max_results=1)
    return found[0].info.run_id if found else None


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return str(os.getuid())


def _read_state(run_folder: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = json.loads((run_folder / STATE_FILE).read_text())
    except (OSError, json.JSONDecodeError):
        return {}
    return state


def _write_state(run_folder: Path, state: Mapping[str, Any]) -> None:
    path = run_folder / STATE_FILE
    partial = path.with_suffix(f".{os.getpid()}.tmp")
    partial.write_text(json.dumps(state, indent=1, default=str) + "\n")
    partial.replace(path)


def record(run_folder: Path, *, metrics: Mapping[str, float], artifacts: Mapping[Path, str | None], step: int) -> bool:
    """Add results to a run that has ended, such as its evaluation; its status stays. False if the server is away.

    Args:
        run_folder: folder of the run.
        metrics: values by name.
        artifacts: file to the folder of the run's artifacts it goes to.
        step: optimizer step the values belong to.
    """
    state = _read_state(run_folder)
    if not state.get("run_id"):
        return False
    now = int(time.time() * 1000)
    items = [[metric_name(key), float(value), now, step] for key, value in metrics.items()]
    try:
        client = make_client(state["uri"])
        send(client, state["run_id"], {"kind": "metrics", "items": items}, state["attempt"])
        for path, folder in artifacts.items():
            client.log_artifact(state["run_id"], str(path), folder)
    except Exception as error:
        log.warning("the results of %s could not be added to MLflow at %s: %s", run_folder.name, state["uri"], error)
        return False
    return True


def uri_of(run_folder: Path) -> str | None:
    """Tracking URI of the run in a folder, or None if it has none."""
    uri = _read_state(run_folder).get("uri")
    return str(uri) if uri else None
