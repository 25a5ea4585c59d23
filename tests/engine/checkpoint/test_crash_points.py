"""A save that dies at any file operation leaves the checkpoint before it or the new one, never a mixture of both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def test_every_crash_point_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    shim = tmp_path / "crash_at.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", shim, HERE / "crash_at.c", "-ldl"], check=True)
    ran = subprocess.run(
        [sys.executable, str(HERE / "crashing.py"), str(tmp_path)],
        env={**os.environ, "LD_PRELOAD": str(shim), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    steps = json.loads(ran.stdout)
    assert set(steps) == {1, 2}, [step for step in steps if step not in (1, 2)][:3]
    # Both ways to die come to the end, having gone through the whole protocol.
    ends = [place for place, step in enumerate(steps[:-1]) if (step, steps[place + 1]) == (2, 1)]
    assert len(ends) == 1 and steps[-1] == 2
    assert ends[0] > 40, "the save has more file operations than that"
    assert steps[: ends[0] + 1] == sorted(steps[: ends[0] + 1])
