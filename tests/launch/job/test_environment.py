"""What workers get of the driver's environment: no secret, and nothing in place of a node's own network."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch.distributed

from echox.config.load import load_recipe
from launch.job.environment import node_defaults, passed_on, worker_environment
from launch.job.torch_backend import TorchGroup, _join

SECRET = "s3cr3t-9f"
HEAD = {
    "ECHOX_CACHE": "/c",
    "ECHOX_WEBHOOK": f"https://hooks.example/{SECRET}",
    "ECHOX_STORE": f"https://me:{SECRET}@store",
    "MLFLOW_TRACKING_TOKEN": SECRET,
    "AWS_SECRET": SECRET,
    "NCCL_SOCKET_IFNAME": "eth0",
    "NCCL_DEBUG": "INFO",
    "NCCL_PROXY": f"http://me:{SECRET}@proxy",
    "GLOO_SOCKET_IFNAME": "eth0",
    "FI_PROVIDER": "efa",
    "OTHER": "x",
}


@pytest.fixture(autouse=True)
def head(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("NCCL_", "GLOO_", "FI_", "PYTORCH_", "TORCH_", "CUDA_", "ECHOX_DEVICE")):
            monkeypatch.delenv(name)
    for name, value in HEAD.items():
        monkeypatch.setenv(name, value)


def test_workers_get_what_they_need_and_nothing_private() -> None:
    on_cpu = worker_environment(load_recipe("demo/s2t"))
    assert on_cpu["DS_ACCELERATOR"] == "cpu" and on_cpu["OMP_NUM_THREADS"] == "1"
    assert on_cpu["ECHOX_CACHE"] == "/c" and on_cpu["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "3"
    assert SECRET not in str(on_cpu) + str(node_defaults()), "whoever sees the dashboard would see it"
    assert "OTHER" not in on_cpu
    on_gpu = worker_environment(load_recipe("demo/s2t", ["scaling.gpus_per_worker=1", "scaling.cpus_per_worker=6"]))
    assert not {"DS_ACCELERATOR", "ECHOX_DEVICE"} & on_gpu.keys() and on_gpu["OMP_NUM_THREADS"] == "6"
    assert on_cpu["ECHOX_DEVICE"] == "cpu" and "PYTORCH_CUDA_ALLOC_CONF" not in on_cpu
    assert on_gpu["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"


@pytest.mark.parametrize("name", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
def test_what_is_set_for_torch_and_cuda_goes_with_a_job_but_for_the_gpus_that_ray_gives(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = {name: "max_split_size_mb:64", "TORCH_LOGS": "graphs", "CUDA_LAUNCH_BLOCKING": "1"}
    for variable, value in {**mine, "CUDA_VISIBLE_DEVICES": "3"}.items():
        monkeypatch.setenv(variable, value)
    workers = worker_environment(load_recipe("demo/s2t", ["scaling.gpus_per_worker=1"]))
    for given in (passed_on()[0], workers):
        assert given.items() >= mine.items() and "CUDA_VISIBLE_DEVICES" not in given
    assert len(workers.keys() & {"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"}) == 1


def test_the_network_of_a_node_is_not_the_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    defaults = node_defaults()
    network = {"NCCL_SOCKET_IFNAME", "NCCL_DEBUG", "GLOO_SOCKET_IFNAME", "FI_PROVIDER"}
    assert defaults.keys() == network
    assert not network & worker_environment(load_recipe("demo/s2t")).keys(), "Ray would force them on every node"
    group = TorchGroup(backend="nccl", timeout_s=7, defaults=defaults)
    for name in network:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
    seen: dict[str, str] = {}

    def joined(backend: str, **options: Any) -> None:
        seen.update(os.environ)

    monkeypatch.setattr(torch.distributed, "init_process_group", joined)
    _join(address="10.0.0.1", port=1, world_rank=0, world_size=2, **group.to_dict())
    assert {name: seen[name] for name in network} == {**defaults, "NCCL_SOCKET_IFNAME": "ib0"}
    for name in network:
        monkeypatch.delenv(name)
