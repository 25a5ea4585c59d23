"""A T2C run reads held-out sentences: what Stage III's teacher would say, judged in the language of the recipe."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from echox import cli
from echox.audio.io import encode_flac
from echox.errors import CheckpointError, DataError
from echox.evaluate import sentences
from echox.evaluate.judges import NamedJudge
from echox.evaluate.reader import TextReader
from echox.evaluate.resampling import drawn_rates, interval_95
from echox.evaluate.sentences import lines, read_sentences
from echox.evaluate.text import wer
from echox.speak.pipeline import SpeechToSpeech
from echox.stream.format.writer import write_shards
from echox.units.identity import UnitPart
from tests.speak.echo_run import write_echo_run

TEXTS = ["Она завела часы.", "Всё это — правда.", "Он ушёл домой.", "Мама мыла раму."]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`t2c` and the `echo` run that started from it."""
    folder = tmp_path_factory.mktemp("runs")
    write_echo_run(folder)
    return folder


def test_it_says_what_the_teacher_of_an_echo_run_says(runs: Path) -> None:
    """The same weights by another way: segments that are open at the same time, in a stage with a speech side."""
    texts = ["w12 w13 w14", "w20", "w5 w30 w31 w32 w33 w34 w35", ""]
    reader, echo = TextReader.load(runs / "t2c", "cpu"), SpeechToSpeech.load(runs / "echo", "cpu")
    assert reader._words_per_token == 12.0, "the run has recorded none"
    reader._words_per_token = 2.0
    said = reader.say(texts)
    for (units, _), wanted in zip(said, echo.say(texts), strict=True):
        np.testing.assert_array_equal(units, wanted)
    assert [len(units) > 0 for units, _ in said] == [True, True, True, False]
    alone = [reader.say([text])[0] for text in texts[:3]]
    assert all(np.array_equal(one[0], other[0]) and one[1] == other[1] for one, other in zip(said, alone, strict=False))


def test_a_run_of_another_stage_reads_nothing(runs: Path) -> None:
    with pytest.raises(CheckpointError, match="a run of the stage echo reads no texts"):
        TextReader.load(runs / "echo")


class Stand:
    """Reader, vocoder and judge: a unit is the number of a sentence; that of T2C is heard with a word that is wrong."""

    sample_rate = 16_000
    recipe = SimpleNamespace(language="ru")
    units = UnitPart("run t2c", None)

    def say(self, texts: list[str]) -> list[Any]:
        return [(np.array([10 + TEXTS.index(text)], np.uint16), text != TEXTS[3]) for text in texts]

    def __call__(self, units: Any, durations: Any = None) -> list[Any]:
        return [np.full(160, (int(each[0]) + 1) / 100, np.float32) for each in units]

    def transcribe(self, audio: list[Any]) -> list[str]:
        numbers = [round(float(clip[0]) * 100) - 1 for clip in audio]
        return [self._heard(number) for number in numbers]

    @staticmethod
    def _heard(number: int) -> str:
        text = TEXTS[number % 10]
        if number < 10:
            return text.upper().replace("Ё", "Е")
        return f"кот {text.split(maxsplit=1)[1]}"


@pytest.fixture
def stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The dataset."""
    told: list[Any] = []

    def opened(judge: NamedJudge, language: str | None) -> Stand:
        told.append(language)
        assert told == ["ru"], "the judge is told the language of the recipe"
        return Stand()

    monkeypatch.setattr(NamedJudge, "open", opened)
    monkeypatch.setattr(sentences, "resolve_model", lambda ref: tmp_path)
    monkeypatch.setattr(TextReader, "load", lambda run: Stand())
    monkeypatch.setattr("echox.speak.vocoder.load_vocoder", lambda folder, speaker=None: Stand())
    write(tmp_path / "set")
    return tmp_path / "set"


def write(folder: Path, texts: list[str] = TEXTS, without: str = "") -> None:
    def rows() -> Any:
        for number, text in enumerate(texts):
            row = {
                "__key__": f"s{number}",
                "answer.flac": encode_flac(np.full(1600, (number + 1) / 100, np.float32)),
                "answer.units": np.array([number], "<u2").tobytes(),
                "json": {"id": f"s{number}", "task": "tts", "answer_text": text, "answer_s": 0.1},
            }
            row.pop(without, None)
            yield row

    write_shards(folder, rows(), per_shard=3)


def test_four_voices_are_scored_in_the_language_of_the_run(stand: Path, tmp_path: Path) -> None:
    found = read_sentences(tmp_path / "t2c", str(stand), tmp_path / "vocoder", limit=4)
    rates = {voice.name: voice.rate for voice in found.voices}
    shifted = [TEXTS[3], *TEXTS[:3]]
    assert rates == {
        "recording": 0.0,
        "true units": 0.0,
        "T2C": pytest.approx(4 / 12),
        "another sentence": wer(TEXTS, shifted, "ru"),
    }
    assert rates["another sentence"] == 1.0
    assert [voice.exact for voice in found.voices] == [1.0, 1.0, 0.0, 0.0]
    assert (found.rate, found.language, found.unended, found.texts) == ("WER", "ru", 0.25, TEXTS)
    taught = found.voices[2]
    assert taught.heard[0] == "кот завела часы." and taught.interval_95 == [pytest.approx(1 / 3)] * 2


def test_the_interval_is_wider_the_more_the_sentences_differ() -> None:
    texts = ["один два три четыре"] * 20
    half = ["один два три четыре"] * 10 + ["нет"] * 10
    low, high = interval_95(drawn_rates(texts, half, "ru"))
    assert 0.2 < low < 0.4 and 0.6 < high < 0.8
    assert interval_95(drawn_rates(texts, texts, "ru")) == [0.0, 0.0]
    assert interval_95(drawn_rates(["— !"] * 2, ["шум", ""], "ru")) == [0.0, 2.0], "a reference without a word"


def test_the_command_prints_the_table_and_keeps_what_was_heard(
    stand: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "t2c").mkdir()
    words = ["evaluate", str(tmp_path / "t2c"), "--sentences", str(stand), "--vocoder", str(tmp_path / "vocoder")]
    assert cli.main(words) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in shown[1:5]] == ["recording", "true units", "T2C", "another sentence"]
    assert "WER" in shown[0] and "33.3 %" in shown[3] and "language ru; without an end: 25.0 %" in shown[5]
    kept = json.loads((tmp_path / "evaluation" / "sentences.json").read_text(encoding="utf-8"))
    assert kept["n"] == 4 and kept["voices"][2]["heard"][3] == "кот мыла раму."


@pytest.mark.parametrize(
    ("texts", "without", "said"),
    [
        (TEXTS, "answer.flac", "some samples have no answer.flac"),
        (TEXTS, "answer.units", "some samples have no answer.units"),
        (TEXTS[:1], "", "1 sentence is too few"),
    ],
)
def test_a_dataset_that_cannot_be_read_aloud_is_refused(
    stand: Path, tmp_path: Path, texts: list[str], without: str, said: str
) -> None:
    write(tmp_path / "other", texts, without)
    with pytest.raises(DataError, match=said):
        read_sentences(tmp_path / "t2c", str(tmp_path / "other"), tmp_path / "vocoder")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--benchmark", "llama-questions"], "is an evaluation of its own"),
        (["--limit", "1"], "leaves no other sentence"),
        (["--shard", "0/2"], "--shard needs --benchmark"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], said: str
) -> None:
    assert cli.main(["evaluate", str(tmp_path), "--sentences", "x", *more]) == DataError.exit_code
    assert said in capsys.readouterr().err


def test_where_characters_are_compared_the_table_says_so() -> None:
    voice = sentences.Voice("T2C", 0.25, [0.1, 0.4], 0.0, [""])
    assert "CER" in lines(sentences.ReadAloud("zh", "CER", "judge", [""], [voice], 0.0))[0]
