"""Rules of the house that no single module can hold: imports, packages, what files may name."""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("echox", "launch", "shards")
SOURCES = sorted(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))
# Joined here so that this file does not name what it forbids.
FORBIDDEN = re.compile(
    "|".join(
        ["pypi" + r"\.org", "python" + "hosted", "npm" + r"js\.org", r"deb\.deb" + "ian", "/" + "work/", "/tmp/" + "w/"]
    )
)
ABOVE_THE_ENGINE = (
    *("echox.stages", "echox.release", "echox.units", "echox.audio", "echox.tracking", "echox.builders"),
    "echox.vocoder",
)
LIBRARIES_OF_A_RUN = ("ray", "deepspeed", "mlflow")
NEVER = {
    "echox": ("ray", "launch", "shards"),
    "echox/responses": (
        *LIBRARIES_OF_A_RUN,
        *("echox.builders", "echox.stages", "echox.release", "echox.tracking", "echox.evaluate", "echox.speak"),
    ),
    "echox/models": (
        *LIBRARIES_OF_A_RUN,
        *("echox.files", "echox.config", "echox.stream", "echox.stages", "echox.engine", "echox.tracking"),
        *("echox.builders", "echox.evaluate", "echox.speak", "echox.release", "echox.responses"),
    ),
    "echox/stages": (
        *LIBRARIES_OF_A_RUN,
        *("echox.engine", "echox.tracking", "echox.files", "echox.builders", "echox.evaluate", "echox.responses"),
    ),
    "echox/engine": (*ABOVE_THE_ENGINE, "echox.speak", "echox.evaluate", "echox.train", "echox.responses"),
    "echox/stream": (
        *("echox.release", "echox.models", "echox.stages", "echox.engine", "echox.builders", "echox.responses"),
    ),
    "echox/builders": ("echox.tracking", "echox.speak", "echox.evaluate", "echox.vocoder"),
    "echox/tracking": ("echox.evaluate", "echox.engine", "echox.stages", "echox.builders"),
    "echox/speak": ("echox.evaluate", "echox.tracking", "echox.serve"),
    "echox/vocoder": ("echox.evaluate", "echox.serve", "echox.stages", "echox.responses", "echox.speak"),
    "echox/serve": ("echox.evaluate", "echox.tracking", "echox.stages", "echox.train"),
    "echox/evaluate": ("echox.serve",),
    "shards": ("launch", "ray"),
}
"""Room to what no file in it may import, also inside functions: dependencies point one way."""


def project_files() -> list[Path]:
    """Files of the project: what git tracks or would track; every file where this is no checkout."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return [ROOT / name for name in done.stdout.splitlines() if (ROOT / name).is_file()]
    skipped = {".venv", ".git", "runs"}
    return [file for file in ROOT.rglob("*") if file.is_file() and not skipped & set(file.relative_to(ROOT).parts)]


def imports(file: Path) -> set[str]:
    """Every module a file imports, also inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def top_level(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def within(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def test_no_file_names_a_registry_host_or_a_path_of_one_machine() -> None:
    found = []
    for file in project_files():
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [
            f"{file.relative_to(ROOT)}: {line.strip()[:80]}" for line in text.splitlines() if FORBIDDEN.search(line)
        ]
    assert found == []


def test_no_weights_or_audio_are_kept_here() -> None:
    heavy = {".safetensors", ".bin", ".onnx", ".pt", ".gguf", ".tar", ".wav", ".flac", ".npz"}
    files = project_files()
    assert [file.name for file in files if file.suffix in heavy] == []
    assert [file.name for file in files if file.stat().st_size > 500_000] == []


@pytest.mark.parametrize(("room", "module"), [(room, module) for room in sorted(NEVER) for module in NEVER[room]])
def test_a_room_never_imports(room: str, module: str) -> None:
    found = [
        f"{file.relative_to(ROOT)}: {name}"
        for file in within(room)
        for name in sorted(imports(file))
        if f"{name}.".startswith(f"{module}.")
    ]
    assert found == []


def test_only_the_engine_and_the_configuration_know_deepspeed() -> None:
    for file in SOURCES:
        if "deepspeed" in top_level(imports(file)):
            assert file.relative_to(ROOT).parts[:2] in {("echox", "engine"), ("echox", "config")}, file


def test_no_optional_imports_hide_a_missing_part() -> None:
    for file in SOURCES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ExceptHandler) and node.type is not None:
                caught = ast.unparse(node.type)
                assert "ImportError" not in caught and "ModuleNotFoundError" not in caught, f"{file}:{node.lineno}"


def test_no_folder_has_a_name_that_linters_and_test_collectors_pass_over() -> None:
    passed_over = {"build", "_build", "dist", "venv", "env", "node_modules", "site-packages", "CVS"}
    folders = {part for file in project_files() for part in file.relative_to(ROOT).parts[:-1]}
    assert not folders & passed_over


def test_every_package_says_what_belongs_in_it() -> None:
    for package in PACKAGES:
        for folder in {file.parent for file in within(package)}:
            init = folder / "__init__.py"
            assert init.is_file(), f"{folder.relative_to(ROOT)} has no __init__.py"
            assert ast.get_docstring(ast.parse(init.read_text(encoding="utf-8"))), init


def test_no_unfinished_marks() -> None:
    marks = re.compile("|".join(["TO" + "DO", "FIX" + "ME", "NotImplemented" + "Error"]))
    assert [str(file) for file in SOURCES if marks.search(file.read_text(encoding="utf-8"))] == []


def test_every_import_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *(w for extra in project["optional-dependencies"].values() for w in extra)]
    declared = {re.split(r"[\[<>=~! ]", item)[0].lower().replace("-", "_") for item in wanted}
    names = {"yaml": "pyyaml", "sklearn": "scikit_learn", "piper": "piper_tts"}
    # Parts of a declared package that are imported under their own name.
    implied = {"pydantic_core": "pydantic", "onnx": "onnx_asr"}
    import sys

    for file in SOURCES:
        for name in top_level(imports(file)) - set(sys.stdlib_module_names) - set(PACKAGES):
            wanted_name = implied.get(name, names.get(name, name)).lower()
            assert wanted_name in declared, f"{file.relative_to(ROOT)} imports {name}, which pyproject.toml leaves out"


def test_the_lock_holds_names_and_versions_within_the_ranges() -> None:
    from packaging.requirements import Requirement

    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+!]+", line) for line in lines)
    tested = dict(line.split("==") for line in lines)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for item in [*project["dependencies"], *(w for extra in project["optional-dependencies"].values() for w in extra)]:
        requirement = Requirement(item)
        assert requirement.specifier, f"{item} has no range" if requirement.name != "types-PyYAML" else ""
        assert requirement.specifier.contains(tested[requirement.name.lower()]), item


def test_continuous_integration_runs_lint_format_types_and_tests() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    text = script.read_text(encoding="utf-8")
    assert "set -euo pipefail" in text and "make check" in text
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (recipe,) = re.findall(r"^check: .*\n((?:\t.*\n)+)", makefile, flags=re.MULTILINE)
    for step in ("ruff check .", "ruff format --check .", "mypy --strict echox launch shards", "-m pytest"):
        assert step in recipe
