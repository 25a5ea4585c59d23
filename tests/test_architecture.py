"""The architecture document is true: every file and function it names exists, and a step goes through them in order."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from types import FrameType

import pytest
import yaml

from tests import tiny

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "echox" / "README.md").read_text(encoding="utf-8")
NAMED = re.compile(r"`(echox/[\w/]+\.py)` `([\w.]+)`")


def walk() -> list[tuple[str, str]]:
    """File and function of the numbered walk, in order; a point may name two."""
    steps = TEXT.split("## One step of Stage III")[1]
    return [(file, name) for file, name in NAMED.findall(steps)]


def functions(file: Path) -> set[str]:
    """`function` and `Class.method` of a module."""
    found: set[str] = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return found


def test_every_point_of_the_walk_names_a_function() -> None:
    points = re.findall(r"^\d+\. (.*)", TEXT, flags=re.MULTILINE)
    assert len(points) >= 20 and all(NAMED.search(point) for point in points)


@pytest.mark.parametrize(("file", "name"), walk())
def test_a_named_function_exists(file: str, name: str) -> None:
    assert name in functions(ROOT / file)


def test_a_forward_of_the_stage_calls_its_points_in_their_order() -> None:
    points = walk()
    start = points.index(("echox/stages/echo.py", "EchoStage.forward"))
    wanted = points[start : points.index(("echox/stages/echo.py", "EchoStage.loss_weights"))]
    called: list[tuple[str, str]] = []

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call":
            file = Path(frame.f_code.co_filename)
            point = (file.relative_to(ROOT).as_posix() if file.is_relative_to(ROOT) else "", frame.f_code.co_qualname)
            if point in wanted and point not in called:
                called.append(point)

    stage, batch = tiny.echo_stage(), tiny.speech_batch()
    sys.setprofile(note)
    try:
        stage(batch)
    finally:
        sys.setprofile(None)
    assert called == wanted


def test_the_rooms_of_the_table_are_the_folders_of_the_library() -> None:
    rooms = {
        room for line in TEXT.splitlines() if (found := re.match(r"\| `(\w+)/` ", line)) for room in found.groups()
    }
    assert rooms == {folder.parent.name for folder in (ROOT / "echox").glob("*/__init__.py")}


def test_the_hooks_run_what_check_runs() -> None:
    (recipe,) = re.findall(r"^check: .*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    checked = [line.strip().replace("$(BIN)/", ".venv/bin/") for line in recipe.splitlines()]
    assert [hook["entry"] for hook in hooks] == checked


def test_the_guide_for_contributors_fits_on_a_page() -> None:
    assert len((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines()) <= 60
