"""Checkpoints in a real S3 server: whole or not there, whoever dies when, and never more than they should be."""

from __future__ import annotations

import json
import os
import random
import threading
from pathlib import Path
from typing import Any

import pytest
from saving import RANKS, begin, objects, save, step_in, store_of

from echox.engine.checkpoint.manifest import MANIFEST, WEIGHTS, step_of, verify
from echox.engine.checkpoint.retention import Retention
from echox.engine.monitor.run_dir import RunDir
from echox.engine.object_store.checkpoints import PublishedCheckpoints
from echox.engine.object_store.run_store import RunStore
from echox.errors import CheckpointError
from tests.s3 import Faults

PARTS = [
    f"{folder}/rank-{rank:05d}.{kind}" for folder, kind in (("rng", "json"), ("zero", "safetensors")) for rank in (0, 1)
]
FILES = sorted([MANIFEST, WEIGHTS, *PARTS])


class Died(Exception):
    """A process that ends here."""


class Mortal(RunStore):
    """A store whose user dies before one of its changes.

    Attributes:
        left: changes that it lives to see.
    """

    left = 10**9

    def _tried(self, what: str, name: str, operation: Any) -> Any:
        if what in ("writing", "uploading", "deleting"):
            if self.left == 0:
                raise Died
            self.left -= 1
        return super()._tried(what, name, operation)


def kept(bucket: str) -> dict[str, list[str]]:
    """Folder of a checkpoint to the files in it."""
    found: dict[str, list[str]] = {}
    for key in objects(bucket, dict(os.environ)):
        parts = key.split("/")
        if len(parts) > 4 and parts[2] == "checkpoints":
            found.setdefault(parts[3], []).append("/".join(parts[4:]))
    return {folder: sorted(files) for folder, files in found.items()}


def test_dead_at_any_change_of_the_store_a_resume_finds_a_whole_checkpoint(bucket: str, tmp_path: Path) -> None:
    steps = []
    for change in range(40):
        store = Mortal(f"{bucket}/runs/run-{change}")
        published = begin(store, tmp_path / f"{change}")
        save(published, tmp_path / f"{change}", 1, retention=Retention(last=1))
        store.left = change
        try:
            save(published, tmp_path / f"{change}", 2, retention=Retention(last=1))
        except Died:
            dead = True
        else:
            dead = False
        # A node that has seen nothing of it goes on.
        calm = store_of(bucket, f"run-{change}")
        resumed = begin(calm, tmp_path / f"{change}" / "new")
        choice, _ = resumed.choose(tmp_path / f"{change}" / "new")
        assert choice.checkpoint is not None and not choice.rejected
        steps.append(step_in(tmp_path, choice.checkpoint.path))
        assert steps[-1] == choice.checkpoint.manifest["step"] == step_of(choice.checkpoint.path)
        verify(choice.checkpoint.path)
        for folder, files in kept(bucket).items():
            assert files == FILES, f"{folder} is not whole, or was left behind"
        for key in objects(bucket, dict(os.environ)):
            calm._fs.rm_file(f"{bucket}/{key}")
        if not dead:
            break
    assert steps == sorted(steps) and set(steps) == {1, 2} and not dead
    assert len(steps) > 2 * RANKS + 4, "a save changes the store more often"


def test_an_older_attempt_can_neither_add_nor_take_away(bucket: str, tmp_path: Path) -> None:
    store = store_of(bucket)
    old = begin(store, tmp_path / "old" / "node-0")
    save(old, tmp_path / "old", 1)
    new = begin(store, tmp_path / "new" / "node-0")
    save(new, tmp_path / "new", 2)

    def allowed() -> None:
        RunDir(tmp_path / "old" / "node-0", store).check_attempt(1)

    with pytest.raises(CheckpointError, match="attempt 2 of this run has begun"):
        save(old, tmp_path / "old", 3, allowed=allowed)
    save(old, tmp_path / "old", 3, number=2)  # even if the check came too early
    reader = PublishedCheckpoints(store)
    assert [entry["step"] for entry in reader.entries()] == [2, 1]
    choice, _ = reader.choose(tmp_path / "reader")
    assert choice.checkpoint is not None and choice.checkpoint.manifest["step"] == 2


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        *((file, "flipped") for file in (MANIFEST, WEIGHTS, PARTS[0], PARTS[3])),
        (WEIGHTS, "cut"),
        (MANIFEST, "gone"),
        (PARTS[2], "gone"),
    ],
)
def test_damage_in_the_store_is_seen_and_the_checkpoint_before_taken(
    file: str, damage: str, bucket: str, tmp_path: Path
) -> None:
    store = store_of(bucket)
    published = begin(store, tmp_path / "node-0")
    save(published, tmp_path, 1)
    save(published, tmp_path, 2)
    name = f"checkpoints/step-00000002.1.1/{file}"
    data = store.read(name)
    assert data is not None
    if damage == "gone":
        store.remove(name)
    else:
        middle = len(data) // 2
        flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        store.write(name, data[:-1] if damage == "cut" else flipped)
    again = begin(store, tmp_path / "other")
    choice, _ = again.choose(tmp_path / "other")
    assert choice.checkpoint is not None and step_in(tmp_path, choice.checkpoint.path) == 1
    if (file, damage) == (MANIFEST, "gone"):
        assert not choice.rejected, "without a manifest it was never published"
        return
    ((place, why),) = choice.rejected
    assert place.name == "step-00000002.1.1" and file in why
    again.set_damaged({place.name: why})
    later = begin(store, tmp_path / "third")
    choice, entry = later.choose(tmp_path / "third")
    assert entry is not None and entry["step"] == 1 and not choice.rejected, "it is not looked at again"
    assert [each["damaged"] for each in later.entries()] == [why, ""]
    if damage != "gone":
        assert store.read(name) is not None, "it stays for those who look for the reason"


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(bucket: str, tmp_path: Path) -> None:
    store = store_of(bucket)
    published = begin(store, tmp_path / "node-0")
    for step in (1, 2):
        save(published, tmp_path, step)
        store.write(f"checkpoints/step-{step:08d}.1.1/{WEIGHTS}", b"other")
    with pytest.raises(CheckpointError, match=r"every checkpoint is damaged \(step-00000002.* step-00000001"):
        PublishedCheckpoints(store).choose(tmp_path / "other")


@pytest.mark.parametrize(
    "index",
    [
        b"[]",
        b"{",
        b"[" * 100_000,
        json.dumps(
            {
                "checkpoints": [{"step": 1, "folder": "../../other", "ranks": 1, "metrics": {}, "damaged": ""}],
                "retired": [],
            }
        ),
        json.dumps(
            {"checkpoints": [{"step": 1, "folder": "/etc", "ranks": 1, "metrics": {}, "damaged": ""}], "retired": []}
        ),
        json.dumps(
            {"checkpoints": [{"step": "x", "folder": "a", "ranks": 1, "metrics": {}, "damaged": ""}], "retired": []}
        ),
    ],
    ids=["list", "cut", "deep", "outside", "absolute", "no number"],
)
def test_an_index_from_elsewhere_is_one_sentence(index: str | bytes, bucket: str, tmp_path: Path) -> None:
    store = store_of(bucket)
    store.write("attempt", b"1\n")
    store.write("checkpoints/index-000001.json", index if isinstance(index, bytes) else index.encode())
    with pytest.raises(CheckpointError, match="the index of checkpoints cannot be read"):
        PublishedCheckpoints(store).choose(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_of_two_checkpoints_of_one_step_the_later_is_asked_first(bucket: str) -> None:
    store = store_of(bucket)
    index = [{"step": step, "folder": folder, "ranks": 1, "metrics": {}, "damaged": ""} for step, folder in
             ((1, "early"), (2, "middle"), (1, "late"))]  # fmt: skip
    store.write("attempt", b"1\n")
    store.write("checkpoints/index-000001.json", json.dumps({"checkpoints": index, "retired": []}).encode())
    assert [entry["folder"] for entry in PublishedCheckpoints(store).entries()] == ["middle", "late", "early"]


def test_a_manifest_may_not_name_files_outside_its_folder(bucket: str, tmp_path: Path) -> None:
    from echox.engine.checkpoint.manifest import _seal

    store = store_of(bucket)
    published = begin(store, tmp_path / "node-0")
    save(published, tmp_path, 1)
    manifest = json.loads(store.read("checkpoints/step-00000001.1.1/manifest.json") or b"")
    body = {key: value for key, value in manifest.items() if key != "sha256"}
    body["files"]["../../../../outside"] = body["files"][WEIGHTS]
    store.write("checkpoints/step-00000001.1.1/manifest.json", json.dumps({**body, "sha256": _seal(body)}).encode())
    with pytest.raises(CheckpointError, match="has fields of other types"):
        PublishedCheckpoints(store).choose(tmp_path / "deep" / "node")
    assert not list(tmp_path.rglob("outside"))


def test_what_is_kept_follows_the_rule_of_folders(bucket: str, tmp_path: Path) -> None:
    chance = random.Random(5)
    rule = Retention(last=2, every=4, best="loss")
    store = store_of(bucket)
    published, metrics = begin(store, tmp_path / "node-0"), {}
    alive: set[int] = set()
    for step in range(1, 10):
        metrics[step] = {"loss": chance.random()}
        save(published, tmp_path, step, retention=rule, metrics=metrics[step])
        alive = {*alive, step}
        alive -= set(rule.doomed({each: metrics[each] for each in alive}))
        assert {step_of(Path(name.partition(".")[0])) for name in kept(bucket)} == alive
        assert {step_of(path) for path in (tmp_path / "node-0" / "checkpoints").glob("step-*")} == alive


def test_of_two_saves_of_one_step_the_later_counts_and_the_earlier_goes(bucket: str, tmp_path: Path) -> None:
    store = store_of(bucket)
    published = begin(store, tmp_path / "node-0")
    save(published, tmp_path, 1, number=1)
    save(published, tmp_path, 1, number=2)
    assert list(kept(bucket)) == ["step-00000001.1.2"]


def test_a_save_that_failed_leaves_nothing(bucket: str, tmp_path: Path) -> None:
    store = store_of(bucket)
    published = begin(store, tmp_path / "node-0")

    def refuse() -> None:
        raise CheckpointError("no")

    with pytest.raises(CheckpointError):
        save(published, tmp_path, 1, allowed=refuse)
    published.forget("step-00000001.1.1")
    assert kept(bucket) == {} and published.entries() == []


def test_a_node_brings_each_file_once_whoever_asks(bucket: str, faults: Faults, tmp_path: Path) -> None:
    store = store_of(bucket)
    save(begin(store, tmp_path / "node-0"), tmp_path, 1)
    faults.requests.clear()
    found: list[Path] = []

    def ask(only: tuple[str, ...] | None) -> None:
        choice, _ = PublishedCheckpoints(store_of(bucket)).choose(tmp_path / "reader", only)
        assert choice.checkpoint is not None
        found.append(choice.checkpoint.path)

    for only in ((WEIGHTS,), None):
        threads = [threading.Thread(target=ask, args=(only,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 8 and verify(found[0])
    gets = [path for method, path in faults.requests if method == "GET"]
    for file in (WEIGHTS, *PARTS):
        assert sum(path.endswith(f"step-00000001.1.1/{file}") for path in gets) == 1, file


def test_what_lies_on_a_node_counts_only_if_it_is_what_the_store_has(bucket: str, tmp_path: Path) -> None:
    store = store_of(bucket)
    save(begin(store, tmp_path / "node-0"), tmp_path, 1)
    node = tmp_path / "reader"
    choice, _ = PublishedCheckpoints(store).choose(node)
    assert choice.checkpoint is not None
    (choice.checkpoint.path / WEIGHTS).write_bytes(b"other weights")
    (choice.checkpoint.path / "zero" / "rank-00000.safetensors").unlink()
    again, _ = PublishedCheckpoints(store).choose(node)
    assert again.checkpoint is not None and verify(again.checkpoint.path)
    # Another run of this name has lain here: its checkpoint of the same step is another one.
    (choice.checkpoint.path / MANIFEST).write_text("{}")
    again, _ = PublishedCheckpoints(store).choose(node)
    assert again.checkpoint is not None and verify(again.checkpoint.path)
