"""What a list lacks is made once, marked with what made it, and kept: transcripts, and speech."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import pytest

from echox.cli import main
from echox.config.paths import cache_dir
from shards.builder.corpus_build import Settings, build_corpus
from shards.builder.missing import Maker, Missing
from shards.corpora.registry import CORPORA
from shards.corpus import Request
from tests.shards.layouts import RATE, clip, encoded, ledger, pitch, put, put_lines, read

VOICE = cache_dir() / "models" / "rhasspy" / "en_US-joe-medium" / "en_US-joe-medium.onnx"
LISTENER = "Xenova/whisper-small"


class Listener:
    """Hears the pitch of a tone."""

    def __init__(self) -> None:
        self.heard: list[int] = []

    def transcribe(self, audio: Sequence[Any]) -> list[str]:
        self.heard += [len(sound) for sound in audio]
        return [f"{pitch(sound):.0f} hertz" for sound in audio]


class Voice:
    """Says each text as a tone that is the longer, the longer the text is."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def speak(self, text: str) -> np.ndarray:
        self.said.append(text)
        return clip(4, 0.1 * len(text)).astype(np.float32) / 32768


def made(
    folder: Path, rows: Sequence[Any], *, name: str = "out", listener: Any = None, voice: Any = None, **more: Any
) -> Any:
    """Build with what makes the missing; samples by id and the ledger."""
    missing = Missing(
        folder / "made",
        None if listener is None else Maker("ears", more.pop("ears", "1"), lambda: listener),
        None if voice is None else Maker("mouth", more.pop("mouth", "1"), lambda: voice),
    )
    corpus = missing.completes(CORPORA["manifest"])
    source = put_lines(folder / f"{name}.jsonl", rows)
    build_corpus(corpus, source, folder / name, Request(**{"task": "", **more}), Settings(max_rejected=1.0))
    return read(folder / name), ledger(folder / name)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(3):
        put(tmp_path / f"{number}.wav", encoded(clip(number)))
    put(tmp_path / "long.wav", encoded(np.concatenate([clip(1), clip(9)])))
    put(tmp_path / "broken.wav", b"RIFF....WAVE")
    return tmp_path


def test_recordings_without_text_are_written_down_once_and_marked(folder: Path) -> None:
    listener = Listener()
    rows = [
        {"audio": "0.wav"},
        {"audio": "1.wav", "text": "given"},
        {"audio": "2.wav", "answer_text": "Yes."},
        {"audio": "long.wav", "offset": 0.3, "duration": 0.3},
        {"audio": "broken.wav"},
    ]
    samples, rejected = made(folder, rows, listener=listener)
    texts = {name: sample["json"]["question_text"] for name, sample in samples.items()}
    assert texts == {"0": "200 hertz", "1": "given", "2": "240 hertz", "long-0.3": "380 hertz"}
    assert samples["0"]["json"]["question_text_by"] == "ears" and "question_text_by" not in samples["1"]["json"]
    assert samples["2"]["json"]["task"] == "sqa" and list(rejected) == ["broken"]
    assert len(listener.heard) == 3, "what is broken or has its text is not listened to, and nothing twice"
    again = Listener()
    assert made(folder, rows, name="again", listener=again)[0].keys() == samples.keys() and again.heard == []
    put(folder / "0.wav", encoded(clip(7)))
    changed, _ = made(folder, rows, name="changed", listener=again)
    assert changed["0"]["json"]["question_text"] == "340 hertz" and len(again.heard) == 1
    made(folder, rows, name="other", listener=again, ears="2")
    assert len(again.heard) == 4, "another model is asked anew"


def test_texts_without_sound_are_spoken_once_and_marked(folder: Path) -> None:
    voice = Voice()
    rows = [
        {"text": "who are you", "answer_text": "Me."},
        {"answer_text": "a thing to learn", "id": "learn"},
        {"audio": "1.wav", "text": "who are you", "answer_text": "It."},
        {"text": "who are you", "answer_text": "Again.", "id": "again"},
    ]
    samples, rejected = made(folder, rows, voice=voice)
    assert not rejected and voice.said == ["who are you", "a thing to learn"]
    spoken = next(sample for name, sample in samples.items() if name.startswith("text-"))
    assert spoken["json"]["question_s"] == 1.1 and spoken["json"]["question_spoken_by"] == "mouth"
    assert samples["learn"]["json"]["task"] == "tts" and samples["learn"]["json"]["answer_spoken_by"] == "mouth"
    assert len(samples["learn"]["answer.flac"]) == 1.6 * RATE
    assert "question_spoken_by" not in samples["1"]["json"]
    made(folder, rows, name="more", voice=voice, mouth="2")
    assert len(voice.said) == 4, "another voice speaks anew"


def test_a_build_that_was_killed_goes_on_with_what_was_made(folder: Path) -> None:
    class Dies(Listener):
        def transcribe(self, audio: Sequence[Any]) -> list[str]:
            if self.heard:
                raise RuntimeError("no more")
            return super().transcribe(audio)

    rows = [{"audio": "0.wav", "offset": number / 1000, "id": str(number)} for number in range(100)]
    first, second = Dies(), Listener()
    with pytest.raises(RuntimeError):
        made(folder, rows, listener=first)
    journal = folder / "made" / "transcripts.jsonl"
    journal.write_text(journal.read_text() + '["cut sho')
    samples, _ = made(folder, rows, listener=second)
    assert len(first.heard) == 64 and len(second.heard) == 36 and len(samples) == 100


@pytest.mark.skipif(
    not (VOICE.is_file() and (cache_dir() / "models" / LISTENER / "SHA256SUMS").is_file()),
    reason="the demo's models have not been fetched",
)
def test_piper_speaks_and_whisper_writes_it_down_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = ["What is the capital of France?", "How many people live in the city of Berlin?"]
    source = put_lines(tmp_path / "texts.jsonl", [{"text": text, "answer_text": "Well."} for text in said])
    words = ("shards", "build", "manifest", "--workers", "1")
    assert main([*words, "--source", str(source), "--out", str(tmp_path / "a"), "--speak", str(VOICE)]) == 0
    spoken = read(tmp_path / "a")
    assert {sample["json"]["question_spoken_by"] for sample in spoken.values()} == {"en_US-joe-medium"}
    for number, sample in enumerate(spoken.values()):
        put(tmp_path / f"{number}.wav", encoded(sample["question.flac"]))
    heard = put_lines(tmp_path / "heard.jsonl", [{"audio": f"{number}.wav"} for number in range(len(said))])
    listen = ("--transcribe", LISTENER, "--language", "en")
    assert main([*words, "--source", str(heard), "--out", str(tmp_path / "b"), *listen]) == 0
    texts = [sample["json"]["question_text"] for sample in read(tmp_path / "b").values()]
    plain = jiwer.Compose(
        [jiwer.ToLowerCase(), jiwer.RemovePunctuation(), jiwer.Strip(), jiwer.ReduceToListOfListOfWords()]
    )
    assert jiwer.wer(said, texts, reference_transform=plain, hypothesis_transform=plain) < 0.2, texts


def test_a_voice_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = put_lines(tmp_path / "texts.jsonl", [{"text": "hello"}])
    words = ("shards", "build", "manifest", "--source", str(source), "--out", str(tmp_path / "a"))
    assert main([*words, "--speak", str(tmp_path / "no.onnx")]) != 0
    assert "there is no Piper voice" in capsys.readouterr().err
    assert main([*words, "--transcribe", "no/such-whisper"]) != 0
    assert "no/such-whisper" in capsys.readouterr().err
    assert json.loads(source.read_text()) == {"text": "hello"}
