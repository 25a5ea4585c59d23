"""Kills a rank of a training run again and again, and compares what comes of it with a run that nobody killed.

`python tests/engine/chaos.py --kills 50`; real ZeRO-3 ranks on real shards, SIGKILL at random moments: while they
start, train, validate and save. Ends with one line, and with exit code 1 unless nothing was lost.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from launching import Ranks, prepare, start
from safetensors.torch import load_file

from echox.engine.checkpoint.checkpointer import find_weights
from echox.engine.checkpoint.manifest import list_checkpoints, read_manifest
from echox.stream.format.writer import write_shards

WORKER = Path(__file__).with_name("stream_worker.py")
WORLD, SAMPLES = 2, 50


class Shared:
    """Where tormented runs lie: a folder that both ranks see.

    Attributes:
        worker: script of a rank.
        life: steps of a life, at most.
        environment: variables of the ranks.
    """

    worker = WORKER
    life = 12
    environment: Mapping[str, str] = MappingProxyType({})

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def scenario(self, name: str, steps: int) -> dict[str, Any]:
        """What the worker is told."""
        return scenario(self.folder, name, steps)

    def run(self, name: str) -> Path:
        """Folder of a run, with its events."""
        return self.folder / "runs" / name

    def weights(self, name: str) -> Path:
        """Newest whole weights of a run."""
        return find_weights(self.run(name))

    def killed(self, chance: random.Random) -> None:
        """After each kill: what is lost with it; nothing here."""


@dataclass(frozen=True)
class Verdict:
    """What the kills did.

    Attributes:
        kills: ranks killed.
        resumed: starts that went on from a checkpoint.
        lost, duplicated: visits of samples that the undisturbed run has and this one has not, and the other way round.
        identical: whether every weight, bit for bit, and the account of the data are those of the undisturbed run.
    """

    kills: int
    resumed: int
    lost: int
    duplicated: int
    identical: bool

    def __str__(self) -> str:
        same = "yes" if self.identical else "no"
        return (
            f"kills {self.kills}, resumed {self.resumed}, lost {self.lost}, duplicated {self.duplicated}, "
            f"bit-identical {same}"
        )

    @property
    def good(self) -> bool:
        return self.identical and not self.lost and not self.duplicated


def sample(number: int) -> dict[str, Any]:
    units = np.arange(2 + number % 7 * 3, dtype="<u2").tobytes()
    meta = {"id": f"s{number:03d}", "answer_text": "ab" * (1 + number % 4), "task": "tts", "answer_s": 0.1 * len(units)}
    return {"__key__": f"s{number:03d}", "answer.units": units, "json": meta}


def scenario(folder: Path, name: str, steps: int) -> dict[str, Any]:
    return {
        "name": name,
        "recipe": {
            "stage": "t2c",
            "model__t2c": {"prefix": "p", "unit_header": "h", "unit_language": "u"},
            "data__train": [{"path": str(folder / "train"), "task": "tts"}],
            "data__valid": [{"path": str(folder / "valid"), "task": "tts"}],
            "data__global_batch": 8,
            "data__micro_batch": 2,
            "data__window_shards": 3,
            "optim__steps": steps,
            "engine__validate_every": 11,
            "engine__checkpoint_every": 3,
        },
    }


def torment(folder: Path, *, kills: int, steps: int, seed: int, place: Shared | None = None) -> Verdict:
    """Train undisturbed in a shared folder, then train with `kills` kills in a place, and compare."""
    place = place or Shared(folder)
    prepare(folder)
    write_shards(folder / "train", map(sample, range(SAMPLES)), per_shard=7)
    write_shards(folder / "valid", map(sample, range(100, 108)), per_shard=3)
    calm = start(folder, WORKER, WORLD, [scenario(folder, "calm", steps)])
    assert calm.wait(120 + steps) == [0] * WORLD, calm.said()
    chance, done, resumed = random.Random(seed), 0, 0
    while True:
        ranks = start(folder, place.worker, WORLD, [place.scenario("tormented", steps)], **place.environment)
        if done == kills:
            assert ranks.wait() == [0] * WORLD, ranks.said()
            resumed += " resuming step=" in ranks.said_by(0)
            break
        _wait_a_random_while(ranks, chance, place.life)
        victim = ranks.processes[chance.randrange(WORLD)]
        if victim.pid is not None and victim.is_alive():
            victim.kill()
            done += 1
        ranks.wait(60)
        resumed += " resuming step=" in ranks.said_by(0)
        assert _step(place.run("tormented")) < steps, "the run was over before its time: give it more steps"
        place.killed(chance)
    seen = folder / "runs"
    expected, found = _visits(seen / "calm"), _visits(seen / "tormented")
    lost, duplicated = (expected - found).total(), (found - expected).total()
    same = _same(find_weights(seen / "calm"), place.weights("tormented"))
    return Verdict(kills=done, resumed=resumed, lost=lost, duplicated=duplicated, identical=same)


def _wait_a_random_while(ranks: Ranks, chance: random.Random, life: int) -> None:
    """A kill in four meets the start; the others come anywhere in the first steps of this life."""
    if chance.random() > 0.25:
        enough = chance.randint(1, life)
        deadline = time.monotonic() + 120
        while ranks.said_by(0).count(" step step=") < enough and time.monotonic() < deadline:
            if not all(process.is_alive() for process in ranks.processes):
                break
            time.sleep(0.01)
    time.sleep(chance.uniform(0, 0.2))


def _same(calm: Path, tormented: Path) -> bool:
    """Whether two whole weights are the same bit for bit, and the accounts of data beside them."""
    before, after = load_file(calm), load_file(tormented)
    records = [read_manifest(weights.parent)["cursor"]["stream"] for weights in (calm, tormented)]
    return (
        records[0] == records[1]
        and before.keys() == after.keys()
        and all(before[name].numpy().tobytes() == after[name].numpy().tobytes() for name in before)
    )


def _visits(run: Path) -> Counter[str]:
    """Samples behind the final weights: of every step, what the life trained that did it last."""
    visits: Counter[str] = Counter()
    for rank in range(WORLD):
        last: dict[int, list[str]] = {}
        for line in (run / "seen" / f"rank-{rank}.jsonl").read_text().splitlines():
            try:
                step, ids = json.loads(line)
            except ValueError:
                continue  # cut short by the kill
            last[step] = ids
        visits.update(name for ids in last.values() for name in ids)
    return visits


def _step(run: Path) -> int:
    checkpoints = list_checkpoints(run)
    return int(read_manifest(checkpoints[0])["step"]) if checkpoints else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--steps", type=int, help="optimizer steps of the run; default: 12 a kill")
    parser.add_argument("--seed", type=int, default=17)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        steps = args.steps or 12 * args.kills
        verdict = torment(Path(folder), kills=args.kills, steps=steps, seed=args.seed)
    print(verdict)
    return 0 if verdict.good else 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))
    sys.exit(main())
