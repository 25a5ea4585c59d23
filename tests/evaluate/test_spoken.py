from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from echox.audio.io import encode_flac
from echox.errors import DataError
from echox.evaluate.spoken import resynthesis_wer, score_questions, score_transcription, take
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
