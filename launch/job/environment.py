"""Gives workers the environment variables they need of the driver, and what their nodes may decide themselves."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from echox.config.locations import without_secret_variables
from echox.config.paths import run_dir
from echox.config.run_recipe import RunRecipe
from echox.device import DEVICE

PASSED_ON = ("ECHOX_", "MLFLOW_", "HF_", "PYTORCH_", "TORCH_", "CUDA_")
"""Prefixes of the variables that a job takes from who submits it, and workers from the driver."""
OF_RAY = frozenset({"CUDA_VISIBLE_DEVICES"})
"""Not among them: Ray gives each worker its own."""
OF_THE_NODE = ("NCCL_", "GLOO_", "FI_")
"""Prefixes of variables that describe the network of a node: what a node has wins over what the driver has."""

NCCL_RECORDS = "nccl-rank-"
"""How the names of the files begin that NCCL's flight recorder leaves in the log folder of a run."""

_ALLOCATOR = {"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"}


def worker_environment(recipe: RunRecipe) -> dict[str, str]:
    """Variables that every worker has: those of the driver, thread counts and library switches.

    A secret stays on its node, for Ray's dashboard shows them. What the job was given by `--env` is not among them:
    Ray gives it to the workers itself.
    """
    threads = str(max(1, int(recipe.scaling.cpus_per_worker)))
    passed = passed_on()[0]
    switches = {
        "OMP_NUM_THREADS": threads,
        "TOKENIZERS_PARALLELISM": "false",
        # 1, Ray's own choice, aborts before NCCL's flight recorder is written.
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3",
    }
    if recipe.scaling.gpus_per_worker == 0:
        switches |= {"DS_ACCELERATOR": "cpu", DEVICE: "cpu"}
    else:
        if not passed.keys() & _ALLOCATOR:
            # Micro-batches differ in shape: fixed segments would fragment.
            switches["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
        # NCCL's flight recorder: each rank's last collectives, written when one of them times out
        switches |= {
            "TORCH_FR_BUFFER_SIZE": "2000",
            "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
            "TORCH_FR_DUMP_TEMP_FILE": f"{run_dir(recipe.storage, recipe.name) / 'log' / NCCL_RECORDS}",
        }
    # DeepSpeed calls ninja and the compiler by name; the worker's PATH is that of the Ray daemon.
    path = os.pathsep.join(dict.fromkeys([str(Path(sys.executable).parent), *os.environ.get("PATH", "").split(":")]))
    return {**passed, **switches, "PATH": path}


def process_environment(cpus: float, gpus: float) -> dict[str, str]:
    """Variables of a process that answers questions: those of this one that go with a job, and thread counts.

    Args:
        cpus, gpus: that it has; without a GPU it computes on the CPU.
    """
    threads = {"OMP_NUM_THREADS": str(max(1, int(cpus))), "TOKENIZERS_PARALLELISM": "false"}
    device = {} if gpus else {DEVICE: "cpu", "DS_ACCELERATOR": "cpu"}
    return {**passed_on()[0], **threads, **device}


def passed_on() -> tuple[dict[str, str], list[str]]:
    """Variables of this process that go with a job, and the names of secret ones, which do not."""
    passed, secret = without_secret_variables(os.environ, PASSED_ON)
    return {name: value for name, value in passed.items() if name not in OF_RAY}, secret


def node_defaults() -> dict[str, str]:
    """Variables of the driver for those nodes that have none of the same name, such as NCCL_DEBUG.

    As variables of Ray's they would be forced on every node, where interfaces may have other names.
    """
    return without_secret_variables(os.environ, OF_THE_NODE)[0]
