"""Runs commands in forks of a warm process, and judges how each ended."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.hostile.inputs import World

ROOT = Path(__file__).resolve().parents[2]
MOST_BYTES = 1 << 30
"""Memory that a command may take beyond that of its imports."""
MOST_S = 25.0
UNFORESEEN = "with --debug for the traceback"


@dataclass(frozen=True)
class Outcome:
    """How one command ended.

    Attributes:
        words: the command.
        code: its exit code, negative for a signal.
        out, err: what it wrote.
        late: whether it had to be ended.
        peak_bytes, cpu_s: memory beyond that of its imports, and processor time.
    """

    words: list[str]
    code: int
    out: str
    err: str
    late: bool
    peak_bytes: int
    cpu_s: float

    def faults(self) -> list[str]:
        """Why it did not end as a command has to: in time, in bounds, with success or with one sentence."""
        said = self.err + self.out
        sentences = re.findall(r"^echox: .+", self.err, flags=re.MULTILINE)
        found = {
            "no end": self.late,
            f"{self.peak_bytes >> 20} MiB": self.peak_bytes >= MOST_BYTES,
            "a traceback": "Traceback" in said,
            "an error that was not foreseen": UNFORESEEN in said,
            f"{len(sentences)} sentences": self.code != 0 and len(sentences) > 1,
            f"exit code {self.code} without a sentence": self.code not in (0, 4, 5) and not sentences,
            f"killed by {-self.code}": self.code < 0,
            "terminal escapes": "\x1b" in said,
        }
        return [name for name, wrong in found.items() if wrong]


class Warm:
    """A process that runs commands, see `tests.hostile.warm`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "ECHOX_CACHE": str(folder / "cache")}
        for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "ECHOX_ALLOW_PIPE", "MLFLOW_TRACKING_URI", "ECHOX_DEBUG"):
            environment.pop(name, None)
        # A home of its own, so that nothing of the user's is met, such as a Ray head that was left running.
        environment |= {"HOME": str(folder / "home"), "RAY_ADDRESS": "http://127.0.0.1:9"}
        (folder / "home").mkdir()
        words = [sys.executable, "-m", "tests.hostile.warm"]
        pipe: Any = subprocess.PIPE
        self._process = subprocess.Popen(
            words, cwd=ROOT, env=environment, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True
        )
        assert self._process.stdout is not None and self._process.stdin is not None
        self._answers, self._requests = self._process.stdout, self._process.stdin
        if self._answers.readline() != "ready\n":
            raise RuntimeError(f"{' '.join(words)} does not start")

    def run(self, *words: str | Path, folder: Path, seconds: float = MOST_S, **environment: str) -> Outcome:
        """Run `echox WORDS` in a folder."""
        name = uuid.uuid4().hex
        out, err = self._folder / f"{name}.out", self._folder / f"{name}.err"
        request = {
            "words": [str(word) for word in words],
            "folder": str(folder),
            "environment": environment,
            "seconds": seconds,
            "most_bytes": MOST_BYTES + (256 << 20),
            "out": str(out),
            "err": str(err),
        }
        print(json.dumps(request), file=self._requests, flush=True)
        answer = json.loads(self._answers.readline())
        texts = [path.read_bytes().decode(errors="replace") if path.exists() else "" for path in (out, err)]
        return Outcome(words=request["words"], out=texts[0], err=texts[1], **answer)

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()


def snapshot(folder: Path) -> dict[str, str]:
    """Every name below a folder, and the hash of what it holds."""
    found = {}
    for path in sorted(folder.rglob("*")):
        linked = path.is_symlink()
        content = os.readlink(path).encode() if linked else path.read_bytes() if path.is_file() else b"-"
        found[str(path.relative_to(folder))] = hashlib.sha256(content).hexdigest()
    return found


def leaks(folder: Path, secret: str) -> list[Path]:
    """Files below a folder that hold the secret."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return [path for path in files if path.stat().st_size < 64 << 20 and secret.encode() in path.read_bytes()]


@contextmanager
def held(world: World, out: Path) -> Iterator[list[str]]:
    """Take down what happened to the world around in the block: what was run, changed or copied."""
    before, found = snapshot(world.outside), list[str]()
    yield found
    if world.mark.exists():
        found.append("a command was executed")
        world.mark.unlink()
    after = snapshot(world.outside)
    found += [f"outside/{name} was changed" for name in before.keys() | after if before.get(name) != after.get(name)]
    found += [f"{path} holds what lies outside" for path in leaks(out, world.secret)]
