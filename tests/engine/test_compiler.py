"""A run that is to be compiled is refused at its start, on every rank, where a node cannot compile."""

from __future__ import annotations

import sysconfig
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from echox.config.load import load_recipe
from echox.engine import compiler, trainer
from echox.engine.compiler import check_compiler, missing_for
from echox.engine.monitor.startup_timer import StartupTimer
from echox.engine.world import World
from echox.errors import RecipeError

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An environment with the named programs in its PATH, and headers."""
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))

    def environment(*names: str, **variables: str) -> dict[str, str]:
        for name in names:
            (tmp_path / name).touch(mode=0o755)
        return {"PATH": str(tmp_path), **variables}

    return environment


@pytest.mark.parametrize("name", ["gcc", "clang"])
def test_a_gpu_needs_a_c_compiler_and_a_cpu_one_for_cpp(programs: Any, name: str) -> None:
    assert missing_for(GPU, programs()) == "no gcc or clang in PATH, and no CC"
    assert missing_for(CPU, programs(name)) == "no g++ in PATH, and no CXX"
    assert missing_for(GPU, programs(name)) == missing_for(CPU, programs("g++")) == ""


def test_a_compiler_that_the_environment_names_is_looked_for_itself(programs: Any) -> None:
    assert missing_for(GPU, programs("gcc", CC="icc")) == "CC=icc is no program"
    assert missing_for(GPU, programs("icc", CC="icc")) == ""
    assert missing_for(CPU, programs("other", CXX="other")) == ""


def test_a_compiler_needs_pythons_headers(programs: Any, tmp_path: Path) -> None:
    environment = programs("gcc")
    (tmp_path / "Python.h").unlink()
    assert missing_for(GPU, environment) == f"no {tmp_path / 'Python.h'}"


class Gathered(World):
    """Two ranks, the second of which found something missing."""

    def all_gather(self, value: Any) -> list[Any]:
        return [value, ("node-2", "no gcc or clang in PATH, and no CC")]


def test_every_rank_names_the_nodes_that_cannot_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "missing_for", lambda device: "")
    check_compiler(False, Gathered(0, 2, GPU))
    check_compiler(True, World(0, 1, GPU))
    with pytest.raises(RecipeError) as refused:
        check_compiler(True, Gathered(0, 2, GPU))
    assert str(refused.value) == (
        "engine.compile=true needs a compiler on every node: node-2: no gcc or clang in PATH, and no CC. "
        "Fix: install gcc, g++ and Python's headers there, or set engine.compile=false"
    )


@pytest.mark.parametrize("wanted", [True, False])
def test_an_attempt_begins_with_the_check(monkeypatch: pytest.MonkeyPatch, wanted: bool) -> None:
    asked: list[Any] = []

    class Stop(Exception):
        pass

    def prepare(device: torch.device) -> None:
        raise Stop

    monkeypatch.setattr(trainer, "check_compiler", lambda *args: asked.append(args))
    monkeypatch.setattr(trainer, "prepare_deepspeed", prepare)
    recipe, world = load_recipe("demo/t2c", [f"engine.compile={str(wanted).lower()}"]), World(0, 1, CPU)
    unread: Any = None
    with pytest.raises(Stop):
        trainer._Attempt.open(recipe, unread, world, unread, unread, StartupTimer(), allow=())
    assert asked == [(wanted, world)]


def test_the_start_says_how_many_parts_run_compiled() -> None:
    said: list[tuple[str, dict[str, Any]]] = []
    attempt: Any = SimpleNamespace(
        recipe=load_recipe("demo/t2c"),
        world=World(1, 2, CPU),
        startup=StartupTimer(),
        reporter=SimpleNamespace(event=lambda name, **fields: said.append((name, fields))),
    )
    for compiled in ({"rotary": 4, "gated": 0}, {}):
        setup: Any = SimpleNamespace(compiled=compiled, notes={"word_limit": "4 words"} if compiled else {})
        trainer._Attempt._announce(attempt, "fp32", "replicate", {}, {}, setup)
    assert [name for name, _ in said] == ["start", "word_limit", "start"] and said[1][1] == {"what": "4 words"}
    assert said[0][1]["compiled"] == '{"rotary": 4, "gated": 0}' and "compiled" not in said[2][1]
