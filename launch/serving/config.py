"""Says how a run is served on a cluster, and what Ray Serve is told of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from echox.errors import LaunchError
from echox.serve.app import LOOPBACK
from echox.serve.limits import Limits

APP = "echox"
"""Name of the application in Ray Serve."""
TOKEN = "ECHOX_SERVE_TOKEN"
"""Variable of the nodes that holds the token that requests must carry."""
HEALTH_S, HEALTH_TIMEOUT_S = 5.0, 60.0
"""How often a replica is asked whether it answers, and how long it may take: a step on a busy CPU takes seconds."""
TRIES = 2
"""Replicas that may fail to start, one after another; a wrong run would fail indefinitely."""
GRACE_S = 20.0
"""What answers in progress get to end when a replica is taken away."""


@dataclass(frozen=True, kw_only=True)
class Serving:
    """A run on a cluster.

    Attributes:
        run: folder that all nodes see, or URL.
        vocoder: folder of the voice; None: the demo's, below the cache of each node.
        speaker: name or number of who speaks, in a voice of several; None: the first.
        host: address that the proxies listen on.
        port: port of theirs.
        replicas: how many, or the fewest.
        most: replicas where there are many questions; equal to `replicas` for a fixed number.
        gpus: GPUs of a replica, also parts of one; 0: it computes on the CPU.
        cpus: CPU cores of a replica.
        open: answers in progress at a time, of a replica.
        waiting: questions that wait, of a replica.

    Raises:
        LaunchError: at construction, with all that is wrong.
    """

    run: str
    vocoder: str | None = None
    speaker: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    replicas: int = 1
    most: int = 1
    gpus: float = 0.0
    cpus: float = 1.0
    open: int = 4
    waiting: int = 16

    def __post_init__(self) -> None:
        wrong = [f"{name} is {getattr(self, name)}, not above 0" for name in ("replicas", "cpus", "open", "waiting")
                 if not getattr(self, name) > 0]  # fmt: skip
        wrong += [f"gpus is {self.gpus:g}, below 0"] if self.gpus < 0 else []
        wrong += [f"gpus is {self.gpus:g}: above 1, only whole ones"] if self.gpus > 1 and self.gpus % 1 else []
        wrong += [f"at most {self.most} replicas are fewer than {self.replicas}"] if self.most < self.replicas else []
        wrong += [f"port is {self.port}, not from 1 to 65535"] if not 0 < self.port < 1 << 16 else []
        if wrong:
            raise LaunchError("; ".join(wrong), fix="give other numbers")

    @property
    def at_home(self) -> bool:
        """Whether only the head's own machine reaches it."""
        return self.host in LOOPBACK

    def limits(self, question_s: float) -> Limits:
        """Bounds of a replica; `question_s` is what its run hears."""
        return Limits(open=self.open, waiting=self.waiting, question_s=question_s)

    def deployment(self, variables: dict[str, str]) -> dict[str, Any]:
        """Options of Ray Serve's deployment.

        Args:
            variables: of the replicas' environment.
        """
        limits = self.limits(1.0)
        scale: dict[str, Any] = {"num_replicas": self.replicas}
        if self.most > self.replicas:
            scale = {"autoscaling_config": {"min_replicas": self.replicas, "max_replicas": self.most,
                                            "target_ongoing_requests": self.open}}  # fmt: skip
        return {
            **scale,
            "ray_actor_options": {
                "num_cpus": self.cpus,
                "num_gpus": self.gpus,
                "runtime_env": {"env_vars": variables},
            },
            # More than a replica takes, so that its own sentence says that it is full.
            "max_ongoing_requests": 2 * (limits.conversations + self.open + self.waiting),
            "max_constructor_retry_count": TRIES,
            "health_check_period_s": HEALTH_S,
            "health_check_timeout_s": HEALTH_TIMEOUT_S,
            "graceful_shutdown_timeout_s": GRACE_S,
        }
