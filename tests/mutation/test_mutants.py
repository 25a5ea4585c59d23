"""Mutants compile, differ from the module, keep their names, and are told from what they came from by a test."""

from __future__ import annotations

import ast

import pytest
import yaml

from tests.mutation.mutants import mutants_of, rewritten
from tests.mutation.run import MODULES, NAMED, ROOT, equivalents, named

SOURCE = '''
"""Says nothing."""

LIMIT = 3

def share(values, mask, *, scale=1.0):
    """Mean of the values under a mask."""
    if not values:
        raise ValueError("nothing here")
    total = 0
    for value, real in zip(values, mask):
        total += value * real
    kept = [value for value in values if value < LIMIT]
    assert len(kept) >= 0
    return total / max(sum(mask), 1) * scale, len(kept)
'''


def test_every_mutant_compiles_differs_and_has_a_name_of_its_own() -> None:
    tree = ast.parse(SOURCE)
    found = mutants_of("a.py", SOURCE)
    texts = [ast.unparse(mutant.apply(tree)) for mutant in found]
    assert ast.unparse(tree) == ast.unparse(ast.parse(SOURCE)), "the module itself was changed"
    assert len({mutant.id for mutant in found}) == len(found) > 24
    for mutant, text in zip(found, texts, strict=True):
        compile(mutant.apply(tree), "a.py", "exec")
        assert text != ast.unparse(tree), mutant
    for piece in (
        "if values:", "total -= value * real", "total += value / real", "total += value\n", "total += real",
        "value <= LIMIT", "value >= LIMIT", "[value for value in values]", "LIMIT = 4", "min(sum(mask), 1)",
        "max(sum(mask), 0)", "scale=2.0", "return (len(kept), total",
    ):  # fmt: skip
        assert any(piece in text for text in texts), piece
    assert all("nothing here" in text for text in texts if "raise" in text)
    assert all("len(kept) >= 0" in text for text in texts)


def test_a_name_stays_when_other_lines_change() -> None:
    longer = SOURCE.replace("LIMIT = 3", "LIMIT = 3\nOTHER = 5").replace("Mean of", "The mean of")
    assert {m.id for m in mutants_of("a.py", SOURCE)} < {m.id for m in mutants_of("a.py", longer)}


def test_a_mutant_that_was_thought_of_must_still_have_its_place() -> None:
    mutant = rewritten("no scale", "a.py", SOURCE, " * scale", "")
    assert "* scale" not in ast.unparse(mutant.apply(ast.parse(SOURCE)))
    assert mutant.lines == (15, 15) and mutant.rank("0") < mutants_of("a.py", SOURCE)[0].rank("0")
    with pytest.raises(ValueError, match="2 times"):
        rewritten("which", "a.py", SOURCE, "LIMIT", "")


def test_every_named_mistake_still_has_its_place(capsys: pytest.CaptureFixture[str]) -> None:
    entries = yaml.safe_load(NAMED.read_text(encoding="utf-8"))
    assert len(list(named(None))) == len(entries) > 10, capsys.readouterr().out


def test_modules_and_reasons_are_there() -> None:
    assert all((ROOT / module).is_file() for module in MODULES) and NAMED.is_file()
    assert all(len(why) > 20 for why in equivalents().values())
