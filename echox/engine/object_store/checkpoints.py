"""Publishes a run's checkpoints in an object store, and brings them to the folders of its nodes.

The order is the protocol, as it is in a folder, without renames and without listings:

1. `checkpoints/index-000003.json` of attempt 3 names the folder that a save will fill. Each save has its own.
2. Every rank uploads its parts into it; rank 0 adds the whole weights.
3. The manifest comes last. A folder without one is no checkpoint.
4. What is retired is named so in the index before its files are deleted.

Every attempt has an index of its own, made from the one before when it starts. So an older attempt that still lives can
add nothing to what a newer one, or a reader, sees.
"""

from __future__ import annotations

import calendar
import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from echox.engine.checkpoint.contents import FileEntry, Manifest
from echox.engine.checkpoint.manifest import (
    CREATED,
    MANIFEST,
    WEIGHTS,
    Checkpoint,
    Choice,
    checkpoints_folder,
    list_checkpoints,
    parse_manifest,
    step_name,
    step_of,
)
from echox.engine.checkpoint.retention import Retention
from echox.engine.checkpoint.writer import part_files
from echox.engine.monitor.run_dir import newest_attempt
from echox.engine.object_store.run_store import RunStore
from echox.errors import CheckpointError, EchoXError
from echox.files import exclusive, names_inside, parse_json, sha256_file, write_atomically

if TYPE_CHECKING:
    from echox.engine.world import World

_FOLDER = "checkpoints"


class Entry(TypedDict):
    """One checkpoint in an index, published or about to be.

    Attributes:
        step: optimizer step.
        folder: where its files are, below `checkpoints/`.
        ranks: that write parts.
        metrics: of its manifest, once it is published by this attempt.
        damaged: why a resume did not trust it; empty for one that may be used.
    """

    step: int
    folder: str
    ranks: int
    metrics: dict[str, float]
    damaged: str


@dataclass
class PublishedCheckpoints:
    """The checkpoints of one run in its store; rank 0 alone changes the index.

    Attributes:
        store: of the run.
    """

    store: RunStore
    _attempt: int = 0
    _entries: list[Entry] = field(default_factory=list)
    _gone: list[Entry] = field(default_factory=list)

    # Reading.

    def entries(self) -> list[Entry]:
        """What the newest index names, newest step first; not all of it needs to be published."""
        found, _ = self._index()
        return sorted(reversed(found), key=lambda each: -each["step"])  # of two of one step, the later first

    def _index(self) -> tuple[list[Entry], list[Entry]]:
        """Entries of the newest index in the order of their saves, and those it has retired."""
        for attempt in range(newest_attempt(self.store), 0, -1):
            data = self.store.read(_index(attempt))
            if data is not None:
                return _parsed(data, self.store.where(_index(attempt)))
        return [], []

    def choose(self, run_folder: Path, only: Sequence[str] | None = None) -> tuple[Choice, Entry | None]:
        """Bring the newest checkpoint that verifies to a run's folder on this node.

        Args:
            run_folder: on this node.
            only: names of the files that are needed; None for all.

        Raises:
            CheckpointError: there are checkpoints and all are damaged.
            TransientReadError: the store does not answer.
        """
        rejected: list[tuple[Path, str]] = []
        for entry in self.entries():
            if entry["damaged"]:
                continue
            try:
                checkpoint = self.bring(entry, run_folder, only)
            except CheckpointError as error:
                rejected.append((Path(entry["folder"]), error.what))
                continue
            if checkpoint is not None:
                return Choice(checkpoint=checkpoint, rejected=tuple(rejected)), entry
        if rejected:
            reasons = "; ".join(f"{path.name}: {why}" for path, why in rejected)
            raise CheckpointError(
                f"every checkpoint is damaged ({reasons})",
                where=self.store.where(_FOLDER),
                fix="restore one from a copy, or give the run another name to start over",
            )
        return Choice(checkpoint=None), None

    def bring(self, entry: Entry, run_folder: Path, only: Sequence[str] | None = None) -> Checkpoint | None:
        """Bring a checkpoint to this node, once for all its processes; None where it was never published.

        Files that are there and match the manifest are not brought again.

        Raises:
            CheckpointError: a file is missing or not what the manifest says.
        """
        folder = checkpoints_folder(run_folder)
        folder.mkdir(parents=True, exist_ok=True)
        final = folder / step_name(entry["step"])
        with exclusive(folder / ".bringing"):
            data = self._manifest_bytes(entry)
            if data is None:
                return None
            manifest = parse_manifest(data, self._where(entry))
            if final.exists() and not _holds(final / MANIFEST, data):
                shutil.rmtree(final)
            for name in manifest["files"] if only is None else only:
                self._bring_file(entry, name, manifest, final)
            if not _holds(final / MANIFEST, data):
                final.mkdir(exist_ok=True)
                write_atomically(final / MANIFEST, data.decode())
                with contextlib.suppress(KeyError, TypeError, ValueError):  # its age is that of the checkpoint
                    published = calendar.timegm(time.strptime(manifest["created"], CREATED))
                    os.utime(final / MANIFEST, (published, published))
        return Checkpoint(path=final, manifest=manifest)

    def _bring_file(self, entry: Entry, name: str, manifest: Manifest, final: Path) -> None:
        expected, path = manifest["files"].get(name), final / name
        if expected is None:
            raise CheckpointError(f"{name} is missing", where=self._where(entry))
        if path.is_file() and path.stat().st_size == expected["bytes"] and sha256_file(path) == expected["sha256"]:
            return
        if not self.store.download(f"{_FOLDER}/{entry['folder']}/{name}", path, expected):
            raise CheckpointError(f"{name} is missing", where=self._where(entry))

    def _manifest_bytes(self, entry: Entry) -> bytes | None:
        return self.store.read(f"{_FOLDER}/{entry['folder']}/{MANIFEST}")

    def _where(self, entry: Entry) -> str:
        return self.store.where(f"{_FOLDER}/{entry['folder']}")

    def on_every_node(
        self, choice: Choice, entry: Entry | None, run_folder: Path, world: World, *, brings: bool
    ) -> Choice:
        """Bring what rank 0 has chosen to the other nodes; each rank gets the choice with the folder of its node.

        Args:
            choice, entry: of `choose`, the same on every rank.
            run_folder: on this node.
            world: of the run.
            brings: whether this rank does that for its node.

        Raises:
            CheckpointError, TransientReadError: a node could not have it; on every rank.
        """
        if choice.checkpoint is None or entry is None:
            return choice
        problem: EchoXError | None = None
        if brings and not world.is_main:
            try:
                self.bring(entry, run_folder)
            except EchoXError as error:
                problem = error
        for each in world.all_gather(problem):
            if each is not None:
                raise each
        here = checkpoints_folder(run_folder) / step_name(entry["step"])
        if brings and not world.is_main:  # whose saves delete older ones where it is
            for path in list_checkpoints(run_folder):
                if path != here:
                    shutil.rmtree(path, ignore_errors=True)
        return replace(choice, checkpoint=Checkpoint(path=here, manifest=choice.checkpoint.manifest))

    # Writing: rank 0, but for `upload`.

    def begin_attempt(self, attempt: int) -> None:
        """Take the index over from the attempts before this one, without what they left unfinished."""
        self._attempt = attempt
        entries, self._gone = self._index()
        for entry in entries:
            (self._gone if self._manifest_bytes(entry) is None else self._entries).append(entry)
        self._write_index()
        self._delete_gone()

    def set_damaged(self, reasons: Mapping[str, str]) -> None:
        """Note that checkpoints, by folder, are not trusted; they stay for inspection."""
        for entry in self._entries:
            entry["damaged"] = entry["damaged"] or reasons.get(entry["folder"], "")
        self._write_index()

    def announce(self, step: int, folder: str, ranks: int) -> None:
        """Name a checkpoint that will be written; from here on its files can be found again."""
        self._entries.append({"step": step, "folder": folder, "ranks": ranks, "metrics": {}, "damaged": ""})
        self._write_index()

    def upload(self, local: Path, folder: str, names: Iterable[str]) -> None:
        """Upload files of a checkpoint."""
        for name in names:
            self.store.upload(local / name, f"{_FOLDER}/{folder}/{name}")

    def fetch(self, local: Path, folder: str, files: Mapping[str, FileEntry]) -> None:
        """Bring the parts that ranks of other nodes uploaded."""
        for name, expected in files.items():
            if not (local / name).is_file():
                self.store.download(f"{_FOLDER}/{folder}/{name}", local / name, expected)

    def forget(self, folder: str) -> None:
        """Delete what a save that failed has left, as far as the store answers."""
        for entry in [each for each in self._entries if each["folder"] == folder]:
            self._entries.remove(entry)
            self._gone.append(entry)
        with contextlib.suppress(EchoXError):
            self._write_index()
            self._delete_gone()

    def retire(self, folder: str, metrics: Mapping[str, float], retention: Retention, run_folder: Path) -> None:
        """After a checkpoint was published: delete those that the rule does not keep, here and on this node.

        What the store does not take now is deleted after the next save.
        """
        for entry in self._entries:
            if entry["folder"] == folder:
                entry["metrics"] = dict(metrics)
        trusted = [entry for entry in self._entries if not entry["damaged"]]
        newest = {entry["step"]: entry for entry in trusted}
        doomed = set(retention.doomed({step: entry["metrics"] for step, entry in newest.items()}))
        self._gone += [each for each in trusted if each["step"] in doomed or each is not newest[each["step"]]]
        self._entries = [each for each in self._entries if each not in self._gone]
        with contextlib.suppress(EchoXError):
            self._write_index()
            self._delete_gone()
        kept = {entry["step"] for entry in self._entries}
        for path in list_checkpoints(run_folder):
            if step_of(path) not in kept:
                shutil.rmtree(path, ignore_errors=True)

    def _delete_gone(self) -> None:
        """Delete the files of what is retired; the next index no longer names it."""
        while self._gone:
            entry = self._gone[0]
            for name in (MANIFEST, WEIGHTS, *part_files(entry["ranks"])):
                self.store.remove(f"{_FOLDER}/{entry['folder']}/{name}")
            self._gone.pop(0)

    def _write_index(self) -> None:
        index = {"checkpoints": self._entries, "retired": self._gone}
        self.store.write(_index(self._attempt), json.dumps(index, indent=1).encode())


def _index(attempt: int) -> str:
    return f"{_FOLDER}/index-{attempt:06d}.json"


def _parsed(data: bytes, where: str) -> tuple[list[Entry], list[Entry]]:
    try:
        index = parse_json(data)
        return [_entry(each) for each in index["checkpoints"]], [_entry(each) for each in index["retired"]]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"the index of checkpoints cannot be read: {error}", where=where, fix="restore the object from a copy"
        ) from None


def _entry(record: Mapping[str, Any]) -> Entry:
    folder = str(record["folder"])
    if not names_inside(folder):
        raise ValueError(f"{folder!r} is no name of a folder")
    return {
        "step": int(record["step"]),
        "folder": folder,
        "ranks": int(record["ranks"]),
        "metrics": dict(record["metrics"]),
        "damaged": str(record["damaged"]),
    }


def _holds(path: Path, data: bytes) -> bool:
    return path.is_file() and path.read_bytes() == data


@dataclass(frozen=True)
class StoreUpload:
    """The way of one save into the store; see `Upload`.

    Attributes:
        checkpoints: of the run.
        step: of the save.
        folder: its own, below `checkpoints/`.
        ranks: that write parts.
    """

    checkpoints: PublishedCheckpoints
    step: int
    folder: str
    ranks: int

    def begin(self) -> None:
        """Name the folder in the index."""
        self.checkpoints.announce(self.step, self.folder, self.ranks)

    def part(self, temporary: Path, files: Mapping[str, FileEntry]) -> None:
        """Upload what a rank has written."""
        self.checkpoints.upload(temporary, self.folder, files)

    def gather(self, temporary: Path, files: Mapping[str, FileEntry]) -> None:
        """Bring what ranks of other nodes have uploaded."""
        self.checkpoints.fetch(temporary, self.folder, files)

    def publish(self, temporary: Path) -> None:
        """Upload the rest, the manifest last."""
        self.checkpoints.upload(temporary, self.folder, (WEIGHTS, MANIFEST))
