from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from echox.audio.io import header_rate, read_audio, write_audio
from echox.cli import main
from echox.speak.events import Failed
from echox.units.identity import UnitPart, UnitSetIdentity, write_unit_set

UNITS = UnitSetIdentity(features="log_mel", clusters=4, centroids="aa")


class Model:
    max_audio_s = 2.0
    units = UnitPart("run demo-echo", UNITS)

    reads_history = True
    asked: list[Any] | None = None
    failed: tuple[Failed, ...] = ()

    def answer(self, clips: list[Any], turns: Any = None) -> list[Any]:
        self.asked = turns
        return [SimpleNamespace(text="Paris.", units=np.zeros(3, np.uint16), failed=self.failed) for _ in clips]


class Vocoder:
    sample_rate = 8000

    def __call__(self, units: list[Any]) -> list[Any]:
        return [np.full(8000, 0.1, np.float32) for _ in units]


@pytest.mark.parametrize(("seconds", "cut"), [(2, False), (3, True)])
def test_a_question_longer_than_the_model_hears_is_answered_and_said_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], seconds: int, cut: bool
) -> None:
    monkeypatch.setattr("echox.speak.pipeline.SpeechToSpeech.load", lambda trained: Model())
    monkeypatch.setattr("echox.speak.vocoder.load_vocoder", lambda folder, speaker=None: Vocoder())
    question, out = tmp_path / "question.wav", tmp_path / "answer.wav"
    write_audio(question, np.full(16000 * seconds, 0.1, np.float32))
    write_unit_set(tmp_path / "voice", UNITS)
    assert main(["speak", "--question", str(question), "--out", str(out), "--vocoder", str(tmp_path / "voice")]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("Paris.\n")
    assert ("only the first 2 s are heard" in said.err) is cut
    assert len(read_audio(out)) == 16000 and header_rate(out.read_bytes()) == 8000, "at the rate of the vocoder"


@pytest.mark.parametrize(
    ("units", "code", "line"),
    [
        (UnitSetIdentity(features="log_mel", clusters=4, centroids="bb"), 4, "echox: the vocoder "),
        (None, 0, "warning: no unit_set.json or other record says which units the vocoder "),
        (UNITS, 0, ""),
    ],
)
def test_a_vocoder_of_other_units_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    units: UnitSetIdentity | None,
    code: int,
    line: str,
) -> None:
    monkeypatch.setattr("echox.speak.pipeline.SpeechToSpeech.load", lambda trained: Model())
    monkeypatch.setattr("echox.speak.vocoder.load_vocoder", lambda folder, speaker=None: Vocoder())
    question, voice = tmp_path / "question.wav", tmp_path / "voice"
    write_audio(question, np.full(16000, 0.1, np.float32))
    write_unit_set(voice, units)
    words = ["speak", "--question", str(question), "--out", str(tmp_path / "answer.wav"), "--vocoder", str(voice)]
    assert main(words) == code
    said = capsys.readouterr().err
    assert said.count("\n") == bool(line) and said.startswith(line)
    assert not line or ("run demo-echo" in said and str(voice) in said and str(UNITS) in said)
    assert (tmp_path / "answer.wav").exists() == (code == 0)


def ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Model, *words: str) -> int:
    monkeypatch.setattr("echox.speak.pipeline.SpeechToSpeech.load", lambda trained: model)
    monkeypatch.setattr("echox.speak.vocoder.load_vocoder", lambda folder, speaker=None: Vocoder())
    question = tmp_path / "question.wav"
    write_audio(question, np.full(16000, 0.1, np.float32))
    write_unit_set(tmp_path / "voice", UNITS)
    out = str(tmp_path / "answer.wav")
    return main(["speak", "--question", str(question), "--out", out, "--vocoder", str(tmp_path / "voice"), *words])


def test_the_speaker_is_that_of_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("echox.speak.pipeline.SpeechToSpeech.load", lambda trained: Model())
    monkeypatch.setattr("echox.speak.vocoder.load_vocoder", lambda *given: asked.append(given) or Vocoder())
    write_audio(tmp_path / "question.wav", np.full(16000, 0.1, np.float32))
    write_unit_set(tmp_path / "voice", UNITS)
    where = ["--question", str(tmp_path / "question.wav"), "--out", str(tmp_path / "answer.wav")]
    words = ["speak", *where, "--vocoder", str(tmp_path / "voice")]
    assert main(words) == 0 and main([*words, "--speaker", "bo"]) == 0
    assert asked == [(tmp_path / "voice", None), (tmp_path / "voice", "bo")]


def test_what_was_said_before_comes_from_a_file_and_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_audio(tmp_path / "lima.wav", np.full(800, 0.1, np.float32))
    turns = [{"role": "user", "text": "Lima?", "audio": "lima.wav"}, {"role": "assistant", "text": "Peru."}]
    (tmp_path / "said.json").write_text(json.dumps(turns))
    model = Model()
    words = ("--history", str(tmp_path / "said.json"), "--turn", "user: Oslo: where?", "--turn", "assistant:Norway.")
    assert ask(tmp_path, monkeypatch, model, *words) == 0
    assert model.asked is not None
    (asked,) = model.asked
    assert [(turn.role, turn.text) for turn in asked] == [
        ("user", "Lima?"), ("assistant", "Peru."), ("user", "Oslo: where?"), ("assistant", "Norway.")]  # fmt: skip
    assert len(asked[0].clip) == 800 and asked[1].clip is None
    assert ask(tmp_path, monkeypatch, model) == 0 and model.asked is None


def test_a_segment_that_failed_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Model()
    model.failed = (Failed(1, "it has no end within 40 words"),)
    assert ask(tmp_path, monkeypatch, model) == 0
    said = capsys.readouterr()
    assert said.err == "segment 2 of the answer failed: it has no end within 40 words\n" and "Paris." in said.out


def test_a_run_that_reads_no_dialogue_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Model()
    model.reads_history = False
    assert ask(tmp_path, monkeypatch, model, "--turn", "user:Lima?") == 0
    assert "reads no dialogue (data.history_tokens=0); the turns are left out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read: No such file or directory"),
        ("{", "cannot be read: Expecting property name"),
        ('{"role": "user"}', "cannot be read: turns is a dict, not a list"),
        ('[{"role": "user", "text": "x", "audio": "none.wav"}]', "none.wav"),
    ],
)
def test_a_file_that_holds_no_dialogue_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str | None, message: str
) -> None:
    if text is not None:
        (tmp_path / "said.json").write_text(text)
    assert ask(tmp_path, monkeypatch, Model(), "--history", str(tmp_path / "said.json")) == 4
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and message in said
    assert ask(tmp_path, monkeypatch, Model(), "--turn", "Where is Lima?") == 4
    assert "--turn Where is Lima?: role is 'Where is Lima?', not system, user or assistant" in capsys.readouterr().err
