"""A real PostgreSQL: runs that start at once on an empty database, and artifacts that have a folder of their own."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from echox.tracking.run import attach, open_run
from tests.tracking.parts import Owner, children, points, recipe, until, watchers


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import pgserver

        folder = tmp_path_factory.mktemp("pg")
        server = pgserver.get_server(folder)
    yield f"postgresql://postgres@/postgres?host={folder}"
    server.cleanup()


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[Path]:
    import os
    import signal

    yield tmp_path
    for folder in tmp_path.iterdir():
        for pid in watchers(folder):
            os.kill(pid, signal.SIGKILL)


def test_owners_that_start_at_once_on_an_empty_database_are_all_tracked(database: str, tmp_path: Path) -> None:
    owners = [Owner(tmp_path / f"storage-{number}", database) for number in range(3)]
    try:
        client = MlflowClient(database)

        def all_there() -> bool:
            found = client.search_runs([e.experiment_id for e in client.search_experiments()])
            stages = [run for run in found if run.info.run_name == "tiny-s2t"]
            return [points(client, run.info.run_id) for run in stages] == [[(n, float(n)) for n in range(1, 6)]] * 3

        until(all_there, 120)
    finally:
        for owner in owners:
            owner.kill()


def test_a_run_is_tracked_and_its_artifacts_lie_beside_the_runs(database: str, storage: Path) -> None:
    tracker = open_run(recipe("pg-s2t", uri=database), {"lr": 1}, storage=storage)
    worker = attach(tracker.handle, "rank0")
    worker.begin_attempt(1, 0, {})
    for step in (1, 2, 3):
        worker.log_metrics({"loss/total": float(step)}, step)
    (storage / "note.txt").write_text("kept")
    tracker.artifact(storage / "note.txt")
    worker.end_attempt("FINISHED", {})
    worker.finish()
    tracker.finish()
    client, run_id = MlflowClient(database), tracker.handle.run_id
    assert run_id is not None and client.get_run(run_id).info.status == "FINISHED"
    assert points(client, run_id) == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert list(children(client, run_id)) == ["pg-s2t-attempt-1"]
    experiment = client.get_experiment(client.get_run(run_id).info.experiment_id)
    if experiment.artifact_location.startswith(str(storage.as_uri())):
        assert (storage / "mlflow-artifacts" / run_id / "artifacts" / "note.txt").read_text() == "kept"
    else:  # the experiment was made by a run of another storage, and keeps its place
        assert experiment.artifact_location.startswith("file:///")
    assert Path(client.download_artifacts(run_id, "note.txt", str(storage))).read_text() == "kept"
