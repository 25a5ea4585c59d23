"""Ranks killed at random moments: the run ends in the weights and the samples of one that nobody killed."""

from __future__ import annotations

from pathlib import Path

import pytest
from chaos import torment


@pytest.mark.parametrize("kills", [5, pytest.param(50, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
def test_killed_again_and_again_it_trains_the_same(tmp_path: Path, kills: int) -> None:
    verdict = torment(tmp_path, kills=kills, steps=12 * kills, seed=17)
    assert verdict.kills == kills and verdict.resumed > kills / 2
    assert verdict.good, str(verdict)
