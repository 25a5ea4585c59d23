"""The README is true: every command in it exists and is accepted, every file it names is there."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from echox import cli, errors
from echox.config.load import load_recipe
from echox.config.schema import DataConfig
from echox.engine.monitor.watchdog import HUNG

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def commands() -> list[str]:
    """Command lines of all shell blocks."""
    blocks = re.findall(r"```bash\n(.*?)```", TEXT, flags=re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def check_echox(words: list[str]) -> None:
    """The program accepts the words, and a recipe among them is right with its overrides."""
    args = cli.build_parser(words).parse_args(words)
    recipe = getattr(args, "recipe", None)
    if recipe is not None:
        load_recipe(recipe, getattr(args, "overrides", ()))


@pytest.mark.parametrize("command", commands())
def test_a_command_exists_and_is_accepted(command: str) -> None:
    words = shlex.split(command)
    match words:
        case ["make", target]:
            subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True)
        case ["echox", *rest]:
            check_echox(rest)
        case ["torchrun", "--nproc-per-node", count, "-m", "echox", *rest]:
            assert count.isdigit()
            check_echox(rest)
        case ["ray", "job", "submit", "--working-dir", ".", "--", "python", "-m", module, recipe, *overrides]:
            assert find_spec(module) is not None
            load_recipe(recipe, overrides)
        case [
            "ray",
            "job",
            "submit",
            "--working-dir",
            ".",
            "--runtime-env-json",
            environment,
            "--",
            "python",
            "-m",
            module,
            recipe,
            *overrides,
        ]:
            assert json.loads(environment)["env_vars"] and find_spec(module) is not None
            load_recipe(recipe, overrides)
        case ["export", assignment]:
            assert "=" in assignment
        case _:
            pytest.fail(f"no test knows how to check: {command}")


def test_the_blocks_are_found() -> None:
    assert len(commands()) >= 15


def test_the_example_of_a_data_section_is_valid() -> None:
    (block,) = re.findall(r"```yaml\n(data:.*?)```", TEXT, flags=re.DOTALL)
    data = DataConfig.model_validate(yaml.safe_load(block)["data"])
    assert [source.weight for source in data.train] == [1, 3] and data.budget is not None


def test_the_example_of_mistakes_is_what_the_program_prints() -> None:
    block = re.search(r"```console\n\$ echox (.*?)\n(.*?)```", TEXT, flags=re.DOTALL)
    assert block is not None
    words = [sys.executable, "-m", "echox", *shlex.split(block.group(1))]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stderr == block.group(2)


def test_the_folders_and_recipes_it_names_are_there() -> None:
    tree = re.search(r"## Layout\n\n```\n(.*?)```", TEXT, flags=re.DOTALL)
    assert tree is not None
    parent = ""
    for line in tree.group(1).splitlines():
        name = line.split()[0]
        parent = parent if line.startswith(" ") else name
        assert (ROOT / (parent + name if line.startswith(" ") else name)).is_dir(), line
    for file in re.findall(r"`((?:echox|launch|ds_configs)/[\w/]+\.\w+)`", TEXT):
        assert (ROOT / file).is_file(), file


def test_the_exit_codes_are_those_of_the_errors() -> None:
    table = {int(code) for code in re.findall(r"^\| (\d+) \|", TEXT, flags=re.MULTILINE)}
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.EchoXError)]
    assert table == {kind.exit_code for kind in kinds} | {cli.INTERRUPTED, HUNG}
