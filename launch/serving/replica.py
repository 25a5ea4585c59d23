"""One replica: a run in a process of Ray Serve, behind the application of `echox serve`."""

from __future__ import annotations

import os
from typing import Any

from echox.errors import LaunchError
from echox.serve.app import LOOPBACK, build_app
from echox.serve.loading import load
from echox.serve.worker import Worker
from launch.serving.config import TOKEN, Serving


class Replica:
    """Loads the run, and answers.

    Args:
        serving: what is served.

    Raises:
        LaunchError: other machines reach it, and its node has no token.
        EchoXError: the run or the vocoder cannot be loaded.
    """

    def __init__(self, serving: Serving) -> None:
        token = os.environ.get(TOKEN) or None
        if token is None and not serving.at_home:
            fix = f"set {TOKEN} on the nodes before `ray start`, or --host 127.0.0.1"
            raise LaunchError(f"whoever reaches {serving.host} could use it, for no token is set", fix=fix)
        model, vocoder = load(serving.run, serving.vocoder, serving.speaker)
        limits = serving.limits(model.max_audio_s)
        self._worker = Worker(model, vocoder, limits)
        hosts = LOOPBACK if serving.at_home else ("*",)
        self._app = build_app(self._worker, limits, name=model.recipe.name, token=token, hosts=hosts)

    def __serve_build_asgi_app__(self) -> Any:
        """What Ray Serve runs; it starts and stops the worker."""
        return self._app

    def check_health(self) -> None:
        """Asked by Ray Serve, which replaces a replica that raises here or is silent.

        Raises:
            RuntimeError: it answers nobody any more.
        """
        if not self._worker.healthy:
            raise RuntimeError("the replica answers nobody any more")
