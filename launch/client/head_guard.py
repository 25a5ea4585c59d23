"""`python -m launch.client.head_guard HEAD REGISTRY`: ends a local Ray head whose starter was killed before it could.

It watches the starter's process id and start time from a session of its own, and leaves by itself when the starter has
stopped the head. Ray's own processes follow their head, but the head follows nobody.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from launch.client.local_head import Head, stop_head

POLL_S = 0.5


def main(argv: Sequence[str] | None = None) -> int:
    """Fork, watch, act."""
    described, registry = sys.argv[1:] if argv is None else argv
    # An orphan is in nobody's process tree: what kills the starter's family leaves it alive.
    if os.fork():
        os._exit(0)
    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.chdir("/")
    guard(Head(**json.loads(described)), Path(registry))
    return 0


def guard(head: Head, registry: Path) -> None:
    """Wait until the starter has stopped the head, whose folder then is gone, or is gone itself; then stop the head."""
    while not head.abandoned():
        if not Path(head.folder).exists():
            return
        time.sleep(POLL_S)
    stop_head(head, registry)


if __name__ == "__main__":
    sys.exit(main())
