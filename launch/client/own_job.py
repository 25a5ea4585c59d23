"""Has a job of a cluster run one of this project's commands with the words that it was given."""

from __future__ import annotations

import time
from collections.abc import Sequence

from launch.client.job_environment import JobEnvironment
from launch.client.jobs import Jobs, user_name


def submit_command(module: str, words: Sequence[str], address: str, kind: str) -> str:
    """Submit `python -m MODULE WORDS`, but for its `--address`; what to do next.

    Args:
        module: of the command.
        words: its command line.
        address: of the cluster's dashboard.
        kind: how the submission id begins.
    """
    kept = _without(words, "--address")
    name = f"{kind}-{time.time_ns() // 1_000_000}"
    job = Jobs(address).submit_module([module, *kept], name, JobEnvironment(), {"user": user_name()})
    return f"submitted {job}; follow it: echox logs {job} -f; end it: echox stop {job}"


def _without(words: Sequence[str], option: str) -> list[str]:
    found: list[str] = []
    rest = iter(words)
    for word in rest:
        if word == option:
            next(rest, None)
        elif not word.startswith(f"{option}="):
            found.append(word)
    return found
