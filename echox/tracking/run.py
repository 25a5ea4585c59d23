"""Opens the MLflow run of a recipe as its owner, shares it with workers, and repairs it when an owner died."""

from __future__ import annotations

import atexit
import logging
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echox.config.paths import is_url
from echox.errors import LaunchError, RecipeError
from echox.tracking.client import MlflowTracker, RunHandle
from echox.tracking.delivery import STAGE, Delivery
from echox.tracking.lifecycle import finish_pending, make_client
from echox.tracking.names import default_uri, experiment_name, metric_name, tracking_uri
from echox.tracking.servers import listing_client, refusal
from echox.tracking.state import (
    BEAT_S,
    Process,
    counted_attempts,
    end_state,
    last_beat,
    last_sign,
    read_state,
    unfinished,
    update_state,
)
from echox.tracking.watcher import start_watcher

if TYPE_CHECKING:
    from echox.config.run_recipe import RunRecipe

log = logging.getLogger("echox.tracking")

CREATE_S = 30.0
"""How long the start of a run waits for the server. It goes on without, and the runs are created when it answers."""
SILENT_S = 900.0
"""A run of another machine without a change to its files for so long has lost its owner."""


def open_run(recipe: RunRecipe, params: Mapping[str, Any], *, storage: Path, recipe_name: str = "") -> MlflowTracker:
    """Create the run of a recipe, or continue it if its folder has one; the returned tracker owns it.

    The stage runs of one `tracking.parent_run` are children of one parent run, and each has its attempts as children.
    An unreachable server gives one warning, and the journal keeps everything until it answers. A watcher process ends
    the run should this process die. The name of a run is its folder below the storage: a second start under the same
    name is the same run, and is refused while the first one lives.

    Args:
        recipe: the run.
        params: the resolved recipe, nested.
        storage: absolute folder of runs.
        recipe_name: the file the recipe came from, a tag.

    Raises:
        RecipeError: `tracking.uri` is a plain folder, or there is none and the storage is an object store.
        LaunchError: the run is being trained by another process.
    """
    uri = tracking_uri(recipe.tracking.uri, storage)
    if is_url(recipe.storage) and uri == default_uri(storage):
        raise RecipeError(
            f"runs in {recipe.storage} have no folder for a tracking database",
            where="tracking.uri",
            fix="start `mlflow server` on a machine that stays, and set tracking.uri or MLFLOW_TRACKING_URI to its URL",
        )
    run_folder = storage / recipe.name
    run_folder.mkdir(parents=True, exist_ok=True)
    state = read_state(run_folder)
    _refuse_if_owned(run_folder, state)
    same = state.get("uri") == uri
    handle = RunHandle(
        uri=uri,
        run_id=state.get("run_id") if same else None,
        parent_id=state.get("parent_id") if same else None,
        attempt=max(int(state.get("attempt", 0)), counted_attempts(run_folder)) + 1,
        run_folder=run_folder,
    )
    update_state(
        run_folder,
        name=recipe.name,
        experiment=experiment_name(recipe.tracking.experiment),
        parent=recipe.tracking.parent_run or recipe.name,
        artifacts=f"{recipe.storage.rstrip('/') if is_url(recipe.storage) else storage}/mlflow-artifacts",
        tags={
            "scale": recipe.scale,
            "stage": recipe.stage,
            "recipe": recipe_name or recipe.name,
            "attempt": str(handle.attempt),
            "run_folder": str(run_folder),
        },
        token=state.get("token") or uuid.uuid4().hex,
        uri=uri,
        run_id=handle.run_id,
        parent_id=handle.parent_id,
        attempt=handle.attempt,
        owner=Process.current().record(),
        started=state.get("started") or time.time(),
        status="RUNNING",
        ended=None,
        closed=False,
    )
    start_watcher(handle, hours=recipe.tracking.deliver_hours)
    tracker = MlflowTracker(handle, writer="driver", owner=True)
    atexit.register(tracker.finish, "FAILED")  # does nothing after an orderly finish
    tracker.log_params(params)
    tracker.contacted.wait(CREATE_S)
    return tracker


def attach(handle: RunHandle, writer: str) -> MlflowTracker:
    """A tracker for another process of the same run; its `finish` sends what is queued and leaves the run open.

    Args:
        handle: the run, from the owner.
        writer: `rank0` for the first rank, another name for each further process.
    """
    return MlflowTracker(handle, writer=writer)


def close_orphan(run_folder: Path, status: str = "KILLED") -> bool:
    """End the run of a folder whose owner was killed before it could; True if it was not ended yet."""
    state = read_state(run_folder)
    if not unfinished(state):
        return False
    if state["status"] == "RUNNING":
        end_state(run_folder, status)
    finish_pending(make_client(state["uri"]), run_folder, Process.of(state.get("owner")))
    return True


def repair(run_folder: Path) -> str | None:
    """End the run of a folder if its owner is gone; returns the status it got, or None if there was nothing to do.

    Gone is an owner whose process this machine no longer has, or one of another machine that was silent for long.
    """
    state = read_state(run_folder)
    owner = Process.of(state.get("owner"))
    if not unfinished(state) or owner is None or owner.alive():
        return None
    silent_s = time.time() - last_sign(run_folder)
    if silent_s < (3 * BEAT_S if owner.here() else SILENT_S) or (not owner.here() and _beats(run_folder)):
        return None  # its watcher is at work, or it lives elsewhere
    if refusal(state.get("uri", ""), run_folder):
        return None
    return finish_pending(listing_client(state["uri"], 10), run_folder, owner, foreign=True)


def record(run_folder: Path, *, metrics: Mapping[str, float], artifacts: Mapping[Path, str | None], step: int) -> bool:
    """Add results to a run that has ended, such as its evaluation; its status stays. False if the server is away.

    Args:
        run_folder: folder of the run.
        metrics: values by name.
        artifacts: file to the folder of the run's artifacts it goes to.
        step: optimizer step the values belong to.
    """
    state = read_state(run_folder)
    if not state.get("run_id"):
        return False
    now = int(time.time() * 1000)
    items = [[metric_name(key), float(value), now, step] for key, value in metrics.items()]
    try:
        client = make_client(state["uri"], timeout_s=10)
        Delivery(client, state["run_id"]).send({"kind": "metrics", "runs": [STAGE], "items": items})
        for path, folder in artifacts.items():
            client.log_artifact(state["run_id"], str(path), folder)
    except Exception as error:
        log.warning("the results of %s could not be added to MLflow at %s: %s", run_folder.name, state["uri"], error)
        return False
    return True


def uri_of(run_folder: Path) -> str | None:
    """Tracking URI of the run in a folder, or None if it has none."""
    uri = read_state(run_folder).get("uri")
    return str(uri) if uri else None


def _refuse_if_owned(run_folder: Path, state: Mapping[str, Any]) -> None:
    """Two processes that train one run would write over each other's checkpoints and metrics."""
    owner = Process.of(state.get("owner"))
    if owner is None or state.get("status") != "RUNNING" or owner == Process.current():
        return
    if owner.alive() or (not owner.here() and _beats(run_folder)):
        raise LaunchError(
            f"run {run_folder.name} is being trained by process {owner.pid} on {owner.host}",
            where=str(run_folder),
            fix="stop that one first, or give this one another name=... or storage=...",
        )


def _beats(run_folder: Path) -> bool:
    """Whether a heartbeat comes within the time in which one must; clocks of two machines are not compared."""
    before, until = last_beat(run_folder), time.monotonic() + 2 * BEAT_S
    if not before:
        return False
    while time.monotonic() < until:
        if last_beat(run_folder) != before:
            return True
        if read_state(run_folder).get("status") != "RUNNING":
            return False
        time.sleep(0.2)
    return False
