"""An evaluation of the demo's corpus, with stand-ins for model, vocoder and judge: its sets, scores and samples."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile

from echox.audio.io import encode_flac
from echox.evaluate import demo
from echox.evaluate.cli import score_lines
from echox.evaluate.columns import metrics
from echox.evaluate.demo import HeldOutSet, evaluate_demo
from echox.evaluate.quality import Dnsmos, Quality
from echox.speak.events import Audio, TextToken
from echox.speak.pipeline import SpokenAnswer
from echox.stream.format.writer import write_shards
from echox.units.identity import UnitPart, UnitSetIdentity, write_unit_set

UNITS = UnitSetIdentity(features="log_mel", clusters=4, centroids="aa")
ANSWERS = ["Ghana is in Africa.", "Peru is in South America."]
GOLDS = ["Africa", "South America"]


class Stand:
    """Model, vocoder and judge: a unit is the number of an answer, 10 more from the teacher, 20 more in the corpus."""

    sample_rate = 16000
    recipe = SimpleNamespace(language="ru")
    units = UnitPart("run demo-echo", UNITS)
    heard = {0: "Timbabwe is in Africa", 1: ANSWERS[1], 10: ANSWERS[0], 11: ANSWERS[1], 20: ANSWERS[0], 21: "no"}

    def listen(self, folder: Path, language: str) -> Stand:
        assert language == self.recipe.language, "the judge is told the language of the run"
        return self

    def answer(self, clips: list[Any], turns: Any = None, cascade: bool = False) -> list[SpokenAnswer]:
        numbers = [len(clip) // 1600 - 1 for clip in clips]
        return [SpokenAnswer(ANSWERS[n], np.array([n], "<u2"), np.array([10 + n], "<u2")) for n in numbers]

    def stream(self, question: Any, vocoder: Any) -> Any:
        assert vocoder is self
        yield TextToken(1, "Ghana")
        yield Audio(np.zeros(1600, np.float32), 16000)

    def write(self, clips: list[Any], task: str) -> list[str]:
        return [ANSWERS[0] for _ in clips]

    def say(self, texts: list[str]) -> list[Any]:
        return [np.array([10 + ANSWERS.index(text)], "<u2") for text in texts]

    def __call__(self, units: Any, durations: Any = None) -> list[Any]:
        return [np.full(160, (int(each[0]) + 1) / 100, np.float32) for each in units]

    def transcribe(self, audio: list[Any]) -> list[str]:
        return [self.heard[round(float(wave[0]) * 100) - 1] for wave in audio]


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "data" / "demo"

    def rows(task: str) -> Any:
        for n, (answer, gold) in enumerate(zip(ANSWERS, GOLDS, strict=True)):
            country = answer.split()[0]
            meta = {"id": f"{n}", "question_text": f"Where is {country}?", "answer_text": answer, "task": task}
            clip = encode_flac(np.full(1600 * (n + 1), (n + 1) / 100, np.float32))
            if task == "tts":
                units = np.array([20 + n], "<u2").tobytes()
                yield {"__key__": f"s{n}", "answer.flac": clip, "answer.units": units, "json": meta}
            else:
                meta |= {"answers": [gold], "entity": country, "relation": "continent", "question_s": 0.1 * (n + 1)}
                yield {"__key__": f"s{n}", "question.flac": clip, "json": meta}

    for name, task in (("sqa-heldout-phrasing", "sqa"), ("sqa-mine", "sqa"), ("asr-heldout-real", "asr")):
        write_shards(root / name, rows(task), per_shard=2)
    write_shards(root / "tts-heldout", rows("tts"), per_shard=2)
    for folder in ("tts-heldout", "vocoder"):
        write_unit_set(root / folder, UNITS)
    (root / "corpus.json").write_text('{"text_llm_acc": {"sqa-heldout-phrasing": 0.75}}')
    stand = Stand()
    monkeypatch.setenv("ECHOX_CACHE", str(tmp_path))
    monkeypatch.setattr("echox.evaluate.asr.Judge", SimpleNamespace(load=stand.listen))
    monkeypatch.setattr("echox.speak.vocoder.load_vocoder", lambda folder, speaker=None: stand)
    monkeypatch.setattr("echox.speak.pipeline.SpeechToSpeech", SimpleNamespace(load=lambda folder: stand))
    monkeypatch.setattr(demo, "resolve_model", lambda ref: tmp_path)
    return root


def test_every_set_on_disk_is_scored_with_its_ceilings(corpus: Path, tmp_path: Path) -> None:
    seen: list[str] = []
    found = evaluate_demo(tmp_path / "run", progress=lambda phase, done, total: seen.append(phase))
    scores = found.to_json()
    assert list(scores["sets"]) == ["sqa-heldout-phrasing", "asr-heldout-real"], "what is absent is left out"
    row = scores["sets"]["sqa-heldout-phrasing"]
    assert row["role"] == "test" and "phrasings" in row["about"] and "name" not in row
    assert (row["n"], row["text_llm_acc"], row["s2t_acc"], row["s2s_acc"]) == (2, 0.75, 1.0, 1.0)
    assert (row["s2t_strict_acc"], row["s2s_strict_acc"], row["cascade_acc"]) == (1.0, 0.5, 1.0)
    assert (row["copy_acc"], row["copy_n"]) == (0.5, 2), "units of the references come from the spoken sets"
    assert (row["retention_paired"], row["retention_cascade"], row["exact"]) == (0.5, 0.5, 0.5)
    assert list(row["relations"]) == ["continent"] and row["strict_rule"] == "entity and answer"
    assert scores["sets"]["asr-heldout-real"]["s2s_strict_acc"] is None
    assert scores["resynthesis_wer"] == pytest.approx(5 / 9)
    assert scores["streaming"]["n"] == 2 and scores["streaming"]["real_time_factor"] > 0
    assert (scores["t2c_heldout_wer"], scores["t2c_heldout_exact"], scores["t2c_heldout_n"]) == (0.0, 1.0, 2)
    assert {"sqa-heldout-phrasing answered", "sqa-heldout-phrasing heard", "asr-heldout-real", "tts-heldout"} == set(
        seen
    )

    samples = found.samples()
    assert [sample["set"] for sample in samples] == ["sqa-heldout-phrasing"] * 2 + ["asr-heldout-real"] * 2
    first = samples[0]
    assert (first["ok"], first["judged_text"], first["cascade_text"]) == (False, "Timbabwe is in Africa", ANSWERS[0])
    assert first["copy_text"] == ANSWERS[0]
    for name, level in (("question_wav", 1), ("answer_wav", 1), ("cascade_wav", 11), ("reference_wav", 21)):
        wave, rate = soundfile.read(io.BytesIO(first[name]))
        assert rate == 16000 and wave[0] == pytest.approx(level / 100, abs=1e-4)
    assert samples[2]["answer_wav"] is None and [sample["ok"] for sample in samples[1:]] == [True, True, False]


def test_how_it_sounds_is_rated_and_the_command_is_kept(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Rater:
        def rate(self, clips: list[Any], progress: Any = None) -> list[Quality]:
            return [Quality(100 * float(clip[0]), 2.0, 3.0, 4.0) for clip in clips]

    monkeypatch.setattr(Dnsmos, "find", Rater)
    scores = evaluate_demo(tmp_path / "my run", limit=2, rated=1).to_json()
    quality = scores["sets"]["sqa-heldout-phrasing"]["quality"]
    # The wave of a unit has the unit's number, and one more, as its level: 0, 10 and 20 of the first question.
    assert {voice: (row["n"], round(row["ovrl"])) for voice, row in quality.items()} == {
        "echo": (1, 1), "cascade": (1, 11), "copy": (1, 21)
    }  # fmt: skip
    assert not scores["sets"]["asr-heldout-real"]["quality"]
    assert scores["command"] == f"echox evaluate '{tmp_path / 'my run'}' --limit 2 --rated 1"
    assert (scores["judge"], scores["corpus"]) == (demo.JUDGE, "demo")
    assert any(line.split()[:4] == ["DNSMOS", "1.00", "of", "1"] for line in score_lines(scores))
    assert metrics(scores["sets"]["sqa-heldout-phrasing"])["dnsmos_ovrl"] == pytest.approx(1, abs=0.01)
    monkeypatch.setattr(Dnsmos, "find", lambda: pytest.fail("nothing is to be rated"))
    assert evaluate_demo(tmp_path / "run", rated=0).to_json()["sets"]["sqa-heldout-phrasing"]["quality"] == {}


def test_answers_are_spoken_by_the_speaker_that_is_named(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from echox.speak.vocoder import load_vocoder

    asked: list[Any] = []
    stand = load_vocoder(corpus / "vocoder")
    monkeypatch.setattr("echox.speak.vocoder.load_vocoder", lambda *given: asked.append(given) or stand)
    scores = evaluate_demo(tmp_path / "run", speaker="bo", limit=1, rated=0).to_json()
    assert asked == [(corpus / "vocoder", "bo")]
    assert scores["command"] == f"echox evaluate {tmp_path / 'run'} --speaker bo --limit 1 --rated 0"


def test_which_sets_are_asked_and_what_they_are_for_is_said_by_the_caller(corpus: Path, tmp_path: Path) -> None:
    mine = HeldOutSet("sqa-mine", "test", "my questions")
    found = evaluate_demo(tmp_path / "run", questions=[mine, HeldOutSet("sqa-none", "test", "")], limit=1)
    row = found.to_json()["sets"]["sqa-mine"]
    assert (row["role"], row["about"], row["n"], row["text_llm_acc"]) == ("test", "my questions", 1, None)
    lines = "\n".join(score_lines(found.to_json()))
    assert lines.split()[:2] == ["sqa-mine", "asr-heldout-real"] and "0.0 % [0–79]" in lines
    assert "cascade     100.0 %       –                 Strict, when the frozen T2C teacher" in lines
    assert "the teacher's WER 0.0 %" in lines and "streamed: answers 1, first token, median " in lines
