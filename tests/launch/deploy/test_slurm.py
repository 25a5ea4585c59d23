"""The batch script itself, under a `srun` that runs its command here: a real head, a notice, a save, a requeue."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from echox.config.load import load_recipe
from launch.deploy.plan import plan_of
from launch.deploy.slurm import SlurmOptions, batch_script

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
STAND_INS = str(Path(__file__).parents[1])
SRUN = """#!{python}
import os, sys
words = sys.argv[1:]
while words and words[0].startswith("--"):
    words.pop(0)
os.execvp(words[0], words)
"""


def test_a_run_that_is_told_of_its_end_saves_and_is_requeued(tmp_path: Path) -> None:
    tools, storage = tmp_path / "bin", tmp_path / "runs"
    tools.mkdir()
    scontrol = f'#!/bin/sh\nif [ "$1" = requeue ]; then echo "$2" > {tmp_path}/requeued; else echo 127.0.0.1; fi\n'
    scripts = {"srun": SRUN.format(python=sys.executable), "scontrol": scontrol}
    for name, text in scripts.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    words = ["demo/s2t", f"storage={storage}", "name=told", "optim.steps=19610", "scaling.workers=1",
             "data.micro_batch=16", "--train", "stand_ins:train_steps", "--setup", "stand_ins:setup"]  # fmt: skip
    recipe = load_recipe("demo/s2t", [word for word in words[1:] if "=" in word])
    script = tmp_path / "run.sh"
    script.write_text(batch_script(plan_of(recipe, words), SlurmOptions()))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "here", "PYTHONPATH": STAND_INS,
                    "PATH": f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}",
                    "RAY_TMPDIR": "/tmp"}  # fmt: skip
    with (tmp_path / "log").open("wb") as log:
        job = subprocess.Popen(["bash", str(script)], env=environment, stdout=log, stderr=log, start_new_session=True)
    progress = storage / "told" / "progress.json"
    try:
        deadline = time.monotonic() + 300
        while not (progress.exists() and json.loads(progress.read_text() or "{}").get("step", 0) > 3):
            assert job.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()[-3000:]
            time.sleep(0.3)
        job.send_signal(signal.SIGTERM)
        assert job.wait(200) == 0, (tmp_path / "log").read_text()[-3000:]
        assert json.loads(progress.read_text())["state"] == "stopped"
        assert (tmp_path / "requeued").read_text().strip() == environment["SLURM_JOB_ID"]
        assert list((storage / "told" / "checkpoints").glob("step-*"))
    finally:  # what Slurm does with the steps of a job that has ended
        for process in psutil.process_iter(["pid"]):
            try:
                if os.getsid(process.pid) == job.pid:
                    process.kill()
            except (psutil.Error, OSError):
                continue
