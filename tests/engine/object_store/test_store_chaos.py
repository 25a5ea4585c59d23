"""Runs in an object store whose ranks are killed and whose nodes are lost, while the store fails as stores do."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from chaos import Shared, torment

from echox.config.paths import storage_folder
from echox.engine.checkpoint.checkpointer import find_weights
from tests.s3 import Faults


class Stored(Shared):
    """Runs in a bucket, and two nodes that share no folder; now and then a kill takes a node's disk with it."""

    worker = Path(__file__).with_name("store_worker.py")
    life = 25  # a save takes longer than in a folder

    def __init__(self, folder: Path, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(folder)
        self.bucket, self.nodes, self.lost = bucket, folder / "nodes", 0
        self._monkeypatch = monkeypatch
        # The process that ranks are forks of may be older than the server.
        self.environment = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}

    def scenario(self, name: str, steps: int) -> dict[str, Any]:
        made = super().scenario(name, steps)
        return {**made, "nodes": str(self.nodes), "recipe": {**made["recipe"], "storage": f"{self.bucket}/runs"}}

    def run(self, name: str) -> Path:
        self._monkeypatch.setenv("ECHOX_CACHE", str(self.nodes / "node-0"))
        return storage_folder(f"{self.bucket}/runs") / name

    def weights(self, name: str) -> Path:
        self._monkeypatch.setenv("ECHOX_CACHE", str(self.nodes / "reader"))
        return find_weights(f"{self.bucket}/runs/{name}")

    def killed(self, chance: random.Random) -> None:
        for node in ("node-0", "node-1"):
            if chance.random() < 0.3:
                shutil.rmtree(self.nodes / node, ignore_errors=True)
                self.lost += 1


@pytest.mark.parametrize("kills", [3, pytest.param(50, marks=[pytest.mark.slow, pytest.mark.timeout(5400)])])
def test_killed_again_and_again_it_trains_the_same(
    kills: int, tmp_path: Path, bucket: str, faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults.errors, faults.lost, faults.cut_uploads, faults.cut_downloads = 0.04, 0.02, 0.02, 0.02
    faults.slow_s, faults.stale_lists = 0.02, True
    place = Stored(tmp_path, bucket, monkeypatch)
    verdict = torment(tmp_path, kills=kills, steps=25 * kills, seed=17, place=place)
    print(verdict, f"nodes lost {place.lost}", faults.done)
    assert verdict.kills == kills and verdict.resumed >= kills / 2
    assert verdict.good, str(verdict)
    assert place.lost and all(faults.done[name] for name in ("errors", "lost", "cut_uploads", "cut_downloads"))
