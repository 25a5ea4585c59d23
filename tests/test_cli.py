"""The `echox` program: commands, help, error sentences and exit codes."""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from echox import cli
from echox.errors import (
    AlteredModelError,
    CheckpointError,
    DataError,
    EchoXError,
    LaunchError,
    MissingModelError,
    NetworkError,
    RecipeError,
)


def leaves(
    parser: argparse.ArgumentParser, path: tuple[str, ...] = ()
) -> dict[tuple[str, ...], argparse.ArgumentParser]:
    """Every command that can be run, by its words."""
    groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not groups:
        return {path: parser}
    return {
        k: v
        for group in groups
        for name, child in group.choices.items()
        for k, v in leaves(child, (*path, name)).items()
    }


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[argparse.Namespace], Any]], None]:
    """Put a function of the test in place of `echox doctor`."""

    def install(run: Callable[[argparse.Namespace], Any]) -> None:
        class Fake:
            @staticmethod
            def add_parser(subparsers: Any) -> None:
                subparsers.add_parser("doctor").set_defaults(run=run)

        monkeypatch.setattr(importlib, "import_module", lambda name: Fake)

    return install


def test_the_table_of_commands_is_what_the_modules_register() -> None:
    parser = cli.build_parser([])
    registered = {words[0] for words in leaves(parser)}
    assert registered == set(cli.COMMANDS)
    for words in cli.COMMANDS:
        assert words in {path[0] for path in leaves(cli.build_parser([words]))}


def test_every_command_can_run_and_shows_an_example() -> None:
    for words, parser in leaves(cli.build_parser([])).items():
        assert callable(parser.get_default("run")), f"echox {' '.join(words)} sets no run"
        text = parser.format_help()
        assert "example" in text.lower() and f"echox {words[0]}" in text.split("example", 1)[-1], " ".join(words)


def test_help_starts_without_torch_ray_or_transformers() -> None:
    code = (
        "import sys; from echox import cli; cli.build_parser([]); "
        "print([m for m in ('torch', 'ray', 'transformers', 'deepspeed', 'mlflow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_exits_with_zero_and_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    for name in cli.COMMANDS:
        assert re.search(rf"^ +{name}\b", shown, flags=re.MULTILINE), name


def test_a_wrong_command_line_exits_with_two() -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["nonsense"])
    assert caught.value.code == 2


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (EchoXError, 1),
        (RecipeError, 2),
        (MissingModelError, 3),
        (AlteredModelError, 3),
        (DataError, 4),
        (CheckpointError, 5),
        (NetworkError, 6),
        (LaunchError, 7),
    ],
)
def test_an_error_is_one_sentence_and_its_code(
    command: Any, capsys: pytest.CaptureFixture[str], error: type[EchoXError], code: int
) -> None:
    def run(args: argparse.Namespace) -> None:
        raise error("the shard is cut", where="a.tar", fix="build it again")

    command(run)
    assert cli.main(["doctor"]) == code
    assert capsys.readouterr().err == "echox: the shard is cut [a.tar]. Fix: build it again\n"


def test_debug_shows_the_traceback(command: Any) -> None:
    def run(args: argparse.Namespace) -> None:
        raise DataError("the shard is cut")

    command(run)
    for words in (["--debug", "doctor"], ["doctor", "--debug"]):
        with pytest.raises(DataError):
            cli.main(words)


def test_the_unforeseen_names_its_kind_and_the_way_to_the_traceback(
    command: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(args: argparse.Namespace) -> None:
        raise KeyError("weights")

    command(run)
    assert cli.main(["doctor"]) == 1
    shown = capsys.readouterr().err
    assert "KeyError" in shown and "--debug" in shown and "Traceback" not in shown


def test_ctrl_c_exits_with_130(command: Any) -> None:
    def run(args: argparse.Namespace) -> None:
        raise KeyboardInterrupt

    command(run)
    assert cli.main(["doctor"]) == 130


def test_the_code_of_a_command_is_passed_on(command: Any) -> None:
    command(lambda args: 9)
    assert cli.main(["doctor"]) == 9
    command(lambda args: None)
    assert cli.main(["doctor"]) == 0


def test_a_wrong_recipe_on_the_command_line_prints_all_mistakes_and_no_traceback() -> None:
    words = ["train", "demo/s2t", "optim.step=1", "engine.precision=bf61", "data.global_batch=24"]
    done = subprocess.run([sys.executable, "-m", "echox", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n  - ") == 3
    assert "Traceback" not in done.stderr


def test_doctor_as_json(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ECHOX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:9")
    code = cli.main(["doctor", "--json"])
    findings = {finding["subject"]: finding for finding in json.loads(capsys.readouterr().out)}
    assert code == int(any(finding["state"] == "fail" for finding in findings.values()))
    assert findings["torch"]["state"] in {"ok", "note"}
    assert findings["openai/whisper-base"]["fix"].startswith("run `make demo`")
    assert "hf download openai/whisper-large-v3" in findings["openai/whisper-large-v3"]["fix"]
    assert findings["ray head"]["state"] == "note" and findings["demo corpus"]["state"] == "note"
