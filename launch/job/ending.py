"""Says how a job ended, from its exit code and its driver's events: finished, stopped or failed."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from echox.config.locations import without_secrets
from launch.events import JobEvent
from launch.job.command_line import ABORTED

LONGEST_WHY = 500
"""Characters of a reason in a message."""


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How a job ended.

    Attributes:
        status: finished, stopped (the run may go on in another job) or failed.
        why: of a stop or a failure; empty otherwise.
    """

    status: str
    why: str = ""

    @classmethod
    def of(cls, code: int, events: Sequence[JobEvent]) -> Ending:
        """The ending of a job.

        Args:
            code: its exit code.
            events: of its drivers, in order; not those of an earlier job of the run.
        """
        if code == 0 and _last(events, "status", "job_end") == "FINISHED":
            return cls(status="finished")
        if code in (0, ABORTED):
            why = _last(events, "why", "job_stopped", "job_aborted")
            return cls(status="stopped", why=why or "asked to before it began")
        error = _last(events, "error", "job_failed", "job_driver_lost")
        return cls(status="failed", why=error or f"exit code {code}")

    def message(self, *, run: str, stage: str, step: int) -> Mapping[str, Any]:
        """The JSON object for a webhook; `text` is what Slack and its like show.

        Args:
            run: its name.
            stage: of its recipe; empty where the recipe could not be read.
            step: optimizer steps done.
        """
        why = without_secrets(" ".join(self.why.split()))[:LONGEST_WHY]
        host = socket.gethostname()
        of_stage = f" ({stage})" if stage else ""
        text = f"EchoX run {run}{of_stage} {self.status} at step {step} on {host}" + (f": {why}" if why else "")
        # Slack reads <...> as a link or a mention, and a reason may quote a file of others.
        escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        return {
            "text": escaped,
            "run": run,
            "stage": stage,
            "status": self.status,
            "step": step,
            "why": why,
            "host": host,
        }


def _last(events: Sequence[JobEvent], key: str, *names: str) -> str:
    found = [event for event in events if event["event"] in names]
    return str(found[-1].get(key, "")) if found else ""
