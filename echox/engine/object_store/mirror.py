"""Keeps the small files of a run - logs, metrics, progress, tracking journals - the same in its store and on its nodes.

Each node works on a folder of its own. What a process of a node changes there goes to the store every few seconds; a
node that takes a run over brings them first. Checkpoints have a way of their own.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from echox.config.paths import run_dir
from echox.engine.monitor.run_dir import ATTEMPT
from echox.engine.object_store.run_store import RunStore
from echox.engine.stop import STOP_FILE, clear_stop, reason_in
from echox.errors import EchoXError
from echox.files import write_atomically

EVERY_S = 5.0
"""How often changes are looked for; a long file waits longer, for a store takes only whole objects."""
_S_PER_MB = 2.0
_APART = ("checkpoints", "ray", "labels", "responses")
"""Folders of a run that are not mirrored: they are large, Ray's own, or made again."""
_FOLDERS = ("", "log", "errors", "hangs", "quarantine", "mlflow-spool")
_NODE, _MARK = "node", ".node"
"""Whose folder is the newest: a random word in the store, and in that folder."""


class Mirror:
    """The small files of one run, between this node's folder and the store.

    Args:
        store: of the run.
        folder: of the run on this node.
        follows: also bring, again and again, what other nodes change; for the driver.
    """

    def __init__(self, store: RunStore, folder: Path, *, follows: bool = False) -> None:
        self.store, self.folder = store, folder
        self._follows = follows
        self._known: dict[str, tuple[int, int]] = {}
        self._own: set[str] = set()
        self._due: dict[str, float] = {}
        self._versions: dict[str, str] = {}
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._warned = False
        self._thread: threading.Thread | None = None

    def bring(self) -> None:
        """Bring what is newer in the store; nothing where this folder was the last that a run worked on.

        Raises:
            CheckpointError, TransientReadError: the store refuses, or does not answer.
        """
        with self._lock:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self._is_newest():
                return
            if self._thread is None:
                # What lies here before the run goes on was left by an older attempt; it is sent only when it changes.
                self._known = dict(self._states())
            found = {name: version for folder in _FOLDERS for name, version in self.store.listed(folder).items()}
            for name, version in found.items():
                path = self.folder / name
                if name == _NODE or name in self._own or self._versions.get(name) == version or not _mirrored(name):
                    continue
                if self.store.download(name, path):
                    self._versions[name], self._known[name] = version, _state(path)

    def claim(self) -> None:
        """Make this node's folder the newest: the first rank works here."""
        mark = self.folder / _MARK
        if not mark.is_file():
            write_atomically(mark, uuid.uuid4().hex)
        self.store.write(_NODE, mark.read_bytes())

    def push(self, *, all_of_it: bool = False) -> None:
        """Send what has changed; `all_of_it` also what was sent a moment ago.

        Raises:
            CheckpointError, TransientReadError: the store refuses, or does not answer.
        """
        with self._lock:
            now, here = time.monotonic(), dict(self._states())
            for name, state in here.items():
                waits = now < self._due.get(name, 0.0) and not all_of_it
                if self._known.get(name) == state or waits or name == ATTEMPT:  # which the first rank writes itself
                    continue
                try:
                    data = (self.folder / name).read_bytes()
                except OSError:
                    continue  # renamed or removed meanwhile
                self.store.write(name, data)
                self._known[name], self._due[name] = state, now + max(EVERY_S, _S_PER_MB * len(data) / 1e6)
                self._own.add(name)
            for name in self._own - here.keys():
                self.store.remove(name)
                self._own.discard(name)
                self._known.pop(name, None)

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._closing.set()
        if self._thread is not None:
            self._thread.join()
        self._unless_refused(all_of_it=True)

    def _run(self) -> None:
        while not self._closing.wait(EVERY_S):
            self._unless_refused(all_of_it=False)

    def _unless_refused(self, *, all_of_it: bool) -> None:
        try:
            self.push(all_of_it=all_of_it)
            if self._follows and not self._closing.is_set():
                self.bring()
            self._warned = False
        except (EchoXError, OSError) as error:
            if not self._warned:
                self._warned = True
                print(f"warning: logs are not in the object store yet, training goes on: {error}", file=sys.stderr)

    def _is_newest(self) -> bool:
        try:
            mine = (self.folder / _MARK).read_bytes()
        except OSError:
            return False
        return mine == self.store.read(_NODE)

    def _states(self) -> Iterator[tuple[str, tuple[int, int]]]:
        for parent, folders, files in os.walk(self.folder):
            inside = Path(parent).relative_to(self.folder)
            folders[:] = [name for name in folders if _mirrored((inside / name).as_posix())]
            for file in files:
                name = (inside / file).as_posix()
                with contextlib.suppress(OSError):
                    if _mirrored(name) and not (self.folder / name).is_symlink():
                        yield name, _state(self.folder / name)


class StoredStop:
    """Looks for a request to stop in the store, not more often than every few seconds."""

    def __init__(self, store: RunStore) -> None:
        self._store = store
        self._next = 0.0

    def __call__(self) -> str | None:
        """Why the run was asked to stop, or None."""
        if time.monotonic() < self._next:
            return None
        self._next = time.monotonic() + EVERY_S
        try:
            data = self._store.read(STOP_FILE)
        except EchoXError:
            return None
        return None if data is None else reason_in(data)


@contextlib.contextmanager
def mirrored(
    storage: str, name: str, *, first: bool, follows: bool = False, local_rank: int = 0
) -> Iterator[Mirror | None]:
    """Bring a run's small files to this node, and keep the store up to date; nothing where the storage is a folder.

    Args:
        storage: of the recipe.
        name: of the run.
        first: whether the first rank works in this folder.
        follows: see `Mirror`.
        local_rank: of the process; the first one of a node does it for all.

    Raises:
        CheckpointError, TransientReadError: the store refuses, or does not answer, at the beginning.
    """
    store = RunStore.of(storage, name) if local_rank == 0 else None
    if store is None:
        yield None
        return
    mirror = Mirror(store, run_dir(storage, name), follows=follows)
    mirror.bring()
    if store.read(STOP_FILE) is None:
        clear_stop(mirror.folder)  # it is of an earlier start, and must not go to the store
    if first:
        mirror.claim()
    with mirror:
        yield mirror


def _state(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _mirrored(name: str) -> bool:
    parts = Path(name).parts
    return parts[0] not in _APART and not any(part.startswith(".") for part in parts) and ".." not in parts
