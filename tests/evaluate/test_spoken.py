from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from echox.audio.io import encode_flac
from echox.errors import DataError
from echox.evaluate.spoken import SetScore, resynthesis_wer, score_questions, score_transcription, take
from echox.evaluate.store import load_evaluation, read_metrics, save_evaluation
from echox.speak.pipeline import SpokenAnswer
from echox.stream.format.writer import write_shards
from echox.stream.storage.store import Sample, read_folder

CAPITALS = {"France": "Paris", "Japan": "Tokyo", "Italy": "Rome", "Egypt": "Cairo"}


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    def rows() -> Any:
        for index, (country, city) in enumerate(CAPITALS.items()):
            meta = {
                "id": country,
                "question_text": f"What is the capital of {country}?",
                "answer_text": f"The capital of {country} is {city}.",
                "answers": [city],
                "task": "sqa",
                "question_s": 0.1 * (index + 1),
            }
            audio = encode_flac(np.full(1600 * (index + 1), 0.1, np.float32))
            units = np.full(index + 1, index, "<u2").tobytes()
            yield {
                "__key__": country,
                "question.flac": audio,
                "answer.flac": audio,
                "answer.units": units,
                "json": meta,
            }

    write_shards(tmp_path / "set", rows(), per_shard=3)
    return list(read_folder(tmp_path / "set"))


class Model:
    """Knows all but Egypt, by the length of the question; its units are the country's number."""

    def answer(self, clips: list[Any]) -> list[SpokenAnswer]:
        names = list(CAPITALS)
        numbers = [len(clip) // 1600 - 1 for clip in clips]
        texts = ["I do not know." if n == 3 else f"It is {CAPITALS[names[n]]}." for n in numbers]
        return [SpokenAnswer(t, np.array([n], np.uint16)) for t, n in zip(texts, numbers, strict=True)]

    def write(self, clips: list[Any], task: str) -> list[str]:
        assert task == "asr"
        return [answer.text for answer in self.answer(clips)]


class Speaker:
    """A wave whose level is the first unit."""

    sample_rate = 16000

    def __call__(self, units: Any, durations: Any = None) -> list[Any]:
        return [np.full(160, unit[0] / 10, np.float32) for unit in units]


class Judge:
    """Hears Paris, then mishears Tokyo, then Rome; silence of Egypt as the model said it."""

    heard = ("It is Paris.", "It is Toledo.", "It is Rome.", "I do not know.")

    def transcribe(self, audio: list[Any]) -> list[str]:
        return [self.heard[round(float(wave[0]) * 10)] for wave in audio]


def test_scores_of_questions(samples: list[Sample]) -> None:
    seen: list[tuple[int, int]] = []
    score = score_questions(
        Model(), samples, Speaker(), Judge(), text_llm_acc=1.0, batch=3, progress=lambda *done: seen.append(done)
    )
    assert (score.n, score.text_llm_acc) == (4, 1.0)
    assert score.s2t_acc == 0.75
    assert score.s2s_acc == 0.5
    assert score.retention == pytest.approx(2 / 3)
    assert score.wer == pytest.approx(1 / 13), "one word of thirteen was misheard"
    assert seen == [(3, 4), (4, 4)]
    assert [item.speech_right for item in score.items] == [True, False, True, False]


def test_transcription_is_judged_against_the_reference(samples: list[Sample]) -> None:
    score = score_transcription(Model(), samples[:1])
    assert score.s2t_acc is None and score.retention is None
    assert score.wer == pytest.approx(4 / 6), "'the capital of france is paris' against 'it is paris'"


def test_resynthesis_uses_units_and_original_audio(samples: list[Sample]) -> None:
    class Echo(Judge):
        def transcribe(self, audio: list[Any]) -> list[str]:
            # True units come back as the level of the speaker, original audio as 0.1 (unit 1).
            return [f"The capital of {list(CAPITALS)[round(float(w[0]) * 10)]} is x." for w in audio]

    again, original = resynthesis_wer(samples, Speaker(), Echo())
    assert again == pytest.approx(4 / 24), "only the city of each is wrong"
    assert original == pytest.approx(7 / 24), "three countries are wrong as well"


def test_take_spreads_over_the_set(samples: list[Sample], tmp_path: Path) -> None:
    assert [s.key for s in take(tmp_path / "set", 2)] == ["France", "Egypt"]
    assert take(tmp_path / "set", None) == take(tmp_path / "set", 9) == samples


def test_an_evaluation_survives_the_disk(tmp_path: Path) -> None:
    wavs = {"question_wav": b"RIFF1", "answer_wav": None, "reference_wav": b"RIFF2"}
    samples = [{"question_text": "q", **wavs, "ok": True}]
    save_evaluation(tmp_path / "e", {"resynthesis_wer": 0.2}, samples)
    assert load_evaluation(tmp_path / "e") == ({"resynthesis_wer": 0.2}, samples)
    with pytest.raises(DataError, match="no evaluation found"):
        load_evaluation(tmp_path)


def test_metrics_of_a_killed_run_are_read_up_to_the_cut(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss/total": 2.0}\n{"step": 2, "lo')
    assert read_metrics(tmp_path) == [{"step": 1, "loss/total": 2.0}]
    assert read_metrics(tmp_path / "absent") == []


class Heard:
    """Answers each question by its length, and remembers how questions came."""

    def __init__(self, texts: dict[int, str]) -> None:
        self.texts, self.batches = texts, []

    def answer(self, clips: list[Any]) -> list[SpokenAnswer]:
        self.batches.append([len(clip) for clip in clips])
        return [SpokenAnswer(self.texts[len(clip)], np.array([len(clip) // 10], np.uint16)) for clip in clips]

    def write(self, clips: list[Any], task: str) -> list[str]:
        assert task == "asr"
        return [answer.text for answer in self.answer(clips)]


class Loud:
    """A vocoder of another rate, whose wave is as long as its unit says; and a judge that reads the length."""

    sample_rate = 8000

    def __init__(self, heard: dict[int, str]) -> None:
        self.heard = heard

    def __call__(self, units: Any, durations: Any = None) -> list[Any]:
        return [np.full(int(unit[0]), 0.1, np.float32) for unit in units]

    def transcribe(self, audio: list[Any]) -> list[str]:
        return [self.heard[len(wave)] for wave in audio]


def uneven(tmp_path: Path) -> list[Sample]:
    """Four samples out of the order of their lengths; two say no length of the question, one no accepted answers."""

    def rows() -> Any:
        for key, size, seconds in (
            ("c", 4800, {"question_s": 0.3, "answer_s": 0.01}), ("a", 1600, {"question_s": 0.1}),
            ("d", 3200, {"answer_s": 0.2}), ("b", 800, {}),
        ):  # fmt: skip
            meta = {"id": key, "question_text": f"ask {key}", "answer_text": f"right {key} x", "task": "sqa", **seconds}
            if key != "a":
                meta["answers"] = [key, f"also {key}"]
            audio = encode_flac(np.full(size, 0.1, np.float32))
            units = np.array([size // 10, 1], "<u2").tobytes()
            yield {"__key__": key, "question.flac": audio, "answer.flac": audio, "answer.units": units, "json": meta}

    write_shards(tmp_path / "uneven", rows(), per_shard=4)
    return list(read_folder(tmp_path / "uneven"))


def test_every_field_of_a_score_comes_from_its_own_question(tmp_path: Path) -> None:
    model = Heard({1600: "right a x", 800: "it is b", 4800: "nothing", 3200: "also d"})
    # Waves are resampled from 8 to 16 kHz, so the judge hears twice as many samples.
    judge = Loud({320: "it was right a x", 160: "c", 960: "it is c", 640: "also d"})
    seen: list[tuple[int, int]] = []
    score = score_questions(model, uneven(tmp_path), judge, judge, batch=3, progress=lambda *done: seen.append(done))
    assert model.batches == [[800, 1600, 3200], [4800]], "shortest first, by the question, the answer, or nothing"
    assert seen == [(3, 4), (4, 4)]
    by_id = {item.id: item for item in score.items}
    assert [item.id for item in score.items] == ["b", "a", "d", "c"]
    assert by_id["a"].golds == ["right a x"] and by_id["b"].golds == ["b", "also b"]
    for key, size, text, heard in (("a", 1600, "right a x", "it was right a x"), ("b", 800, "it is b", "c"),
                                   ("c", 4800, "nothing", "it is c"), ("d", 3200, "also d", "also d")):  # fmt: skip
        item = by_id[key]
        assert (item.question, item.reference) == (f"ask {key}", f"right {key} x")
        assert (item.text, item.heard, len(item.question_audio)) == (text, heard, size)
        assert item.answer_audio is not None and len(item.answer_audio) == size // 5
    assert {key: (item.text_right, item.speech_right) for key, item in by_id.items()} == {
        "a": (True, True), "b": (True, False), "c": (False, True), "d": (True, True),
    }  # fmt: skip
    assert (score.n, score.s2t_acc, score.s2s_acc, score.retention) == (4, 0.75, 0.75, 1.0)
    assert score.text_llm_acc is None
    assert score.wer == pytest.approx((2 + 3 + 3 + 0) / (3 + 3 + 1 + 2))
    names = ("n", "text_llm_acc", "s2t_acc", "s2s_acc", "retention", "wer")
    assert score.row() == {name: getattr(score, name) for name in names}


def test_no_share_is_kept_of_nothing_known(tmp_path: Path) -> None:
    model = Heard(dict.fromkeys((1600, 800, 4800, 3200), "wrong"))
    judge = Loud(dict.fromkeys((320, 160, 960, 640), "right a x b c d"))
    score = score_questions(model, uneven(tmp_path), judge, judge)
    assert (score.s2t_acc, score.s2s_acc, score.retention) == (0.0, 1.0, None)
    assert len(model.batches) == 1, "sixteen at a time"


def test_transcripts_and_resynthesis_go_in_batches_too(tmp_path: Path) -> None:
    samples, seen = uneven(tmp_path), []
    model = Heard({1600: "right a x", 800: "right b", 4800: "right c x", 3200: "wrong d x"})
    score = score_transcription(model, samples, batch=2, progress=lambda *done: seen.append(done))
    assert model.batches == [[800, 1600], [3200, 4800]] and seen == [(2, 4), (4, 4)]
    assert score.n == 4 and score.wer == pytest.approx(2 / 12)
    assert (score.text_llm_acc, score.s2t_acc, score.s2s_acc, score.retention) == (None, None, None, None)
    assert {item.id: item.text for item in score.items}["b"] == "right b"
    assert all(item.answer_audio is None and item.heard == "" for item in score.items)

    judge = Loud({320: "right a x", 160: "right b", 640: "right d x", 960: "right c x",
                  1600: "a", 800: "b", 3200: "right d", 4800: "right c x"})  # fmt: skip
    seen.clear()
    again, original = resynthesis_wer(samples, judge, judge, batch=3, progress=lambda *done: seen.append(done))
    assert seen == [(3, 4), (4, 4)]
    assert (again, original) == (pytest.approx(1 / 12), pytest.approx(5 / 12))
    model.batches.clear()
    score_transcription(model, samples)
    assert len(model.batches) == 1, "sixteen at a time"
    assert resynthesis_wer(samples, judge, judge) == (again, original)


def test_a_score_has_no_items_unless_given_and_does_not_print_them() -> None:
    first, second = (SetScore(3, None, None, None, None, 0.5) for _ in range(2))
    assert first.items == [] and first.items is not second.items and "items" not in repr(first)


def test_a_set_cut_down_still_reaches_its_ends(samples: list[Sample], tmp_path: Path) -> None:
    assert [s.key for s in take(tmp_path / "set", 3)] == ["France", "Italy", "Egypt"]
    assert [s.key for s in take(tmp_path / "set", 1)] == ["France"]
    assert [s.key for s in take(str(tmp_path / "set"), 4)] == list(CAPITALS)
