"""A process that has imported what the commands need, and runs each command in a fork of itself.

One request a line on standard input, one answer a line on standard output. The imports of a command take ten seconds,
and its memory is counted from what they take.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any, TextIO

MODULES = (
    *("torch", "soundfile", "safetensors.torch", "mlflow.tracking", "mlflow.store.tracking.sqlalchemy_store"),
    *("echox.units.cli", "echox.units.extract", "echox.units.kmeans", "echox.units.language", "echox.units.published"),
    *("echox.builders.setup", "echox.speak.pipeline", "echox.speak.vocoder", "echox.evaluate.report"),
    *("echox.vocoder.fairseq", "echox.vocoder.trainer"),
    *("echox.evaluate.demo", "echox.respond", "echox.tracking.cli", "echox.tracking.run", "echox.tracking.page"),
    *("shards.cli", "shards.stats", "shards.check", "shards.builder.corpus_build", "shards.builder.encode"),
    *("launch.cli", "launch.client.status", "launch.ablation.cli", "launch.client.job_environment", "shards.corpora"),
    *("transformers.models.llama.modeling_llama", "transformers.models.whisper.modeling_whisper"),
    "transformers.models.seamless_m4t.modeling_seamless_m4t",
)
LARGEST_FILE = 2 << 30
POLL_S = 0.02


def run(request: dict[str, Any]) -> dict[str, Any]:
    """Run one command in a fork; its exit code, what it took, and whether it had to be ended."""
    looked, before, idle_s = time.monotonic(), _resident(os.getpid()), 0.0
    child = os.fork()
    if child == 0:
        _child(request)
    peak, ended, late = 0, 0, False
    while not ended:
        ended, status, used = os.wait4(child, os.WNOHANG)
        if ended:
            break
        peak = max(peak, _resident(child) - before)
        # A busy machine makes a command slow; one that waits for a pipe sleeps, and one that never ends works.
        now, (sleeps, worked_s) = time.monotonic(), _activity(child)
        idle_s += (now - looked) * sleeps
        looked = now
        late = max(idle_s, worked_s) > request["seconds"]
        if late or peak > request["most_bytes"]:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
            os.kill(child, signal.SIGKILL)
            ended, status, used = os.wait4(child, 0)
            break
        time.sleep(POLL_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # what it left behind
    return {
        "code": os.waitstatus_to_exitcode(status),
        "late": late,
        "peak_bytes": max(peak, used.ru_maxrss * 1024 - before),
        "cpu_s": used.ru_utime + used.ru_stime,
    }


def _child(request: dict[str, Any]) -> None:
    os.setsid()
    os.chdir(request["folder"])
    os.environ.update(request["environment"])
    resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE, LARGEST_FILE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for number, name in ((0, os.devnull), (1, request["out"]), (2, request["err"])):
        opened = os.open(name, os.O_RDWR | os.O_CREAT, 0o600)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdout, sys.stderr = _text(1), _text(2)
    code = 1
    try:
        from echox import cli

        code = cli.main(request["words"])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 70
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _text(number: int) -> TextIO:
    return open(number, "w", encoding="utf-8", errors="backslashreplace", closefd=False)


def _activity(pid: int) -> tuple[bool, float]:
    """Whether a process sleeps, and the processor seconds it has had."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return False, 0.0
    return words[0] != "R", (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()
    except (OSError, IndexError):
        return 0


def main() -> None:
    """Import, say so, and serve until standard input ends."""
    import torch

    torch.set_num_threads(1)
    for name in MODULES:
        importlib.import_module(name)
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
