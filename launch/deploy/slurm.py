"""Writes a batch script for Slurm: a Ray head and workers by srun, a run that saves in time, and a requeue."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from launch.deploy.plan import Plan

NOTICE_S = 240
"""Seconds before the end of its time that a job is told."""
STOP_WAIT_S = NOTICE_S - 60


@dataclass(frozen=True, kw_only=True)
class SlurmOptions:
    """What a job asks Slurm for.

    Attributes:
        time: limit, such as 24:00:00.
        partition, account: empty leaves Slurm's default.
        setup: line that makes the project's Python available on every node, such as `source /shared/echox/.venv/...`.
    """

    time: str = "24:00:00"
    partition: str = ""
    account: str = ""
    setup: str = ""


def batch_script(plan: Plan, options: SlurmOptions) -> str:
    """The script for `sbatch`; a run that was told to stop is requeued and goes on from its checkpoint."""
    asks = {
        "job-name": plan.run,
        "nodes": str(plan.most) if plan.least == plan.most else f"{plan.least}-{plan.most}",
        "ntasks-per-node": "1",
        "cpus-per-task": str(plan.cpus),
        "time": options.time,
        "signal": f"B:TERM@{NOTICE_S}",
        "open-mode": "append",
        "output": f"{plan.run}-%j.log",
    }
    asks |= {"gpus-per-node": str(plan.gpus)} if plan.gpus else {}
    asks |= {name: value for name in ("partition", "account") if (value := getattr(options, name))}
    directives = "\n".join(f"#SBATCH --{name}={value}" for name, value in asks.items())
    gpus = f" --num-gpus={plan.gpus}"
    return _SCRIPT.format(
        directives=directives,
        setup=options.setup or "# the project's Python is on PATH",
        ray=f"--num-cpus={plan.cpus}{gpus} --disable-usage-stats --block",
        command=shlex.join(plan.words),
        stop_wait=STOP_WAIT_S,
    )


_SCRIPT = """\
#!/bin/bash
{directives}
#SBATCH --requeue
set -euo pipefail
: "${{SLURM_JOB_ID:?hand this file to sbatch}}" "${{SLURM_JOB_NODELIST:?}}"
{setup}

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${{nodes[0]}}
port=$((20000 + SLURM_JOB_ID % 20000))
export RAY_ADDRESS="$head:$port" RAY_JOB_STOP_WAIT_TIME_S={stop_wait}

srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" \\
  ray start --head --node-ip-address="$head" --port="$port" --dashboard-host=127.0.0.1 {ray} &
until srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" ray health-check --address "$RAY_ADDRESS"; do sleep 2; done
others=$((${{#nodes[@]}} - 1))
if [ "$others" -gt 0 ]; then
  srun --overlap --nodes="$others" --ntasks="$others" --exclude="$head" ray start --address="$RAY_ADDRESS" {ray} &
fi

# The run waits until the other nodes have joined. It is told of the end of its time, saves, and ends by itself.
srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" {command} &
run=$!
told=""
trap 'told=yes; kill -TERM "$run"' TERM
code=0
wait "$run" || code=$?
if [ -n "$told" ]; then
  code=0
  wait "$run" || code=$?
  [ "$code" -ne 0 ] || scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""
