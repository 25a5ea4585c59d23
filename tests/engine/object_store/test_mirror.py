"""Logs and progress of a run between its nodes and a real S3 server."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from saving import store_of

from echox.config.paths import run_dir
from echox.engine.object_store import mirror as module
from echox.engine.object_store.mirror import Mirror, StoredStop, mirrored
from echox.engine.stop import STOP_FILE, request, request_stop
from echox.errors import EchoXError
from echox.files import append_line
from tests.s3 import Faults


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EVERY_S", 0.05)


def wait_until(holds: object, limit_s: float = 20.0) -> None:
    deadline = time.monotonic() + limit_s
    while not holds():  # type: ignore[operator]
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.02)


def test_a_run_goes_on_with_its_logs_on_another_node(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for node, steps in (("a", (1, 2)), ("b", (3,)), ("a", (4,))):
        monkeypatch.setenv("ECHOX_CACHE", str(tmp_path / node))
        folder = run_dir(f"{bucket}/runs", "run")
        with mirrored(f"{bucket}/runs", "run", first=True):
            for step in steps:
                append_line(folder / "metrics.jsonl", json.dumps({"step": step}))
                (folder / "log").mkdir(exist_ok=True)
                append_line(folder / "log" / "rank-00000.jsonl", f"{node}{step}")
    lines = (store_of(bucket).read("metrics.jsonl") or b"").decode().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
    assert (folder / "log" / "rank-00000.jsonl").read_text().split() == ["a1", "a2", "b3", "a4"]


def test_what_an_older_attempt_left_on_a_node_does_not_go_to_the_store(bucket: str, tmp_path: Path) -> None:
    store = store_of(bucket)
    old, new = tmp_path / "old", tmp_path / "new"
    for folder, text in ((old, "old"), (new, "new")):
        first = Mirror(store, folder)
        first.bring()
        first.claim()
        (folder / "progress.json").write_text(text)
        (folder / f"{text}.txt").write_text(text)
        first.push()
    (old / "left.txt").write_text("of a killed process")
    again = Mirror(store, old)
    again.bring()
    again.push(all_of_it=True)
    assert (old / "progress.json").read_text() == "new" and store.read("progress.json") == b"new"
    assert store.read("left.txt") is None


def test_a_driver_elsewhere_sees_what_workers_write_and_they_hear_it(bucket: str, tmp_path: Path) -> None:
    store = store_of(bucket)
    driver, worker = Mirror(store, tmp_path / "head", follows=True), Mirror(store, tmp_path / "node")
    for each in (driver, worker):
        each.bring()
    worker.claim()
    heard = StoredStop(store)
    with driver, worker:
        (tmp_path / "node" / "log").mkdir()
        for number in range(3):
            append_line(tmp_path / "node" / "log" / "rank-00000.jsonl", f"{number}")
            (tmp_path / "node" / "progress.json").write_text(f'{{"step": {number}}}')
            wait_until(lambda: (tmp_path / "head" / "progress.json").is_file())
            expected = f'{{"step": {number}}}'
            wait_until(lambda: (tmp_path / "head" / "progress.json").read_text() == expected)  # noqa: B023
        wait_until(lambda: (tmp_path / "head" / "log" / "rank-00000.jsonl").read_text() == "0\n1\n2\n")
        assert heard() is None
        request_stop(tmp_path / "head", "maintenance")
        wait_until(lambda: heard() == "maintenance")
        (tmp_path / "head" / "driver.txt").write_text("mine")
        wait_until(lambda: store.read("driver.txt") == b"mine")
    assert (tmp_path / "head" / "driver.txt").read_text() == "mine"


def test_a_file_that_was_delivered_and_removed_goes_from_the_store_too(bucket: str, tmp_path: Path) -> None:
    store = store_of(bucket)
    (tmp_path / "mlflow-spool").mkdir()
    journal = tmp_path / "mlflow-spool" / "1~rank0~2.jsonl"
    journal.write_text("{}\n")
    mirror = Mirror(store, tmp_path)
    mirror.push()
    assert store.read("mlflow-spool/1~rank0~2.jsonl") == b"{}\n"
    journal.unlink()
    mirror.push()
    assert store.read("mlflow-spool/1~rank0~2.jsonl") is None


def test_checkpoints_hidden_files_and_the_count_of_attempts_are_not_mirrored(bucket: str, tmp_path: Path) -> None:
    store = store_of(bucket)
    for name in ("checkpoints/step-00000001/manifest.json", "ray/x", ".start-1", "log/.x.tmp", "attempt", "log/good"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "log" / "link").symlink_to("/etc/hostname")
    Mirror(store, tmp_path).push()
    assert sorted({**store.listed(), **store.listed("log"), **store.listed("ray")}) == ["log/good"]


def test_a_request_to_an_earlier_start_stops_nothing(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ECHOX_CACHE", str(tmp_path))
    folder, store = run_dir(f"{bucket}/runs", "run"), store_of(bucket)
    with mirrored(f"{bucket}/runs", "run", first=True):
        request_stop(folder, "once")
    assert store.read(STOP_FILE) is not None
    store.remove(STOP_FILE)  # what a new start does
    with mirrored(f"{bucket}/runs", "run", first=True):
        assert not (folder / STOP_FILE).exists()
    assert store.read(STOP_FILE) is None
    store.write(STOP_FILE, request("now").encode())
    with mirrored(f"{bucket}/runs", "run", first=True):
        assert StoredStop(store)() == "now"


def test_a_long_file_is_not_sent_again_at_every_turn(bucket: str, faults: Faults, tmp_path: Path) -> None:
    mirror = Mirror(store_of(bucket), tmp_path)
    for name, size in (("long.jsonl", 2_000_000), ("short.jsonl", 10)):
        (tmp_path / name).write_bytes(bytes(size))
    mirror.push()
    faults.requests.clear()
    time.sleep(0.1)
    for name in ("long.jsonl", "short.jsonl"):
        append_line(tmp_path / name, "more")
    mirror.push()
    assert [path.rpartition("/")[2] for method, path in faults.requests if method == "PUT"] == ["short.jsonl"]
    mirror.push(all_of_it=True)
    assert len(store_of(bucket).read("long.jsonl") or b"") == (tmp_path / "long.jsonl").stat().st_size


def test_a_store_that_is_away_ends_nothing_and_gets_all_of_it_later(
    bucket: str, faults: Faults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = store_of(bucket)
    away = True

    def tried(what: str, name: str, operation: object) -> object:
        if away:
            raise EchoXError("the store does not answer")
        return type(store)._tried(store, what, name, operation)  # type: ignore[arg-type]

    monkeypatch.setattr(store, "_tried", tried)
    with Mirror(store, tmp_path):
        (tmp_path / "metrics.jsonl").write_text("1\n")
        time.sleep(0.3)
        away = False
        wait_until(lambda: store_of(bucket).read("metrics.jsonl") == b"1\n")
    assert capsys.readouterr().err.count("warning: logs are not in the object store yet") == 1
