"""Brings a run into Ray Serve, keeps it there until it is asked to stop, and takes it out again."""

from __future__ import annotations

import contextlib
import re
import threading

from echox.errors import LaunchError
from launch.job.driver import connect
from launch.job.environment import process_environment
from launch.job.room import lacking
from launch.job.signals import StopSignals
from launch.serving.config import APP, Serving


def serve_until_stopped(serving: Serving) -> None:
    """Serve on the cluster that this process is in, up to SIGTERM or Ctrl-C.

    Raises:
        LaunchError: there is no cluster, no room in it, another Ray Serve, or a replica does not start.
    """
    connect()
    stopped = threading.Event()
    StopSignals(stopped.set).listen()
    check_room(serving)
    deploy(serving)
    print(f"{serving.run} at http://{serving.host}:{serving.port}/  (Ctrl-C ends it)", flush=True)
    while not stopped.wait(1.0):  # a signal comes between two waits
        pass
    remove()


def deploy(serving: Serving) -> None:
    """Start Ray Serve where it does not run, and the replicas; returns once they answer.

    Raises:
        LaunchError: Ray Serve listens elsewhere, or a replica does not start.
    """
    from ray import serve
    from ray.serve.context import _get_global_client

    from launch.serving.replica import Replica

    place = "HeadOnly" if serving.at_home else "EveryNode"
    serve.start(proxy_location=place, http_options={"host": serving.host, "port": serving.port})
    client = _get_global_client()
    assert client is not None
    listens = client.http_config
    if (listens.host, listens.port) != (serving.host, serving.port):
        raise LaunchError(
            f"Ray Serve runs on this cluster at {listens.host}:{listens.port}, not {serving.host}:{serving.port}",
            fix=f"give --host {listens.host} --port {listens.port}, or end it with `serve shutdown`",
        )
    if APP in serve.status().applications:
        fix = "stop the job that serves it, or end it with `serve shutdown`"
        raise LaunchError("a run is served on this cluster already", fix=fix)
    options = serving.deployment(process_environment(serving.cpus, serving.gpus))
    deployment = serve.deployment(name=APP, **options)(serve.ingress()(Replica))
    try:
        serve.run(deployment.bind(serving), name=APP, route_prefix="/")
    except RuntimeError as error:
        deployments = serve.status().applications[APP].deployments.values()
        what, fix = start_failure("\n".join([str(error), *(each.message for each in deployments)]))
        remove()
        raise LaunchError(f"the replicas do not start: {what}", fix=fix) from error


def remove() -> None:
    """Take the run out of Ray Serve, and end Ray Serve where it serves nothing else."""
    from ray import serve

    with contextlib.suppress(Exception):  # it is gone already, or Ray is
        serve.delete(APP)
        if not serve.status().applications:
            serve.shutdown()


def check_room(serving: Serving) -> None:
    """Fail at once where the cluster could never hold the replicas; Ray would wait without a message.

    Raises:
        LaunchError: it could not.
    """
    short = lacking({"GPU": serving.gpus * serving.replicas, "CPU": serving.cpus * serving.replicas})
    if short:
        raise LaunchError(
            f"{serving.replicas} replicas need more than the cluster has: {short}",
            fix="add nodes, or give fewer --replicas, --gpus or --cpus",
        )


def start_failure(message: str) -> tuple[str, str]:
    """What is wrong and what to do, of the last error in what Ray Serve says of replicas that do not start."""
    errors = re.findall(r"^\s*[\w.]*(?:Error|Exception): (.+)$", message, flags=re.MULTILINE)
    last = str((errors or message.strip().splitlines() or ["Ray Serve does not say why"])[-1])[:400]
    what, _, fix = last.partition(" Fix: ")
    return what.rstrip("."), fix or "see the log of the job"
