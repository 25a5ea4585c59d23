"""Creates or finds the runs of a folder on the server, and ends them, for the owner or for a later process."""

from __future__ import annotations

import getpass
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echox.config.paths import is_url
from echox.files import is_within
from echox.tracking import spool
from echox.tracking.database import ensure_database
from echox.tracking.delivery import Delivery
from echox.tracking.names import keeps_artifacts
from echox.tracking.state import SPOOL_FOLDER, Process, fate, read_state, update_state

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

log = logging.getLogger("echox.tracking")

TIMEOUT_S = 60
"""How long one request may take where nothing waits for it; a server that needs half a minute is slow, not away."""
_WORST = ("FAILED", "KILLED", "FINISHED")


def make_client(uri: str, timeout_s: int = TIMEOUT_S) -> MlflowClient:
    """A client that tries each request once; its callers have their own way to try again.

    Where the store is a SQLite file that is not there, it is made first.
    """
    for name, value in (("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0"), ("MLFLOW_HTTP_REQUEST_TIMEOUT", str(timeout_s))):
        os.environ.setdefault(name, value)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    from mlflow.tracking import MlflowClient

    ensure_database(uri)
    return MlflowClient(tracking_uri=uri)


def create_runs(client: MlflowClient, run_folder: Path) -> tuple[str, str]:
    """Find or create the stage run and the parent run that the state file describes; returns their ids.

    A run that the folder had before is continued, unless the store no longer has it. Repeating the call after one whose
    answer was lost finds what that one made.
    """
    from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NAME, MLFLOW_USER

    state = read_state(run_folder)
    experiment_id = _experiment(client, state)
    user = {MLFLOW_USER: _user()}
    parent = _known(client, state.get("parent_id")) or _tagged(client, experiment_id, "group", state["parent"])
    if parent is None:
        tags = {MLFLOW_RUN_NAME: state["parent"], "group": state["parent"], "scale": state["tags"]["scale"], **user}
        parent = client.create_run(experiment_id, tags=tags, run_name=state["parent"])
    elif parent.info.status != "RUNNING":
        client.update_run(parent.info.run_id, status="RUNNING")
    parent_id = str(parent.info.run_id)
    stage = _known(client, state.get("run_id")) or _tagged(client, experiment_id, "token", state["token"])
    if stage is None:
        tags = {MLFLOW_RUN_NAME: state["name"], MLFLOW_PARENT_RUN_ID: parent_id, "token": state["token"], **user}
        stage = client.create_run(experiment_id, tags={**tags, **state["tags"]}, run_name=state["name"])
    else:
        # The owner before this one is gone, and its attempt with it.
        Delivery(client, stage.info.run_id).end_attempts("FAILED", since=state["attempt"])
        client.update_run(stage.info.run_id, status="RUNNING")
        client.set_tag(stage.info.run_id, "attempt", state["tags"]["attempt"])
    run_id = str(stage.info.run_id)
    update_state(run_folder, run_id=run_id, parent_id=parent_id)
    return run_id, parent_id


def finish_pending(
    client: MlflowClient, run_folder: Path, owner: Process | None, *, foreign: bool = False
) -> str | None:
    """Deliver what every process of a run has left, and end its runs; returns the status they end with.

    For the owner at its end, and for a process that finds the owner gone. A new owner that took the run over meanwhile
    keeps it: then nothing is ended, and the answer is None. Of a `foreign` run, one that this process met in a folder,
    only files of its folder are stored as artifacts, see `Delivery`.
    """
    state = read_state(run_folder)
    if Process.of(state.get("owner")) != owner:
        return None
    run_id, parent_id = state.get("run_id"), state.get("parent_id")
    if run_id is None or parent_id is None:
        run_id, parent_id = create_runs(client, run_folder)
    replay(client, run_folder, run_id, foreign=foreign)
    now = read_state(run_folder)
    status = fate(run_folder, now)
    if Process.of(now.get("owner")) != owner:
        return None
    Delivery(client, run_id).end_attempts(status, since=now["attempt"])
    client.set_terminated(run_id, status)
    _end_parent(client, parent_id)
    if Process.of(read_state(run_folder).get("owner")) == owner:
        update_state(run_folder, status=status, closed=True)
    return status


def replay(client: MlflowClient, run_folder: Path, run_id: str, *, foreign: bool = False) -> int:
    """Send every process's journal, oldest first, and remove it; returns the number of operations.

    Errors of the server pass through and leave the rest for the next try; artifacts that are not taken are left.
    """
    delivery = Delivery(client, run_id, final=True, within=run_folder if foreign else None)
    folder = run_folder / SPOOL_FOLDER
    if not is_within(run_folder, folder):
        return 0  # a delivered journal is deleted
    sent = sum(delivery.send_file(path) for path in spool.pending(folder))
    return sent + delivery.send_postponed(folder, of_all=True)


def _end_parent(client: MlflowClient, parent_id: str) -> None:
    """The parent is RUNNING while one of its stages is; then it is what the worst of their newest runs is."""
    parent = client.get_run(parent_id)
    wanted = f"tags.`mlflow.parentRunId` = '{parent_id}'"
    newest: dict[str, str] = {}
    for run in client.search_runs([parent.info.experiment_id], wanted, order_by=["start_time ASC"]):
        newest[run.info.run_name] = run.info.status
    states = set(newest.values())
    if "RUNNING" not in states:
        client.set_terminated(parent_id, next((status for status in _WORST if status in states), "FINISHED"))


def _experiment(client: MlflowClient, state: Mapping[str, Any]) -> str:
    name = state["experiment"]
    found = client.get_experiment_by_name(name)
    if found is not None:
        if found.lifecycle_stage == "deleted":
            # Its name stays taken, so that no run could be tracked under it again.
            log.warning("experiment %s had been deleted; it is restored, for a run goes on in it", name)
            client.restore_experiment(found.experiment_id)
        return str(found.experiment_id)
    location = None
    if not keeps_artifacts(str(state["uri"])):
        kept = str(state["artifacts"])
        location = kept if is_url(kept) else Path(kept).as_uri()
    return str(client.create_experiment(name, artifact_location=location))


def _known(client: MlflowClient, run_id: str | None) -> Run | None:
    """The run of an id, or None where the store was emptied or moved, or the run was deleted."""
    from mlflow.exceptions import MlflowException

    if run_id is None:
        return None
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
    return run if run.info.lifecycle_stage == "active" else None


def _tagged(client: MlflowClient, experiment_id: str, tag: str, value: str) -> Run | None:
    """The newest run with a tag of this value; no filter can express a value that has quotes of both kinds."""
    quote = next((mark for mark in "'\"" if mark not in value), None)
    wanted = "" if quote is None else f"tags.`{tag}` = {quote}{value}{quote}"
    token = None
    while True:
        page = client.search_runs([experiment_id], wanted, page_token=token)
        found = next((run for run in page if run.data.tags.get(tag) == value), None)
        token = page.token
        if found is not None or not token:
            return found


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return str(os.getuid())
