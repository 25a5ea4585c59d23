"""An evaluation on sets of one's own, with stand-ins for model, vocoder and judge: scores, samples, what is refused."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from echox import cli
from echox.audio.io import encode_flac
from echox.errors import DataError
from echox.evaluate.own import OwnSets, evaluate_own
from echox.evaluate.report import write_report
from echox.evaluate.store import load_evaluation
from echox.speak.events import Audio, TextToken
from echox.speak.pipeline import SpokenAnswer
from echox.stream.format.writer import write_shards
from echox.units.identity import UnitPart, UnitSetIdentity, write_unit_set

UNITS = UnitSetIdentity(features="log_mel", clusters=4, centroids="aa")
ANSWERS = ["Ghana is in Africa.", "Peru is in South America."]


class Stand:
    """Model, vocoder and judge: a unit is the number of an answer, 10 more from the teacher, 20 more in the voice."""

    sample_rate = 16000
    units = UnitPart("run mine-echo", UNITS)
    recipe = SimpleNamespace(language="de")
    heard = {0: "Timbabwe is in Africa", 1: ANSWERS[1], 10: ANSWERS[0], 11: ANSWERS[1], 20: ANSWERS[0], 21: "no"}
    languages: list[str | None] = []

    def answer(self, clips: list[Any], turns: Any = None, cascade: bool = False) -> list[SpokenAnswer]:
        numbers = [len(clip) // 1600 - 1 for clip in clips]
        return [SpokenAnswer(ANSWERS[n], np.array([n], "<u2"), np.array([10 + n], "<u2")) for n in numbers]

    def stream(self, question: Any, vocoder: Any) -> Any:
        yield TextToken(1, "Ghana")
        yield Audio(np.zeros(1600, np.float32), 16000)

    def say(self, texts: list[str]) -> list[Any]:
        return [np.array([10 + ANSWERS.index(text)], "<u2") for text in texts]

    def __call__(self, units: Any, durations: Any = None) -> list[Any]:
        return [np.full(160, (int(each[0]) + 1) / 100, np.float32) for each in units]

    def transcribe(self, audio: list[Any]) -> list[str]:
        return [self.heard[round(float(wave[0]) * 100) - 1] for wave in audio]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`questions-test`, `voice-test`, a vocoder and a run."""

    def rows(task: str) -> Any:
        for n, answer in enumerate(ANSWERS):
            meta = {"id": f"{n}", "question_text": f"Question {n}?", "answer_text": answer, "task": task}
            clip = encode_flac(np.full(1600 * (n + 1), (n + 1) / 100, np.float32))
            if task == "tts":
                units = np.array([20 + n], "<u2").tobytes()
                yield {"__key__": f"s{n}", "answer.flac": clip, "answer.units": units, "json": meta}
            else:
                yield {"__key__": f"s{n}", "question.flac": clip, "json": meta}

    for name, task in (("questions-test", "sqa"), ("more", "sqa"), ("other/more", "sqa"), ("voice-test", "tts")):
        write_shards(tmp_path / name, rows(task), per_shard=2)
    for folder in ("voice-test", "vocoder"):
        write_unit_set(tmp_path / folder, UNITS)
    (tmp_path / "runs" / "mine-echo").mkdir(parents=True)
    stand = Stand()
    stand.languages.clear()

    def opened(language: str | None) -> Stand:
        stand.languages.append(language)
        return stand

    judge = SimpleNamespace(find=lambda name: SimpleNamespace(name=name, open=opened))
    monkeypatch.setattr("echox.evaluate.own.NamedJudge", judge)
    monkeypatch.setattr("echox.speak.vocoder.load_vocoder", lambda folder, speaker=None: stand)
    monkeypatch.setattr("echox.speak.pipeline.SpeechToSpeech", SimpleNamespace(load=lambda folder: stand))
    return tmp_path


def sets(place: Path, **more: Any) -> OwnSets:
    given = {"questions": (place / "questions-test",), "sentences": place / "voice-test", "rated": 0, **more}
    return OwnSets(run=place / "runs" / "mine-echo", vocoder=place / "vocoder", **given)


def test_own_questions_are_scored_beside_the_cascade_and_the_ceilings_of_the_voice(place: Path) -> None:
    seen: list[str] = []
    found = evaluate_own(sets(place), lambda phase, done, total: seen.append(phase))
    scores = found.to_json()
    row = scores["sets"]["questions-test"]
    assert (row["n"], row["role"], row["strict_rule"]) == (2, "test", "answer alone")
    assert (row["s2t_acc"], row["s2s_acc"], row["cascade_acc"], row["copy_acc"]) == (1.0, 0.5, 1.0, None)
    assert row["wer"] == pytest.approx(1 / 9)
    assert (scores["resynthesis_wer"], scores["t2c_heldout_wer"], scores["t2c_heldout_n"]) == (5 / 9, 0.0, 2)
    assert scores["streaming"]["n"] == 2 and scores["corpus"] == ""
    assert Stand.languages == ["de"] == [scores["language"]], "the judge is told what the recipe says"
    assert {"questions-test answered", "questions-test heard", "voice-test"} == set(seen)
    assert [each["set"] for each in found.samples()] == ["questions-test"] * 2
    assert [each["ok"] for each in found.samples()] == [False, True]
    page = write_report(place / "report.html", scores, {}, found.samples()).read_text()
    assert page.count("<audio") == 6 and "questions that neither training nor validation has" in page


def test_the_command_beside_the_scores_gives_the_same_scores(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = place / "runs" / "mine-echo"
    words = ["evaluate", str(run), "--questions", f"{place / 'questions-test'},{place / 'more'}"]
    words += ["--sentences", str(place / "voice-test"), "--vocoder", str(place / "vocoder"), "--judge", "some/whisper"]
    assert cli.main([*words, "--limit", "1", "--rated", "0", "--json"]) == 0
    scores, samples = load_evaluation(place / "runs" / "evaluation")
    assert json.loads(capsys.readouterr().out) == scores
    assert list(scores["sets"]) == ["questions-test", "more"] and scores["judge"] == "some/whisper"
    assert [row["n"] for row in scores["sets"].values()] == [1, 1] and len(samples) == 2
    assert cli.main(shlex.split(scores["command"])[1:]) == 0
    again, _ = load_evaluation(place / "runs" / "evaluation")
    assert again["sets"] == scores["sets"] and "questions-test" in capsys.readouterr().out


def test_what_cannot_be_scored_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match="two sets of questions have one name"):
        evaluate_own(sets(place, questions=(place / "more", place / "other" / "more")))
    write_unit_set(place / "vocoder", UnitSetIdentity(features="log_mel", clusters=4, centroids="bb"))
    with pytest.raises(DataError):
        evaluate_own(sets(place))
    run = str(place / "runs" / "mine-echo")
    for words, said in (
        (["--questions", "x"], "--questions alone has no ceilings"),
        (["--questions", "x", "--shard", "0/2"], "--shard needs --benchmark"),
        (["--questions", "x", "--benchmark", "trivia-qa"], "--benchmark is an evaluation of its own"),
    ):
        assert cli.main(["evaluate", run, *words]) == DataError.exit_code
        assert said in capsys.readouterr().err
