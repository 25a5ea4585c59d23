"""Runs `echox evaluate` in forks of itself, each of which is killed by SIGKILL at a line of its answers.

One request a line on standard input: the words, the line of answers at which to kill (counted from 1, of all that are
written), and how much of that line is written before. One exit status a line on standard output.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import transformers.models.llama.modeling_llama
import transformers.models.whisper.modeling_whisper  # noqa: F401

from echox import cli
from echox.evaluate.benchmarks import command, tracked  # noqa: F401
from echox.evaluate.benchmarks.records import Writer
from tests.evaluate.benchmarks.world import stand_in


def _killed_at(line: int, share: float) -> None:
    written, whole = [0], Writer._line

    def write(self: Writer, content: Mapping[str, Any]) -> None:
        written[0] += 1
        if written[0] == line:
            data = json.dumps(content).encode() + b"\n"
            self._file.write(data[: round(share * len(data))])
            self._file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        whole(self, content)

    Writer._line = write  # type: ignore[method-assign]


def _child(words: list[str], line: int, share: float) -> None:
    silence = os.open(os.devnull, os.O_RDWR)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    torch.set_num_threads(1)
    stand_in(pytest.MonkeyPatch())
    if line:
        _killed_at(line, share)
    os._exit(cli.main(words))


if __name__ == "__main__":
    print("ready", flush=True)
    for request in sys.stdin:
        given = json.loads(request)
        child = os.fork()
        if child == 0:
            _child(**given)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
