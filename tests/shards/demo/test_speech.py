"""Voice variations against plain arithmetic; the Piper voice itself where it was fetched."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shards.demo.speech import ANSWER_VOICE, TRAIN_RENDERINGS, Rendering, Speaker, Utterance, Voice, vary

FOLDER = Path(os.environ.get("ECHOX_CACHE", "~/.cache/echox")).expanduser() / "models/rhasspy/en_US-joe-medium"


def tone(hertz: float, rate: int = 22_050) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(rate) / rate)).astype(np.float32)


def peak_hertz(samples: np.ndarray) -> float:
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    return float(np.argmax(spectrum)) * 16_000 / len(samples)


@pytest.mark.parametrize("pitch", [0.88, 1.0, 1.12])
def test_pitch_moves_the_frequency_and_the_length(pitch: float) -> None:
    got = vary(tone(400), 22_050, Voice(name="v", pitch=pitch), seed=0)
    assert peak_hertz(got) == pytest.approx(400 * pitch, rel=0.01)
    assert len(got) == pytest.approx(16_000 / pitch, rel=1e-3) and got.dtype == np.float32


def test_tilt_and_gain_change_level_as_their_formulas_say() -> None:
    plain = vary(tone(1000), 22_050, Voice(name="v"), 0)
    quiet = vary(tone(1000), 22_050, Voice(name="v", gain_db=-6), 0)
    dull = vary(tone(1000), 22_050, Voice(name="v", tilt=-0.4), 0)
    assert np.abs(quiet).max() / np.abs(plain).max() == pytest.approx(10 ** (-6 / 20), rel=1e-3)
    response = abs(1 - 0.4 * np.exp(-2j * np.pi * 1000 / 16_000))
    assert dull[1000:-1000].std() / plain[1000:-1000].std() == pytest.approx(response, rel=1e-3)


def test_noise_has_its_level_and_depends_on_the_seed_alone() -> None:
    silence = np.zeros(22_050, np.float32)
    voice = Voice(name="v", noise_db=-40)
    first = vary(silence + 1e-9, 22_050, voice, 3)
    assert first.std() == pytest.approx(0.01, rel=0.05)
    assert np.array_equal(first, vary(silence + 1e-9, 22_050, voice, 3))
    assert not np.array_equal(first, vary(silence + 1e-9, 22_050, voice, 4))


def test_voices_of_an_utterance_share_a_rendering() -> None:
    with pytest.raises(ValueError, match="one rendering"):
        Utterance(text="x", voices=(TRAIN_RENDERINGS[0][0], TRAIN_RENDERINGS[1][0]))


class Mute(Speaker):
    """Without a voice: says what `say` returns."""

    def __init__(self, folder: Path, say: Callable[[str], np.ndarray], threads: int) -> None:
        (folder / "v.onnx").touch()
        voice = {"audio": {"sample_rate": 16_000}, "espeak": {"voice": "en"}, "inference": {}, "num_symbols": 1}
        (folder / "v.onnx.json").write_text(json.dumps({**voice, "num_speakers": 1, "phoneme_id_map": {}}))
        super().__init__(folder, threads)
        self.say = say

    def _session(self, seed: int) -> Any:
        return seed

    def _say(self, piper: Any, text: str, rendering: Rendering) -> Any:
        return self.say(text)


def sentences(*texts: str) -> list[Utterance]:
    return [Utterance(text=text, voices=(Voice(name="v"),)) for text in texts]


def test_a_second_list_is_begun_while_nobody_takes_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shards.demo.speech.CHUNK", 2)
    both = threading.Barrier(2)

    def say(text: str) -> np.ndarray:
        if text in ("c", "x"):  # the last of one list and the first of the next meet, or time runs out
            both.wait(timeout=20)
        return np.full(10, ord(text) / 1000, np.float32)

    with Mute(tmp_path, say, threads=2) as speaker:
        lists = [speaker.speak(sentences("a", "b", "c")), speaker.speak(sentences("x", "y"))]
        got = [[round(float(wave[0]) * 1000) for (wave,) in spoken] for spoken in lists]
    assert got == [[ord(text) for text in "abc"], [ord(text) for text in "xy"]]


def test_a_speaker_that_is_left_says_no_more(tmp_path: Path) -> None:
    said: list[str] = []
    begun, go_on = threading.Event(), threading.Event()

    def say(text: str) -> np.ndarray:
        said.append(text)
        begun.set()
        assert go_on.wait(timeout=20)
        return np.zeros(10, np.float32)

    with Mute(tmp_path, say, threads=1) as speaker:
        spoken = speaker.speak(sentences(*"abcdef"))
        assert begun.wait(timeout=20)
        threading.Timer(0.2, go_on.set).start()
    assert said == ["a"]
    with pytest.raises(CancelledError):
        next(spoken)


@pytest.mark.slow
@pytest.mark.skipif(not FOLDER.is_dir(), reason="the Piper voice has not been fetched")
def test_speech_is_the_same_on_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shards.demo.speech.CHUNK", 2)
    wanted = [
        Utterance(text="The capital of France is Paris.", voices=(ANSWER_VOICE,)),
        Utterance(text="What is the capital of France?", voices=TRAIN_RENDERINGS[0][:2]),
        Utterance(text="What is the capital of France?", voices=TRAIN_RENDERINGS[0][:2]),
        Utterance(text="The capital of France is Paris.", voices=(ANSWER_VOICE,)),
    ]
    one, two = list(Speaker(FOLDER, threads=1).speak(wanted)), list(Speaker(FOLDER, threads=2).speak(wanted))
    for first, second in zip(one, two, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert np.array_equal(one[0][0], one[3][0]), "the answer voice has no randomness"
    assert one[1][0].shape != one[2][0].shape or not np.array_equal(one[1][0], one[2][0]), "question voices vary"
    assert 1.0 < len(one[0][0]) / 16_000 < 4.0 and np.abs(one[0][0]).max() > 0.1


@pytest.mark.slow
@pytest.mark.skipif(not FOLDER.is_dir(), reason="the Piper voice has not been fetched")
def test_a_steady_sentence_is_spoken_once_and_noise_does_not_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    really = Speaker._say

    def say(self: Speaker, piper: Any, text: str, rendering: Rendering) -> Any:
        said.append(text)
        return really(self, piper, text, rendering)

    monkeypatch.setattr(Speaker, "_say", say)
    answer = Utterance(text="Paris.", voices=(ANSWER_VOICE,))
    mixed = [answer, Utterance(text="Where?", voices=TRAIN_RENDERINGS[0][:1])]
    speaker = Speaker(FOLDER, threads=1)
    [[first]], [[again]] = list(speaker.speak([answer])), list(speaker.speak([answer]))
    assert said == ["Paris."] and np.array_equal(first, again)
    [_, [late]], [_, [fresh]] = list(speaker.speak(mixed)), list(Speaker(FOLDER, threads=1).speak(mixed))
    assert np.array_equal(late, fresh), "what was spoken before must not change what a list of sentences sounds like"
