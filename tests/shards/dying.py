"""What a worker is given to do when it shall die; imports nothing, so that it starts quickly."""

from __future__ import annotations

import os
import signal
from typing import Any


def die(*args: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
