"""Writes a RayJob or a RayCluster of KubeRay's API `ray.io/v1` (operator 1.2 or newer) for a plan."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from typing import Any

import yaml

from launch.deploy.plan import Plan

API = "ray.io/v1"
STOP_WAIT_S = 150
"""What a run gets to save when it is stopped; the pods' grace is longer."""
GRACE_S = STOP_WAIT_S + 30
HEAD_CPUS, HEAD_MEMORY = "4", "16Gi"
_SHARED_MEMORY = "32Gi"


@dataclass(frozen=True, kw_only=True)
class PodOptions:
    """What the pods of a run have.

    Attributes:
        image: that holds the project and the tested versions, see `Dockerfile`.
        claim: PersistentVolumeClaim that all pods mount, readable and writable by many; empty gives each pod a folder
            of its own, for runs and data in an object store.
        mount: where.
        secrets: Secrets whose keys become variables of all pods.
        namespace: of everything; empty is that of `kubectl`.
        memory: of a worker pod, such as 800Gi; empty asks for none.
    """

    image: str
    claim: str = "echox"
    mount: str = "/shared"
    secrets: tuple[str, ...] = field(default_factory=tuple)
    namespace: str = ""
    memory: str = ""


def ray_job(plan: Plan, options: PodOptions, retries: int = 0) -> dict[str, Any]:
    """A RayJob: a cluster for this run alone, made for it and removed behind it.

    Args:
        plan: nodes and command.
        options: of the pods.
        retries: further clusters, if one is lost with its head.
    """
    variables = {"RAY_JOB_STOP_SIGNAL": "SIGTERM", "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)}
    return {
        "apiVersion": API,
        "kind": "RayJob",
        "metadata": _metadata(plan, options),
        "spec": {
            "entrypoint": shlex.join(plan.words),
            "runtimeEnvYAML": yaml.safe_dump({"env_vars": variables}, sort_keys=False),
            "backoffLimit": retries,
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 600,
            "rayClusterSpec": _cluster(plan, options),
        },
    }


def ray_cluster(plan: Plan, options: PodOptions) -> dict[str, Any]:
    """A RayCluster that stays, for `echox submit` to run jobs on."""
    return {
        "apiVersion": API,
        "kind": "RayCluster",
        "metadata": _metadata(plan, options),
        "spec": _cluster(plan, options),
    }


def as_yaml(manifest: dict[str, Any]) -> str:
    """The manifest as `kubectl` takes it."""
    return yaml.safe_dump(manifest, sort_keys=False, width=120)


def _metadata(plan: Plan, options: PodOptions) -> dict[str, Any]:
    labels = {"app.kubernetes.io/name": "echox", "echox/run": plan.resource_name}
    place = {"namespace": options.namespace} if options.namespace else {}
    return {"name": plan.resource_name, **place, "labels": labels}


def _cluster(plan: Plan, options: PodOptions) -> dict[str, Any]:
    import ray

    head = {"cpu": HEAD_CPUS, "memory": HEAD_MEMORY}
    worker: dict[str, Any] = {"cpu": str(plan.cpus)}
    worker |= {"memory": options.memory} if options.memory else {}
    worker |= {"nvidia.com/gpu": str(plan.gpus)} if plan.gpus else {}
    group = {
        "groupName": "workers",
        "replicas": plan.most,
        "minReplicas": plan.least,
        "maxReplicas": plan.most,
        "rayStartParams": {},
        "template": _pod("ray-worker", worker, options),
    }
    return {
        "rayVersion": ray.__version__,
        "headGroupSpec": {
            # The head keeps the cluster and runs the driver; no rank of the run beside it.
            "rayStartParams": {"dashboard-host": "0.0.0.0", "num-cpus": "0", "num-gpus": "0"},
            "template": _pod("ray-head", head, options),
        },
        "workerGroupSpecs": [group],
    }


def _pod(name: str, resources: dict[str, Any], options: PodOptions) -> dict[str, Any]:
    container: dict[str, Any] = {
        "name": name,
        "image": options.image,
        "resources": {"requests": dict(resources), "limits": dict(resources)},
        "env": [{"name": "ECHOX_CACHE", "value": f"{options.mount}/cache"}],
        "volumeMounts": [
            {"name": "shared", "mountPath": options.mount},
            {"name": "shared-memory", "mountPath": "/dev/shm"},
        ],
    }
    if options.secrets:
        container["envFrom"] = [{"secretRef": {"name": secret}} for secret in options.secrets]
    if name == "ray-head":
        ports = {"gcs": 6379, "dashboard": 8265, "metrics": 8080}
        container["ports"] = [{"name": port, "containerPort": number} for port, number in ports.items()]
    folder = {"persistentVolumeClaim": {"claimName": options.claim}} if options.claim else {"emptyDir": {}}
    return {
        "spec": {
            "terminationGracePeriodSeconds": GRACE_S,
            "containers": [container],
            "volumes": [
                {"name": "shared", **folder},
                # A container has 64 MiB of it otherwise, and NCCL needs more.
                {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": _SHARED_MEMORY}},
            ],
        }
    }
