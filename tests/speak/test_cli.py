from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from echox.audio.io import read_audio, write_audio
from echox.cli import main
from echox.units.identity import UnitPart, UnitSetIdentity, write_unit_set

UNITS = UnitSetIdentity(features="log_mel", clusters=4, centroids="aa")


class Model:
    max_audio_s = 2.0
    units = UnitPart("run demo-echo", UNITS)

    def answer(self, clips: list[Any]) -> list[Any]:
        return [SimpleNamespace(text="Paris.", units=np.zeros(3, np.uint16)) for _ in clips]


class Vocoder:
    sample_rate = 8000

    def __call__(self, units: list[Any]) -> list[Any]:
        return [np.full(8000, 0.1, np.float32) for _ in units]


@pytest.mark.parametrize(("seconds", "cut"), [(2, False), (3, True)])
def test_a_question_longer_than_the_model_hears_is_answered_and_said_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], seconds: int, cut: bool
) -> None:
    monkeypatch.setattr("echox.speak.pipeline.SpeechToSpeech.load", lambda trained: Model())
    monkeypatch.setattr("echox.speak.vocoder.load_vocoder", lambda folder: Vocoder())
    question, out = tmp_path / "question.wav", tmp_path / "answer.wav"
    write_audio(question, np.full(16000 * seconds, 0.1, np.float32))
    write_unit_set(tmp_path / "voice", UNITS)
    assert main(["speak", "--question", str(question), "--out", str(out), "--vocoder", str(tmp_path / "voice")]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("Paris.\n")
    assert ("only the first 2 s are heard" in said.err) is cut
    assert len(read_audio(out)) == 16000


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
    monkeypatch.setattr("echox.speak.vocoder.load_vocoder", lambda folder: Vocoder())
    question, voice = tmp_path / "question.wav", tmp_path / "voice"
    write_audio(question, np.full(16000, 0.1, np.float32))
    write_unit_set(voice, units)
    words = ["speak", "--question", str(question), "--out", str(tmp_path / "answer.wav"), "--vocoder", str(voice)]
    assert main(words) == code
    said = capsys.readouterr().err
    assert said.count("\n") == bool(line) and said.startswith(line)
    assert not line or ("run demo-echo" in said and str(voice) in said and str(UNITS) in said)
    assert (tmp_path / "answer.wav").exists() == (code == 0)
