"""The reference of recipe keys: complete, true, and the same as the schema says."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import PositiveInt
from pydantic.fields import FieldInfo

from echox import cli
from echox.config import reference
from echox.config.load import load_recipe
from echox.config.schema import SourceConfig

UNITS = {
    r"_s$": "seconds",
    r"_hours$": "hours",
    r"steps$|(?<!refresh)_every$|\.pool$|spike_window$": "steps",
    r"_tokens$|max_wait$|look_ahead$|max_positions$": "tokens",
    r"refresh_every$": "epochs",
    r"respond\.batch$": "questions",
    r"_batch$|quarantine\.samples$": "samples",
    r"micro_batches$|prefetch$": "micro-batches",
    r"budget\.size$": "seconds or tokens",
    r"window_shards$": "shards",
    r"stack$": "frames",
    r"text_stride$|units_per_token$": "words",
    r"units_per_character$|window_units$": "units",
    r"heads$": "heads",
    r"layers$": "layers",
    r"width$|ffn$": "width",
    r"\.r$": "rank",
    r"repeat$": "passes",
    r"\.keep$": "checkpoints",
    r"failures$": "failures",
    r"rewinds$": "times",
    r"workers$|batch_for$": "ranks",
    r"reader_threads$": "threads",
    r"gpus_per_worker$": "GPUs",
    r"cpus_per_worker$": "CPU cores",
    r"spike_sigma$": "standard deviations",
    r"hang_factor$": "times",
    r"dropout$|share$": "share",
    r"busbw$": "GB",
}
"""What the description of a number calls what it counts, by the end of the key."""
WITHOUT_UNIT = {
    "seed",
    "model.llm.lora.alpha",
    "model.alignment.ffn_multiple",
    "model.ctc.weight",
    *(f"model.echo.{key}" for key in ("s2t_weight", "ctc_weight")),
    *(f"model.echo.respond.{key}" for key in ("temperature", "top_p", "seed")),
    "model.echo.segmentation.threshold",
    "model.echo.denoising.cap",
    "model.echo.denoising.weight",
    "scaling.priority",
    "data.train.N.weight",
    "data.valid.N.weight",
    *(f"optim.{key}" for key in ("betas", "clip", "eps", "final_lr_ratio", "weight_decay")),
    *(f"optim.lr.{part}" for part in ("adapters", "lora", "t2c", "denoising", "echo", "align")),
}
TEXT = reference.README.read_text(encoding="utf-8")


def described() -> Iterator[tuple[str, FieldInfo]]:
    for table in reference.tables():
        yield from table.keys


def rows() -> list[list[str]]:
    """Cells of every row that describes a key."""
    lines = [line for line in TEXT.splitlines() if line.startswith("| `")]
    return [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines]


def test_the_page_is_what_the_schema_says() -> None:
    assert reference.reference() == TEXT, "the page is stale: run `echox recipe keys --write`"


@pytest.mark.parametrize(("key", "field"), list(described()))
def test_a_key_is_described_and_a_number_names_its_unit(key: str, field: FieldInfo) -> None:
    assert field.description, f"{key} has no description"
    if "number" in reference.type_of(field.annotation):
        units = [unit for end, unit in UNITS.items() if re.search(end, key)]
        assert len(units) == (key not in WITHOUT_UNIT), f"{key} has a unit, or is listed as a number without one"
        for unit in units:
            assert re.search(rf"\b{unit}\b", field.description), f"the description of {key} does not say {unit}"


def test_every_value_of_a_recipe_has_one_row() -> None:
    shown = [cells[0].strip(" `") for cells in rows()]
    assert {len(cells) for cells in rows()} == {5}
    sections = ["model.speech_encoder.path=w", "data.budget={by: tokens, size: 9, micro_batches: 4}"]
    loaded = load_recipe("demo/t2c", sections)
    assert loaded.data.valid
    lists = {"data.train", "data.valid"}
    assert sorted(shown) == sorted(lists | set(values(loaded.model_dump(mode="json"))))


def values(tree: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Keys of everything in a recipe that is no section, with N for the number of a list's item."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from values(value, f"{prefix}{key}.")
        elif isinstance(value, list) and isinstance(value[0], dict):
            yield from values(value[0], f"{prefix}{key}.N.")
        else:
            yield prefix + key


def test_the_defaults_it_shows_can_be_written_in_a_recipe() -> None:
    shown = {key: default.strip(" `") for key, _, default, _, _ in ([c.strip(" `") for c in cells] for cells in rows())}
    given = [f"{key}={text}" for key, text in shown.items() if text != "required" and ".N." not in key]
    recipe = load_recipe("demo/t2c", ["model.speech_encoder.path=w", *given])
    for key, field in described():
        if not field.is_required() and ".N." not in key:
            node: Any = recipe
            for part in key.split("."):
                node = getattr(node, part)
            assert node == field.default, key


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (int, "whole number"),
        (PositiveInt | None, "whole number > 0 or `null`"),
        (bool, "`true`, `false`"),
        (Literal["a", "b"], "`a`, `b`"),
        (tuple[str, ...], "list of texts"),
        (int | tuple[int, int], "whole number or list of 2 whole numbers"),
        (tuple[SourceConfig, ...], "list of sections"),
    ],
)
def test_a_type_in_words(annotation: Any, words: str) -> None:
    assert reference.type_of(annotation) == words


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("model.speech_encoder.margin_s", "number ≥ 0, ≤ 5"),
        ("model.llm.lora.dropout", "number ≥ 0, < 1"),
        ("model.llm.lora.targets", "list of texts, not empty"),
        ("data.quarantine.samples", "whole number ≥ 0 or `null`"),
    ],
)
def test_the_bounds_of_a_value_are_shown(key: str, words: str) -> None:
    field = dict(described())[key]
    assert reference.type_of(field.annotation, field.metadata) == words


def test_the_page_begins_with_its_question_and_its_commands_are_accepted() -> None:
    assert TEXT.startswith("# What can a recipe say?\n")
    commands = re.findall(r"^echox (.*)$", TEXT, flags=re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        words = shlex.split(command)
        args = cli.build_parser(words).parse_args(words)
        if args.command == "train":
            load_recipe(args.recipe, args.overrides)


def test_the_command_prints_or_writes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reference, "README", tmp_path / "page.md")
    assert cli.main(["recipe", "keys"]) == 0
    assert capsys.readouterr().out == TEXT
    assert not reference.README.exists()
    assert cli.main(["recipe", "keys", "--write"]) == 0
    assert reference.README.read_text(encoding="utf-8") == TEXT
