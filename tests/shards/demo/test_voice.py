from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

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
