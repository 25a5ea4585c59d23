"""Vocoders side by side: what each is given, whose words count, and which is preferred."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import pytest

from echox.audio.io import read_audio
from echox.cli import main
from echox.errors import CorruptSampleError, DataError
from echox.evaluate.quality import Quality
from echox.evaluate.spoken import take
from echox.evaluate.voices import (
    ORIGINAL,
    TRUE,
    VoiceScore,
    compare_voices,
    preferred,
    recordings,
    table,
    write_voices_page,
)
from echox.speak.unit_mel import UnitMel, UnitMelConfig
from echox.speak.vocoder import load_vocoder
from echox.stream.format.writer import write_shards
from echox.units.identity import write_unit_set
from tests.vocoder import toy

TEXTS = ["red green blue grey", "left right", "near far away", "", "yes"]


def voice(folder: Path, change: Callable[[list[dict[str, Any]]], object] = lambda rows: None) -> Path:
    """A dataset of `TEXTS`, the fourth of which nobody can hear."""
    rows = [toy.sample(f"s{seed}", *toy.clip(seed)) for seed in range(len(TEXTS))]
    for row, text in zip(rows, TEXTS, strict=True):
        row["json"]["answer_text"] = text
    change(rows)
    write_shards(folder, rows)
    write_unit_set(folder, toy.UNIT_SET)
    return folder


class Tone:
    """A vocoder that holds the number of the clip, a unit a frame where it may say how long units last."""

    def __init__(self, rate: int = 16_000) -> None:
        self.sample_rate = rate
        self.given: list[Any] = []

    def stream(self) -> Any:
        raise AssertionError("whole clips are compared")

    def __call__(self, units: Sequence[Any], durations: Sequence[Any] | None = None) -> list[Any]:
        self.given.append((units, durations))
        frames = [len(each) if durations is None else int(durations[at].sum()) for at, each in enumerate(units)]
        return [np.full(count * self.sample_rate // 50, 0.5, np.float32) for count in frames]


class Judge:
    """Hears the text of each clip, and of the rows that it is told of one word less a clip."""

    def __init__(self, texts: list[str], worse: set[int]) -> None:
        self.texts, self.worse = texts, worse
        self.calls: list[list[Any]] = []

    def transcribe(self, audio: list[Any]) -> list[str]:
        self.calls.append(audio)
        return [text.rsplit(" ", 1)[0] if len(self.calls) - 1 in self.worse else text for text in self.texts]


class Rater:
    """Rates a clip by its seconds."""

    def rate(self, clips: Sequence[Any], progress: None = None) -> list[Quality | None]:
        return [Quality(*[len(clip) / 16_000] * 4) for clip in clips]


def test_each_vocoder_speaks_the_units_of_the_clips_with_their_durations_and_with_its_own(tmp_path: Path) -> None:
    samples = take(voice(tmp_path), None)
    texts = [text for text in TEXTS if text]
    first, second, judge = Tone(), Tone(24_000), Judge(texts, {3, 4})
    rater: Any = Rater()
    found = compare_voices(recordings(samples), {"a": first, "b": second}, judge, rater, rated=2)
    rows = [ORIGINAL, f"a, {TRUE}", "a", f"b, {TRUE}", "b"]
    assert [score.name for score in found.scores] == rows and found.texts == texts
    clips = [toy.clip(seed) for seed in (0, 1, 2, 4)]
    for tone in (first, second):
        for (units, durations), told in zip(tone.given, (True, False), strict=True):
            assert [list(each) for each in units] == [list(clip[0]) for clip in clips]
            assert (durations is not None) == told
            assert not told or [list(each) for each in durations] == [list(clip[1]) for clip in clips]
    for wave, number in zip(judge.calls[0], (0, 1, 2, 4), strict=True):
        assert np.array_equal(wave, read_audio(samples[number]["answer.flac"]))
    lengths = [[len(wave) for wave in call] for call in judge.calls]
    whole = [int(clip[1].sum()) * 320 for clip in clips]
    assert lengths[1] == whole == lengths[3], "24 kHz is heard at 16"
    assert lengths[2] == [len(clip[0]) * 320 for clip in clips] == lengths[4]
    by_jiwer = jiwer.wer(texts, [text.rsplit(" ", 1)[0] for text in texts])
    assert [score.wer for score in found.scores] == [0, 0, 0, by_jiwer, by_jiwer]
    low, high = found.scores[4].wer_95
    assert 0 < low < by_jiwer < high < 1 and found.scores[0].wer_95 == [0, 0]
    rated = found.scores[1].quality
    assert rated is not None and rated["n"] == 2
    assert rated["ovrl"] == pytest.approx((whole[0] + whole[3]) / 2 / 16_000), "at even distances"
    assert found.better == "a"


def score(name: str, errors: float, ovrl: float | None) -> VoiceScore:
    return VoiceScore(name, errors, [0, 1], 1.0, None if ovrl is None else {"ovrl": ovrl})


@pytest.mark.parametrize(
    ("wrong", "sound", "better"),
    [
        (12, (2.0, 3.0), "a"),  # of 20 clips: no chance
        (1, (2.0, 3.0), "b"),
        (1, (3.0, 2.0), "a"),
        (1, (None, None), "a"),
    ],
)
def test_words_decide_where_their_difference_is_no_chance_and_else_the_sound(
    wrong: int, sound: tuple[float | None, float | None], better: str
) -> None:
    texts = [f"word{number}" for number in range(20)]
    heard = {"a": texts, "b": ["other"] * wrong + texts[wrong:]}
    scores = [score("a", 0, sound[0]), score("b", wrong / 20, sound[1])]
    for names in (["a", "b"], ["b", "a"]):
        assert preferred(names, texts, heard, scores) == better


def test_errors_of_the_same_clips_are_compared_with_each_other() -> None:
    """Both are wrong in every fourth clip, the second in others too: whatever is drawn, more of its words are wrong."""
    texts = [f"word{number} and" for number in range(24)]
    common = ["other other" if number % 4 == 1 else text for number, text in enumerate(texts)]
    worse = ["other other" if number % 4 == 3 else text for number, text in enumerate(common)]
    scores = [score("a", 0.25, 1.0), score("b", 0.5, 5.0)]
    assert preferred(["a", "b"], texts, {"a": common, "b": worse}, scores) == "a"


@pytest.mark.parametrize("member", ["answer.flac", "answer.units", "answer.durations"])
def test_a_dataset_of_which_nothing_serves_is_refused(tmp_path: Path, member: str) -> None:
    samples = take(voice(tmp_path, lambda rows: [row.pop(member) for row in rows]), None)
    with pytest.raises(DataError, match=r"answer\.durations, answer\.flac, answer\.units and a text"):
        recordings(samples)


def test_a_damaged_clip_is_named(tmp_path: Path) -> None:
    samples = take(voice(tmp_path, lambda rows: rows[1].update({"answer.units": b"123"})), None)
    with pytest.raises(CorruptSampleError, match=r"s1: answer\.units cannot be decoded"):
        recordings(samples)


def test_a_clip_that_is_no_part_of_its_units_is_named(tmp_path: Path) -> None:
    long = np.full(9, 1 << 15, "<u2").tobytes()
    samples = take(voice(tmp_path, lambda rows: rows[2].update({"answer.durations": long})), None)
    with pytest.raises(CorruptSampleError, match="s2: 294912 frames"):
        recordings(samples)


def test_the_page_plays_every_row_and_holds_no_markup_of_a_text(tmp_path: Path) -> None:
    folder = voice(tmp_path / "set", lambda rows: rows[0]["json"].update({"answer_text": "red <b>green</b>"}))
    found = compare_voices(recordings(take(folder, None)), {"a<i>": Tone()}, Judge(["x"] * 4, set()))
    page = write_voices_page(tmp_path / "voices.html", found).read_text()
    assert page.count("<audio") == 4 * 3
    assert "&lt;b&gt;green" in page and "<b>green" not in page and "a<i>" not in page
    assert [row[1] for row in table(found)] == ["WER", *["100.0 %"] * 3]


def test_the_command_compares_folders_and_refuses_those_of_other_units(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = voice(tmp_path / "set")
    for name in ("first", "second", "third"):
        UnitMel(UnitMelConfig(n_units=5, width=16, blocks=1)).save(tmp_path / name)
        write_unit_set(tmp_path / name, toy.UNIT_SET)
    from echox.evaluate.judges import NamedJudge

    monkeypatch.setattr(NamedJudge, "find", classmethod(lambda cls, name: cls(name, tmp_path)))
    monkeypatch.setattr(NamedJudge, "open", lambda self, language: Judge(["one two"] * 3, set()))
    monkeypatch.setattr("echox.evaluate.quality.Dnsmos.find", classmethod(lambda cls: None))
    given = ["voices", str(folder), str(tmp_path / "first"), str(tmp_path / "second"), "--judge", "ear"]
    assert main([*given, "--limit", "4", "--out", str(tmp_path / "out"), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "out/voices.json").read_text()) and printed["judge"] == "ear"
    assert printed["clips"] == 3, "the first two and the last two, of which one has no text"
    own = load_vocoder(tmp_path / "second")([toy.clip(seed)[0] for seed in (0, 1, 4)])
    rows = {row["name"]: row for row in printed["scores"]}
    assert rows[str(tmp_path / "second")]["seconds"] == pytest.approx(sum(map(len, own)) / 16_000)
    write_unit_set(tmp_path / "third", toy.UNIT_SET.__class__(features="log_mel", clusters=5, centroids="bb"))
    assert main([*given[:2], str(tmp_path / "third")]) == 4
    assert "third" in capsys.readouterr().err
