"""Unit tokens of a release are read by the rule of the released code, written out here as it is described."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from echox.errors import DataError
from echox.units.language import UnitLanguage
from echox.units.pieces import PieceLanguage

PIECES = ["▁837_8", "1_194", "▁5", "_7", "_1000", "12", "▁"]


def by_the_rule(tokens: list[str]) -> list[int]:
    """All digits of the joined bodies where one of them starts a word, else of the whole text; 1,000 is none."""
    text = "".join(tokens)
    if "▁" in text:
        text = "".join(re.findall(r"<\|unit_(.+?)\|>", text))
    return [int(digits) for digits in re.findall(r"\d+", text) if int(digits) < 1000]


def test_tokens_are_read_by_the_rule() -> None:
    language = PieceLanguage(PIECES)
    assert language.decode([0, 1, 2, 3]) == [837, 81, 194, 5, 7]
    assert language.decode([5, 5]) == [12, 12] and language.decode([2, 5]) == [512], "what starts a word joins them"
    random = np.random.default_rng(0)
    for size in range(6):
        ids = random.integers(0, len(PIECES), size).tolist()
        assert language.decode(ids) == by_the_rule([language.token(word) for word in ids])
    with pytest.raises(DataError, match="Unit word 7 is outside 0 to 6"):
        language.decode([7])


@pytest.mark.parametrize(
    ("bodies", "alone"), [(PIECES, False), (["▁1_2", "▁3", "_4"], True), (["0", "1", "2"], True), (["▁1", "2"], False)]
)
def test_a_language_knows_whether_its_tokens_mean_units_alone(bodies: list[str], alone: bool) -> None:
    language = PieceLanguage(bodies)
    assert language.separable is alone
    if alone:
        ids = [0, 1, 2, 1, 0]
        assert language.decode(ids) == [unit for word in ids for unit in language.decode([word])]


def test_it_is_kept_as_a_unit_language_and_cannot_encode(tmp_path: Path) -> None:
    language = PieceLanguage(PIECES)
    language.save(tmp_path / "l.json")
    loaded = UnitLanguage.load(tmp_path / "l.json")
    assert isinstance(loaded, PieceLanguage) and loaded.bodies == PIECES and loaded.sha256 == language.sha256
    assert loaded.sha256 != PieceLanguage([*PIECES[::-1]]).sha256 and loaded.size == len(PIECES)
    with pytest.raises(DataError, match="brings no probabilities"):
        loaded.encode([1, 2])


@pytest.mark.parametrize(
    "change",
    [{"bodies": []}, {"bodies": [1]}, {"bodies": ["x" * 999]}, {"n_units": 0}, {"n_units": "1"}, {"bodies": {}}],
)
def test_what_is_none_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    PieceLanguage(PIECES).save(tmp_path / "l.json")
    content = {**json.loads((tmp_path / "l.json").read_text()), **change}
    (tmp_path / "l.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="Cannot read the unit language"):
        UnitLanguage.load(tmp_path / "l.json")
