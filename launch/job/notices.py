"""Hears from a cloud that it takes a node back, and has Ray drain it: the run saves, and goes on with other nodes.

A node says by `$ECHOX_PREEMPTION` whose it is: `aws`, `gcp` or `azure`. Its first worker then asks the cloud's metadata
service, which only the machine itself can reach, as these clouds document it. Nothing is asked otherwise.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

import requests

from echox.errors import LaunchError

VARIABLE = "ECHOX_PREEMPTION"
POLL_S = 5.0
_TIMEOUT_S = 2.0
_LINK_LOCAL = "http://169.254.169.254"
_GOOGLE = "http://metadata.google.internal"

log = logging.getLogger("echox.launch")

Ask = Callable[[], float | None]
"""Seconds until a node is taken away, or None while it is not; raises `requests.RequestException`, ValueError."""


def aws(base: str = _LINK_LOCAL) -> float | None:
    """A spot instance's interruption notice, two minutes ahead (instance metadata service, version 2)."""
    headers = {"X-aws-ec2-metadata-token-ttl-seconds": "60"}
    token = requests.put(f"{base}/latest/api/token", headers=headers, timeout=_TIMEOUT_S)
    token.raise_for_status()
    said = requests.get(
        f"{base}/latest/meta-data/spot/instance-action",
        headers={"X-aws-ec2-metadata-token": token.text},
        timeout=_TIMEOUT_S,
    )
    if said.status_code == 404:
        return None
    said.raise_for_status()
    return 120.0 if said.json()["action"] in ("terminate", "stop", "hibernate") else None


def gcp(base: str = _GOOGLE) -> float | None:
    """A spot VM's preemption, half a minute ahead (metadata server)."""
    said = requests.get(
        f"{base}/computeMetadata/v1/instance/preempted", headers={"Metadata-Flavor": "Google"}, timeout=_TIMEOUT_S
    )
    said.raise_for_status()
    return 30.0 if said.text.strip().upper() == "TRUE" else None


def azure(base: str = _LINK_LOCAL) -> float | None:
    """A spot VM's eviction, half a minute ahead (scheduled events, which tell of a whole set of machines)."""
    headers = {"Metadata": "true"}
    events = requests.get(
        f"{base}/metadata/scheduledevents?api-version=2020-07-01", headers=headers, timeout=_TIMEOUT_S
    )
    events.raise_for_status()
    taken = [event for event in events.json()["Events"] if event.get("EventType") == "Preempt"]
    if not taken:
        return None
    name = requests.get(
        f"{base}/metadata/instance/compute/name?api-version=2021-02-01&format=text", headers=headers, timeout=_TIMEOUT_S
    )
    name.raise_for_status()
    return 30.0 if any(name.text in event.get("Resources", ()) for event in taken) else None


CLOUDS: Mapping[str, Ask] = {"aws": aws, "gcp": gcp, "azure": azure}


def watch_for_notices(local_rank: int) -> NoticeWatch | None:
    """The watch of this node, in its first worker and where the node says whose it is.

    Raises:
        LaunchError: it names a cloud that is not known here.
    """
    cloud = os.environ.get(VARIABLE, "")
    if not cloud or local_rank != 0:
        return None
    if cloud not in CLOUDS:
        raise LaunchError(f"{VARIABLE}={cloud} names no cloud known here", fix=f"one of {', '.join(CLOUDS)}")
    return NoticeWatch(CLOUDS[cloud], drain_this_node)


class NoticeWatch:
    """Asks in a thread, tells of the first notice once, and then ends.

    Args:
        ask: the cloud.
        tell: called with the seconds that are left.
    """

    def __init__(self, ask: Ask, tell: Callable[[float], None]) -> None:
        self._ask, self._tell = ask, tell
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="preemption", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._closing.set()
        self._thread.join(timeout=2 * _TIMEOUT_S)

    def _run(self) -> None:
        warned = False
        while not self._closing.is_set():
            try:
                left_s = self._ask()
            except (requests.RequestException, ValueError, KeyError, TypeError) as error:
                left_s = None
                if not warned:
                    warned = True
                    log.warning("the cloud does not say whether it takes this node back: %s", error)
            if left_s is not None:
                self._tell(left_s)
                return
            self._closing.wait(POLL_S)


def drain_this_node(left_s: float) -> None:
    """Tell Ray that this node goes away in so many seconds, as an autoscaler would."""
    import ray
    from ray.core.generated import autoscaler_pb2

    context = ray.get_runtime_context()
    # As `ray drain-node` does; neither module has types.
    raylet: Any = ray._raylet
    reasons: Any = autoscaler_pb2
    accepted, why = raylet.GcsClient(address=context.gcs_address).drain_node(
        context.get_node_id(),
        reasons.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"),
        "the cloud takes this node back",
        int((time.time() + left_s) * 1000),
    )
    if not accepted:
        log.warning("Ray does not drain this node, which the cloud takes back: %s", why)
