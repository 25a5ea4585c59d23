"""`python -m echox.speak.fit_vocoder`: a vocoder of shards that kept their audio, or a sentence and an exit code."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from echox.audio.io import encode_flac
from echox.speak.fit_vocoder import main
from echox.speak.vocoder import load_vocoder
from echox.stream.format.writer import write_shards
from echox.units.identity import UnitSetIdentity, read_unit_set, write_unit_set

UNITS = UnitSetIdentity(features="log_mel", clusters=5, centroids="aa")


def write(folder: Path, without: str = "") -> Path:
    rows = []
    for number in range(4):
        units = np.arange(5, dtype="<u2")[: number + 2]
        row = {
            "__key__": f"s{number}",
            "json": {"id": f"s{number}", "task": "tts", "answer_text": "да", "answer_s": 0.04 * len(units)},
            "answer.units": units.tobytes(),
            "answer.durations": np.full(len(units), 2, "<u2").tobytes(),
            "answer.flac": encode_flac(np.random.default_rng(number).normal(0, 0.1, 640 * len(units)).astype("f4")),
        }
        row.pop(without, None)
        rows.append(row)
    write_shards(folder, rows)
    write_unit_set(folder, UNITS)
    return folder


def test_it_speaks_the_units_of_the_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place, out = write(tmp_path / "data"), tmp_path / "vocoder"
    assert main([str(place), str(out), "--steps", "2"]) == 0
    assert capsys.readouterr().out == f"{out}\n" and read_unit_set(out) == UNITS
    (wave,) = load_vocoder(out)([np.arange(5, dtype=np.uint16)])
    assert len(wave) >= 5 * 320 and bool(np.isfinite(wave).all())


@pytest.mark.parametrize(
    ("without", "said"),
    [("answer.flac", "answer.flac"), ("answer.durations", "answer.durations"), ("all", "not found")],
)
def test_shards_that_will_not_do_are_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], without: str, said: str
) -> None:
    place = tmp_path / "data" if without == "all" else write(tmp_path / "data", without)
    assert main([str(place), str(tmp_path / "vocoder"), "--steps", "1"]) == 4
    shown = capsys.readouterr().err
    assert shown.startswith("echox: ") and said in shown and not (tmp_path / "vocoder").exists()
