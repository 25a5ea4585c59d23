"""A process of the object store's tests: Stage II on real shards, every rank on a node and in a folder of its own."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

from launching import Context, work
from stream_worker import Build
from toy import toy_recipe

from echox.config.paths import storage_folder
from echox.engine.object_store import mirror
from echox.engine.trainer import train
from echox.errors import EchoXError


def run(plan: dict[str, Any], context: Context, scenario: dict[str, Any]) -> dict[str, Any]:
    """Train with the store that the recipe names; files that only the test reads lie in a folder of the plan."""
    node = f"node-{context.rank}"
    os.environ["ECHOX_CACHE"] = str(Path(scenario["nodes"]) / node)
    socket.gethostname = lambda: node
    mirror.EVERY_S = scenario.get("mirror_every_s", mirror.EVERY_S)
    recipe = toy_recipe(scenario["name"], Path(plan["deepspeed"]), **scenario["recipe"])
    seen = Path(plan["storage"]) / recipe.name / "seen"
    context.storage, context.local_rank = storage_folder(recipe.storage), 0
    try:
        with mirror.mirrored(recipe.storage, recipe.name, first=context.rank == 0):
            result = train(recipe, context, Build(Path(plan["frozen"]), seen))
    except EchoXError as error:
        return {"error": type(error).__name__, "text": str(error)}
    return {"step": result.step, "stopped": result.stopped, "checkpoint": str(result.checkpoint)}


if __name__ == "__main__":
    work(run)
