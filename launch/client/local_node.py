"""Lets further nodes join a Ray head on this machine: raylets with folders of their own, lost like real ones."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from echox.errors import LaunchError
from launch.client import local_head

JOIN_S = 60.0
OBJECT_STORE = 100_000_000
"""Bytes; a training run keeps nothing in it."""


class LocalNode:
    """A raylet that joins a head on this machine; it is there some seconds later.

    Args:
        head: which one.
        cpus: that it offers.
        around: words that run the command in other surroundings, such as a namespace of its own.
        ip: its address, where it is not the machine's; Ray numbers the workers at one address as those of one node.

    Attributes:
        address: of the cluster, `host:port`.

    Raises:
        LaunchError: the head does not say where its cluster is.
    """

    def __init__(
        self, head: local_head.Head, *, cpus: int = 1, around: Sequence[str] = (), ip: str | None = None
    ) -> None:
        noted = Path(head.folder) / "ray_current_cluster"  # Ray writes it after the head answers
        deadline = time.monotonic() + JOIN_S
        while not noted.exists():
            if time.monotonic() > deadline:
                raise LaunchError("the head on this machine does not say where its cluster is", where=head.folder)
            time.sleep(0.1)
        self.address = noted.read_text().strip()
        # A folder of its own: a node that comes or goes tidies up what others on the same disk still use.
        self._folder = tempfile.mkdtemp(prefix="echox-node-", dir="/tmp")
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", f"--address={self.address}"]
        command += [f"--num-cpus={cpus}", f"--temp-dir={self._folder}", f"--object-store-memory={OBJECT_STORE}"]
        command += [] if ip is None else [f"--node-ip-address={ip}"]
        self._process = subprocess.Popen(
            [*around, *command, "--block", "--disable-usage-stats"],
            env={**os.environ, **head.environment(), local_head.MARK: head.mark, "RAY_ADDRESS": ""},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def kill(self) -> None:
        """Lose the node with all that runs on it."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self._process.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        self._process.kill()
        self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)
