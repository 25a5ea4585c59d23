"""Scoring the arms' runs: every item is kept, and a run is judged once unless something it depends on is newer."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from echox.audio.io import encode_flac
from echox.errors import DataError
from echox.speak.pipeline import SpokenAnswer
from echox.stream.format.writer import write_shards
from echox.units.identity import UnitPart, UnitSetIdentity, write_unit_set
from launch.ablation import scoring
from launch.ablation.scoring import SCORES, Examiner

UNITS = UnitSetIdentity(features="log_mel", clusters=4, centroids="aa")
ANSWERS = ["Ghana is in Africa.", "Peru is in South America.", "Mali is in Africa."]
GOLDS = ["Africa", "South America", "Africa"]
NAME = "sqa-heldout-phrasing"


class Stand:
    """Model, vocoder and judge: a unit is the number of an answer, 10 more from the teacher."""

    sample_rate = 16000
    units = UnitPart("run echo-s17", UNITS)
    recipe = SimpleNamespace(language="en")
    heard = {0: "Ghana is in Asia", 1: ANSWERS[1], 2: ANSWERS[2], 10: ANSWERS[0], 11: ANSWERS[1], 12: "no"}

    def __init__(self) -> None:
        self.loaded: list[str] = []
        self.judged = 0

    def load(self, folder: Path) -> Stand:
        self.loaded.append(Path(folder).name)
        return self

    def answer(self, clips: list[Any], turns: Any = None, cascade: bool = False) -> list[SpokenAnswer]:
        numbers = [len(clip) // 1600 - 1 for clip in clips]
        return [SpokenAnswer(ANSWERS[n], np.array([n], "<u2"), np.array([10 + n], "<u2")) for n in numbers]

    def __call__(self, units: Any, durations: Any = None) -> list[Any]:
        return [np.full(160, (int(each[0]) + 1) / 100, np.float32) for each in units]

    def transcribe(self, audio: list[Any]) -> list[str]:
        self.judged += len(audio)
        return [self.heard[round(float(wave[0]) * 100) - 1] for wave in audio]


@pytest.fixture
def stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stand:
    made, root = Stand(), tmp_path / "data" / "small"

    def rows() -> Any:
        for n, (answer, gold) in enumerate(zip(ANSWERS, GOLDS, strict=True)):
            meta = {"id": f"q{2 - n}", "question_text": f"Where is {n}?", "answer_text": answer, "answers": [gold]}
            meta |= {"entity": answer.split()[0], "relation": "continent", "question_s": 0.1 * (n + 1), "task": "sqa"}
            yield {
                "__key__": f"s{n}",
                "question.flac": encode_flac(np.full(1600 * (n + 1), 0.1, np.float32)),
                "json": meta,
            }

    write_shards(root / NAME, rows(), per_shard=2)
    (root / "vocoder").mkdir()
    (root / "vocoder" / "weights").write_text("w")
    write_unit_set(root / "vocoder", UNITS)
    monkeypatch.setenv("ECHOX_CACHE", str(tmp_path))
    monkeypatch.setattr("echox.evaluate.asr.Judge", SimpleNamespace(load=lambda folder: made))
    monkeypatch.setattr("echox.speak.vocoder.load_vocoder", lambda folder: made)
    monkeypatch.setattr("echox.speak.pipeline.SpeechToSpeech", made)
    monkeypatch.setattr(scoring, "resolve_model", lambda ref: tmp_path)
    for path in root.rglob("*"):
        os.utime(path, (time.time() - 100,) * 2)
    return made


def run(folder: Path, name: str) -> Path:
    manifest = folder / name / "checkpoints" / "step-00000002" / "manifest.json"
    manifest.parent.mkdir(parents=True)
    manifest.write_text("{}")
    os.utime(manifest, (time.time() - 50,) * 2)
    return folder / name


def test_every_item_is_kept_with_its_outcomes(stand: Stand, tmp_path: Path) -> None:
    seen: list[str] = []
    found = Examiner("small", None, lambda what, done, total: seen.append(what)).scores(run(tmp_path, "echo-s17"))
    assert list(found) == [NAME]
    row = found[NAME]
    assert (row["n"], row["s2t_strict_acc"], row["s2s_strict_acc"], row["cascade_acc"]) == (3, 1.0, 2 / 3, 2 / 3)
    assert "phrasings" in row["about"] and row["role"] in ("test", "validation")
    assert [item["id"] for item in row["items"]] == ["q0", "q1", "q2"]
    assert row["items"][2] == {
        **{"id": "q2", "text": ANSWERS[0], "heard": "Ghana is in Asia", "cascade_heard": ANSWERS[0]},
        **{"text_right_strict": True, "speech_right_strict": False, "cascade_right_strict": True},
    }
    assert json.loads((tmp_path / "echo-s17" / SCORES).read_text()) == {"limit": None, "sets": found}
    assert set(seen) == {f"echo-s17 {NAME} answered", f"echo-s17 {NAME} heard"}


def test_a_run_is_scored_again_where_what_it_is_scored_by_has_changed(stand: Stand, tmp_path: Path) -> None:
    folder, corpus = run(tmp_path, "echo-s17"), tmp_path / "data" / "small"

    def scored(limit: int | None = None) -> int:
        stand.loaded.clear()
        Examiner("small", limit, lambda what, done, total: None).scores(folder)
        return len(stand.loaded)

    assert scored() == 1
    assert scored() == 0
    assert scored(limit=1) == 1 and scored(limit=1) == 0 and scored() == 1
    for newer in (
        folder / "checkpoints" / "step-00000002" / "manifest.json",
        corpus / NAME / "dataset.json",
        corpus / "vocoder" / "weights",
    ):
        os.utime(newer, (time.time() + 50,) * 2)
        assert scored() == 1, newer
        os.utime(newer, (time.time() - 50,) * 2)
        assert scored() == 0


def test_equal_speech_of_two_runs_is_judged_once(stand: Stand, tmp_path: Path) -> None:
    examiner = Examiner("small", None, lambda what, done, total: None)
    examiner.scores(run(tmp_path, "echo-s17"))
    first = stand.judged
    examiner.scores(run(tmp_path, "reference-s17"))
    assert stand.judged == first > 0 and stand.loaded == ["echo-s17", "reference-s17"]


def test_a_corpus_that_cannot_judge_is_refused_before_anything_is_trained(stand: Stand, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the corpus of scale demo has no held-out questions"):
        Examiner("demo", None, lambda what, done, total: None)
    (tmp_path / "data" / "small" / "vocoder").rename(tmp_path / "data" / "elsewhere")
    with pytest.raises(DataError, match="has no vocoder"):
        Examiner("small", None, lambda what, done, total: None)
