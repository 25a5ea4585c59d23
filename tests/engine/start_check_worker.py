"""A process of the start check's test: asks with the storage, host name and versions that a scenario gives its rank."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any
from unittest import mock

from launching import Context, work

from echox.engine import start_check, storage_proof
from echox.engine.context import device_of
from echox.engine.monitor.run_dir import RunDir
from echox.engine.world import World
from echox.errors import EchoXError


def run(plan: dict[str, Any], context: Context, scenario: dict[str, Any]) -> list[dict[str, Any]]:
    """What each rank says."""
    world = World.of(context.rank, context.world_size, device_of(context))
    return world.all_gather(_asked(plan, context, scenario, world))


def _asked(plan: dict[str, Any], context: Context, scenario: dict[str, Any], world: World) -> dict[str, Any]:
    rank = context.rank

    def of(name: str, otherwise: Any) -> Any:
        return scenario[name][rank] if name in scenario else otherwise

    storage = Path(plan["storage"]) / of("storage", "shared")
    real = time.time
    patches = [
        mock.patch("socket.gethostname", lambda: of("hosts", "one")),
        mock.patch.object(start_check, "installed", lambda: {"torch": of("torch", "2.0")}),
        mock.patch.object(start_check, "code_hash", lambda: of("code", "abc")),
        mock.patch.object(storage_proof, "PATIENCE_S", 0.5),
        mock.patch.object(start_check, "LEAST_FREE", of("least_free", 0)),
        mock.patch("time.time", lambda: real() + of("clock", 0)),
    ]
    for patch in patches:
        patch.start()
    try:
        models = {"llm": Path(plan["storage"]) / of("model", "model")}
        found = start_check.check_start(
            RunDir(storage / "run"),
            models,
            world,
            least_busbw=scenario.get("least", 0.0),
            in_one_file=scenario.get("sqlite", False),
        )
    except EchoXError as error:
        return {"error": error.what, "code": error.exit_code}
    finally:
        for patch in patches:
            patch.stop()
    left = sorted(path.name for path in (storage / "run").glob(".start-*"))
    return {"hosts": found.hosts, "speed": found.allreduce_gb_s, "notes": found.notes, "left": left}


if __name__ == "__main__":
    work(run)
