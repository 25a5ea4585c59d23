"""What is held out of a list: every utterance in one part, where it stays as the list grows or a share changes."""

from __future__ import annotations

from pathlib import Path

import pytest

from echox import cli
from echox.errors import DataError
from shards.builder.hold_out import PARTS, Shares, part_of
from shards.corpora.registry import CORPORA
from shards.corpus import Request
from tests.shards.layouts import put_lines


def listed(folder: Path, count: int) -> Path:
    rows = [{"text": f"question {number}?", "answer_text": "A."} for number in range(count)]
    return put_lines(folder / "questions.jsonl", rows)


def ids(place: Path, part: str, shares: Shares) -> set[str]:
    found = list(part_of(CORPORA["manifest"], part, shares).discover(place, Request(task="sqa")))
    assert {each.split for each in found} == {part}
    return {each.id for each in found}


def test_every_utterance_is_in_one_part_and_stays_there(tmp_path: Path) -> None:
    shares = Shares(0.2, 0.2)
    few = {part: ids(listed(tmp_path, 60), part, shares) for part in PARTS}
    assert sum(map(len, few.values())) == 60 == len(set.union(*few.values()))
    assert all(4 <= len(few[part]) <= 24 for part in ("valid", "test"))
    more = {part: ids(listed(tmp_path, 90), part, shares) for part in PARTS}
    assert all(few[part] <= more[part] for part in PARTS)


def test_a_share_that_changes_moves_nothing_between_what_is_held_out(tmp_path: Path) -> None:
    place = listed(tmp_path, 200)
    small, large = Shares(0.1, 0.1), Shares(0.3, 0.3)
    for part in ("valid", "test"):
        assert ids(place, part, small) < ids(place, part, large)
    assert ids(place, "train", Shares(0.1)) == ids(place, "train", small) | ids(place, "test", small)


@pytest.mark.parametrize(
    ("part", "valid", "test", "said"),
    [
        ("test", 0.05, 0.0, "--part test holds nothing"),
        ("valid", 0.0, 0.1, "--part valid holds nothing"),
        ("train", 0.6, 0.5, "are more than the list"),
    ],
)
def test_a_part_that_can_have_nothing_is_refused(part: str, valid: float, test: float, said: str) -> None:
    with pytest.raises(DataError, match=said):
        part_of(CORPORA["manifest"], part, Shares(valid, test))


def test_a_part_that_has_nothing_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["shards", "build", "manifest", "--source", str(listed(tmp_path, 3)), "--out", str(tmp_path / "out")]
    more = ["--task", "sqa", "--part", "test", "--test-share", "0.0001"]
    assert cli.main([*words, *more]) == DataError.exit_code
    assert "none of the 3 utterances is in part test" in capsys.readouterr().err
