"""A process of the run files' test: trains the toy with a file of its own rank; `run_files_worker.py PLAN`."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launching import Context, work
from toy import ToyBuild, ToyOptions, toy_recipe
from worker import Killed, Scenario

from echox.config.schema import Recipe
from echox.engine.interfaces import StageSetup
from echox.engine.run_files import RunFile
from echox.engine.trainer import train
from echox.errors import EchoXError


@dataclass(frozen=True)
class Build:
    """The toy, with a file whose first word alone matters."""

    toy: ToyBuild
    folder: Path
    texts: list[str]
    learned: list[float]

    def __call__(self, recipe: Recipe, rank: int, world_size: int) -> StageSetup:
        setup = self.toy(recipe, rank, world_size)
        if not self.texts:
            return setup
        path, text = self.folder / f"words-{rank}.txt", self.texts[rank]
        path.write_text(text)
        word = text.split()[0]
        about = {"word": word, **({"learned": self.learned[rank]} if self.learned else {})}
        file = RunFile(path=path, sha256=hashlib.sha256(word.encode()).hexdigest(), about=about)
        return replace(setup, files={"words.txt": file}, notes={"word": f"it is {word}"})


def run(plan: dict[str, Any], context: Context, scenario: dict[str, Any]) -> dict[str, Any]:
    changes = {"engine__checkpoint_every": 2, "optim__steps": 4, "engine__validate_every": 0}
    recipe = toy_recipe(scenario["name"], Path(plan["deepspeed"]), **changes)
    frozen = Path(plan["frozen"])
    build = Build(ToyBuild(ToyOptions(), frozen), frozen.parent, scenario.get("texts", []), scenario.get("learned", []))
    try:
        result = train(recipe, Scenario(context, scenario.get("die_at")), build)
    except Killed:
        return {"killed": True}
    except EchoXError as error:
        return {"error": type(error).__name__, "text": str(error)}
    return {"step": result.step}


if __name__ == "__main__":
    work(run)
