"""Proves that nodes share a place: one writes a number there, and another reads it."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from echox.config.paths import is_url
from echox.errors import EchoXError

if TYPE_CHECKING:
    from echox.engine.object_store.run_store import RunStore

PATIENCE_S = 45.0
"""What a file may take to be seen on another node: network file systems remember for so long that it was not there."""


class ProofPlace(Protocol):
    """Where a proof can be left."""

    @property
    def where(self) -> str:
        """The place, for people."""
        ...

    def write(self, name: str, nonce: str) -> None:
        """Leave a proof for good; raises OSError or EchoXError."""
        ...

    def read(self, name: str) -> str | None:
        """A proof, or None where none can be seen."""
        ...

    def remove(self, name: str) -> None:
        """Remove a proof, if that can be done."""
        ...


class FolderProof:
    """A folder that nodes mount; made where it is absent."""

    def __init__(self, folder: Path) -> None:
        self.where = str(folder)
        self._folder = folder

    def write(self, name: str, nonce: str) -> None:
        """Write a proof to the disk."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / name).open("w", encoding="ascii") as file:
            file.write(nonce)
            file.flush()
            os.fsync(file.fileno())

    def read(self, name: str) -> str | None:
        """See `ProofPlace`."""
        try:
            return (self._folder / name).read_text(encoding="ascii")
        except OSError:
            return None

    def remove(self, name: str) -> None:
        """See `ProofPlace`."""
        with contextlib.suppress(OSError):
            (self._folder / name).unlink()


class StoreProof:
    """An object store."""

    def __init__(self, store: RunStore) -> None:
        self.where = store.location
        self._store = store

    def write(self, name: str, nonce: str) -> None:
        """See `ProofPlace`."""
        self._store.write(name, nonce.encode())

    def read(self, name: str) -> str | None:
        """See `ProofPlace`."""
        try:
            data = self._store.read(name)
        except EchoXError:
            return None
        return None if data is None else data.decode("ascii", "replace")

    def remove(self, name: str) -> None:
        """See `ProofPlace`."""
        with contextlib.suppress(EchoXError):
            self._store.remove(name)


def place_of(storage: str) -> ProofPlace:
    """Where proofs can be left in a storage of runs."""
    if not is_url(storage):
        return FolderProof(Path(storage))
    from echox.engine.object_store.run_store import RunStore

    return StoreProof(RunStore(storage))


def proof_name(nonce: str, rank: int) -> str:
    """Name of a rank's proof."""
    return f".start-{nonce}-{rank}"


def written(place: ProofPlace, nonce: str, rank: int) -> list[str]:
    """Leave this rank's proof; what is wrong, if anything."""
    host = socket.gethostname()
    try:
        place.write(proof_name(nonce, rank), nonce)
    except OSError as error:
        return [f"{host}: nothing can be written to {place.where}: {error.strerror or error}"]
    except EchoXError as error:
        return [f"{host}: nothing can be written to {place.where}: {error.what}"]
    return []


def seen(place: ProofPlace, nonce: str, rank: int) -> bool:
    """Whether a rank's proof comes into sight in time."""
    deadline = time.monotonic() + PATIENCE_S
    while place.read(proof_name(nonce, rank)) != nonce:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
