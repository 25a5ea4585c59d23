from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from echox.units.identity import RECORD, UnitSetIdentity, read_unit_set, write_unit_set
from shards.demo.voice import VOCODER_STEPS, ensure_vocoder


def test_the_vocoder_is_trained_once_and_again_when_the_corpus_is_newer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listing = tmp_path / "data/demo/tts-train/dataset.json"
    listing.parent.mkdir(parents=True)
    listing.write_text("{}")
    os.utime(listing, (1, 1))
    steps: list[int] = []

    def train(source: Path, folder: Path, **options: Any) -> None:
        assert source == listing.parent
        folder.mkdir(exist_ok=True)
        (folder / "vocoder.json").write_text("{}")
        steps.append(options["steps"])

    monkeypatch.setattr("echox.speak.unit_mel.train_vocoder", train)
    assert ensure_vocoder(tmp_path)
    assert not ensure_vocoder(tmp_path)
    later = (tmp_path / "data/demo/vocoder/vocoder.json").stat().st_mtime + 10
    os.utime(listing, (later, later))
    assert ensure_vocoder(tmp_path, 7)
    assert steps == [VOCODER_STEPS, 7]


def test_a_vocoder_made_before_records_were_gets_one_and_one_of_other_units_is_trained_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoken, vocoder = tmp_path / "data/demo/tts-train", tmp_path / "data/demo/vocoder"
    units = UnitSetIdentity(features="whisper", model="whisper-base", layer=2, clusters=500, centroids="aa")
    other = UnitSetIdentity(features="whisper", model="whisper-base", layer=2, clusters=500, centroids="bb")
    for path in (spoken / "dataset.json", vocoder / "config.json"):
        path.parent.mkdir(parents=True)
        path.write_text("{}")
        os.utime(path, (1, 1))
    os.utime(vocoder / "config.json", (5, 5))
    trained: list[Path] = []

    def train(source: Path, folder: Path, **options: Any) -> None:
        trained.append(source)
        write_unit_set(folder, read_unit_set(source))

    monkeypatch.setattr("echox.speak.unit_mel.train_vocoder", train)
    assert not ensure_vocoder(tmp_path) and not (vocoder / RECORD).exists()
    write_unit_set(spoken, units)
    assert not ensure_vocoder(tmp_path)
    # An evaluation is as old as the newest file of the vocoder allows.
    assert read_unit_set(vocoder) == units and {path.stat().st_mtime for path in vocoder.iterdir()} == {5.0}
    assert not ensure_vocoder(tmp_path)
    write_unit_set(vocoder, other)
    assert ensure_vocoder(tmp_path) and trained == [spoken]
    assert read_unit_set(vocoder) == units
