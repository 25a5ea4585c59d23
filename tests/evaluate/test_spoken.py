from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from echox.audio.io import encode_flac
from echox.errors import DataError
from echox.evaluate.listening import Listener
from echox.evaluate.scores import SetScore
from echox.evaluate.spoken import (
    entity_of,
    relation_of,
    resynthesis_wer,
    score_questions,
    score_teacher,
    score_transcription,
    spoken_references,
    take,
)
from echox.evaluate.store import SAMPLES, load_evaluation, read_metrics, save_evaluation
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
    """Knows all but Egypt, by the length of the question; its units are the country's number, the teacher's 5 more."""

    recipe = SimpleNamespace(language="en")

    def answer(self, clips: list[Any], turns: Any = None, cascade: bool = False) -> list[SpokenAnswer]:
        assert turns is None and cascade
        names = list(CAPITALS)
        numbers = [len(clip) // 1600 - 1 for clip in clips]
        texts = ["I do not know." if n == 3 else f"It is {CAPITALS[names[n]]}." for n in numbers]
        units = [(np.array([n], np.uint16), np.array([n + 5], np.uint16)) for n in numbers]
        return [SpokenAnswer(t, own, taught) for t, (own, taught) in zip(texts, units, strict=True)]

    def write(self, clips: list[Any], task: str) -> list[str]:
        assert task == "asr"
        return [answer.text for answer in self.answer(clips, cascade=True)]


class Speaker:
    """A wave whose level is the first unit."""

    sample_rate = 16000

    def __call__(self, units: Any, durations: Any = None) -> list[Any]:
        return [np.full(160, unit[0] / 10, np.float32) for unit in units]


class Judge:
    """Hears Paris, then mishears Tokyo, then Rome; silence of Egypt as the model said it; the teacher well."""

    heard = ("It is Paris.", "It is Toledo.", "It is Rome.", "I do not know.", "",
             "It is Paris", "It is Tokyo", "It is Rome", "I don't know", "")  # fmt: skip

    def transcribe(self, audio: list[Any]) -> list[str]:
        return [self.heard[round(float(wave[0]) * 10)] for wave in audio]


def listener(judge: Any = None, speaker: Any = None) -> Listener:
    return Listener(speaker or Speaker(), judge or Judge())


def test_scores_of_questions(samples: list[Sample]) -> None:
    seen: list[tuple[str, int, int]] = []
    score = score_questions(
        Model(), samples, listener(), text_llm_acc=1.0, batch=3, progress=lambda *done: seen.append(done)
    )
    assert (score.n, score.text_llm_acc) == (4, 1.0)
    assert score.s2t_acc == 0.75
    assert score.s2s_acc == 0.5
    assert score.retention == pytest.approx(2 / 3)
    assert score.wer == pytest.approx(1 / 13), "one word of thirteen was misheard"
    # Four answers, four of the teacher, and three references: one has the units of an answer.
    assert seen == [("answered", 3, 4), ("answered", 4, 4), ("heard", 11, 11)]
    assert [item.speech_right for item in score.items] == [True, False, True, False]
    assert (score.s2t_strict_acc, score.s2s_strict_acc, score.cascade_acc) == (0.75, 0.5, 0.75)
    assert score.exact == 0.75 and (score.entity_n, score.strict_rule) == (0, "answer alone")


def test_questions_of_a_dialogue_are_asked_after_what_was_said_before(samples: list[Sample]) -> None:
    asked: list[Any] = []

    class Talked(Model):
        def answer(self, clips: list[Any], turns: Any = None, cascade: bool = False) -> list[SpokenAnswer]:
            asked.append(turns)
            return super().answer(clips, None, cascade)

    samples[1].meta["turns"] = [{"role": "user", "text": "Hello."}, {"role": "assistant", "text": "Yes?"}]
    score_questions(Talked(), samples, listener(), batch=3)
    (first, second) = asked
    assert [[turn.text for turn in turns] for turns in first] == [[], ["Hello.", "Yes?"], []] and second is None


def test_transcription_is_judged_against_the_reference(samples: list[Sample]) -> None:
    score = score_transcription(Model(), samples[:1])
    assert score.s2t_acc is None and score.retention is None
    assert score.wer == pytest.approx(4 / 6), "'the capital of france is paris' against 'it is paris'"


def test_resynthesis_uses_units_and_original_audio(samples: list[Sample]) -> None:
    class Echo(Judge):
        def transcribe(self, audio: list[Any]) -> list[str]:
            # True units come back as the level of the speaker, original audio as 0.1 (unit 1).
            return [f"The capital of {list(CAPITALS)[round(float(w[0]) * 10)]} is x." for w in audio]

    again, original = resynthesis_wer(samples, listener(Echo()))
    assert again == pytest.approx(4 / 24), "only the city of each is wrong"
    assert original == pytest.approx(7 / 24), "three countries are wrong as well"


def test_take_spreads_over_the_set(samples: list[Sample], tmp_path: Path) -> None:
    assert [s.key for s in take(tmp_path / "set", 2)] == ["France", "Egypt"]
    assert take(tmp_path / "set", None) == take(tmp_path / "set", 9) == samples


def test_an_evaluation_survives_the_disk(tmp_path: Path) -> None:
    wavs = {"question_wav": b"RIFF1", "answer_wav": None, "reference_wav": b"RIFF2"}
    samples = [{"question_text": "q", "answer_text": "a", "reference_text": None, **wavs, "ok": True}]
    save_evaluation(tmp_path / "e", {"resynthesis_wer": 0.2}, samples)
    assert load_evaluation(tmp_path / "e") == ({"resynthesis_wer": 0.2}, samples)
    with pytest.raises(DataError, match="no evaluation found"):
        load_evaluation(tmp_path)


@pytest.mark.parametrize("kind", ["parent", "absolute", "link", "pipe", "other", "number", "absent", "deep", "list"])
def test_an_evaluation_of_others_names_no_file_but_its_own(tmp_path: Path, kind: str) -> None:
    folder, secret = tmp_path / "e", tmp_path / "secret.wav"
    secret.write_bytes(b"RIFF secret")
    save_evaluation(folder, {}, [{"question_wav": b"RIFF1"}])
    wav = folder / "000-question.wav"
    if kind in ("link", "pipe", "absent"):
        wav.unlink()
    if kind == "link":
        wav.symlink_to(secret)
    if kind == "pipe":
        os.mkfifo(wav)
    if kind == "other":
        wav.write_bytes(b"-----BEGIN KEY-----")
    named: dict[str, object] = {"parent": "../secret.wav", "absolute": str(secret), "number": 3}
    if kind in named:
        (folder / SAMPLES).write_text(json.dumps([{"question_wav": named[kind]}]))
    if kind in ("deep", "list"):
        (folder / SAMPLES).write_text("[" * 100_000 if kind == "deep" else '["a"]')
    with pytest.raises(DataError, match="this is no evaluation"):
        load_evaluation(folder)


def test_metrics_of_a_killed_run_are_read_up_to_the_cut(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss/total": 2.0}\n{"step": 2, "lo')
    assert read_metrics(tmp_path) == [{"step": 1, "loss/total": 2.0}]
    assert read_metrics(tmp_path / "absent") == []


class Heard:
    """Answers each question by its length, and remembers how questions came."""

    recipe = SimpleNamespace(language="en")

    def __init__(self, texts: dict[int, str]) -> None:
        self.texts, self.batches = texts, []

    def answer(self, clips: list[Any], turns: Any = None, cascade: bool = False) -> list[SpokenAnswer]:
        self.batches.append([len(clip) for clip in clips])
        units = [np.array([len(clip) // 10], np.uint16) for clip in clips]
        return [SpokenAnswer(self.texts[len(c)], own, own) for c, own in zip(clips, units, strict=True)]

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
    seen: list[tuple[str, int, int]] = []
    ears = Listener(judge, judge)
    score = score_questions(model, uneven(tmp_path), ears, batch=3, progress=lambda *done: seen.append(done))
    assert model.batches == [[800, 1600, 3200], [4800]], "shortest first, by the question, the answer, or nothing"
    assert seen[:2] == [("answered", 3, 4), ("answered", 4, 4)]
    by_id = {item.id: item for item in score.items}
    assert [item.id for item in score.items] == ["b", "a", "d", "c"]
    assert by_id["a"].golds == ["right a x"] and by_id["b"].golds == ["b", "also b"]
    for key, size, text, heard in (("a", 1600, "right a x", "it was right a x"), ("b", 800, "it is b", "c"),
                                   ("c", 4800, "nothing", "it is c"), ("d", 3200, "also d", "also d")):  # fmt: skip
        item = by_id[key]
        assert (item.question, item.reference) == (f"ask {key}", f"right {key} x")
        assert (item.text, item.heard, len(item.question_audio)) == (text, heard, size)
        assert item.units is not None and [len(wave) for wave in ears.speak([item.units])] == [size // 5]
    assert {key: (item.text_right, item.speech_right) for key, item in by_id.items()} == {
        "a": (True, True), "b": (True, False), "c": (False, True), "d": (True, True),
    }  # fmt: skip
    assert (score.n, score.s2t_acc, score.s2s_acc, score.retention) == (4, 0.75, 0.75, 1.0)
    assert score.text_llm_acc is None
    assert score.wer == pytest.approx((2 + 3 + 3 + 0) / (3 + 3 + 1 + 2))
    row = score.row()
    assert "items" not in row and all(row[name] == getattr(score, name) for name in row)
    assert {"n", "s2s_strict_acc", "cascade_acc", "copy_acc", "retention_paired", "interval_95", "wer"} <= set(row)


def test_no_share_is_kept_of_nothing_known(tmp_path: Path) -> None:
    model = Heard(dict.fromkeys((1600, 800, 4800, 3200), "wrong"))
    judge = Loud(dict.fromkeys((320, 160, 960, 640), "right a x b c d"))
    score = score_questions(model, uneven(tmp_path), Listener(judge, judge))
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
    assert all(item.units is None and item.heard == "" for item in score.items)

    judge = Loud({320: "right a x", 160: "right b", 640: "right d x", 960: "right c x",
                  1600: "a", 800: "b", 3200: "right d", 4800: "right c x"})  # fmt: skip
    seen.clear()
    heard = Listener(judge, judge)
    again, original = resynthesis_wer(samples, heard, batch=3, progress=lambda *done: seen.append(done))
    assert seen == [(3, 4), (4, 4)]
    assert (again, original) == (pytest.approx(1 / 12), pytest.approx(5 / 12))
    model.batches.clear()
    score_transcription(model, samples)
    assert len(model.batches) == 1, "sixteen at a time"
    assert resynthesis_wer(samples, heard) == (again, original)


def test_a_score_has_no_items_unless_given_and_does_not_print_them() -> None:
    first, second = (SetScore(n=3, wer=0.5) for _ in range(2))
    assert first.items == [] and first.items is not second.items and "items" not in repr(first)


def test_a_set_cut_down_still_reaches_its_ends(samples: list[Sample], tmp_path: Path) -> None:
    assert [s.key for s in take(tmp_path / "set", 3)] == ["France", "Italy", "Egypt"]
    assert [s.key for s in take(tmp_path / "set", 1)] == ["France"]
    assert [s.key for s in take(str(tmp_path / "set"), 4)] == list(CAPITALS)


def test_entity_and_relation_are_those_given_or_those_of_the_fact() -> None:
    fact = {"fact": "Ivory Coast|continent"}
    assert (entity_of(fact), relation_of(fact)) == (["Ivory Coast"], "continent")
    given = {**fact, "entity": ["Ivory Coast", "Cote d'Ivoire"], "relation": "where"}
    assert (entity_of(given), relation_of(given)) == (["Ivory Coast", "Cote d'Ivoire"], "where")
    assert entity_of({"entity": "Ghana"}) == ["Ghana"]
    assert (entity_of({}), relation_of({})) == ([], "") == (entity_of({"fact": None}), relation_of({"fact": None}))


class Facts:
    """Answers about countries by the length of the question; the judge hears by the first unit."""

    sample_rate = 16000
    recipe = SimpleNamespace(language="en")
    texts = {1: "Ghana is in Africa.", 2: "Peru is in Africa.", 3: "Oslo is the capital of Norway."}

    def __init__(self, heard: dict[int, str]) -> None:
        self.heard, self.said = heard, []

    def answer(self, clips: list[Any], turns: Any = None, cascade: bool = False) -> list[SpokenAnswer]:
        numbers = [len(clip) // 1600 for clip in clips]
        return [SpokenAnswer(self.texts[n], np.array([n], "<u2"), np.array([10 + n], "<u2")) for n in numbers]

    def say(self, texts: list[str]) -> list[Any]:
        self.said.append(texts)
        return [np.array([30 + len(text)], "<u2") for text in texts]

    def __call__(self, units: Any, durations: Any = None) -> list[Any]:
        return [np.full(160, int(each[0]), np.float32) for each in units]

    def transcribe(self, audio: list[Any]) -> list[str]:
        return [self.heard[int(wave[0])] for wave in audio]


def facts(folder: Path) -> list[Sample]:
    """Three questions; the reference of the second has units of its own, that of the first stands in another set."""

    def rows() -> Any:
        for n, (fact, answer, golds) in enumerate((
            ("Ghana|continent", "Ghana is in Africa.", ["Africa"]),
            ("Peru|continent", "Peru is in South America.", ["South America"]),
            ("Norway|capital", "The capital of Norway is Oslo.", ["Oslo"]),
        ), 1):  # fmt: skip
            meta = {"id": fact, "question_text": "?", "answer_text": answer, "answers": golds, "task": "sqa",
                    "fact": fact, "question_s": 0.1 * n}  # fmt: skip
            sample = {
                "__key__": f"s{n}",
                "question.flac": encode_flac(np.full(1600 * n, 0.1, np.float32)),
                "json": meta,
            }
            yield sample | ({"answer.units": np.array([22], "<u2").tobytes()} if n == 2 else {})

    write_shards(folder / "sqa", rows(), per_shard=3, optional=["answer.units"])
    spoken = [
        {
            "__key__": "a",
            "json": {"id": "a", "answer_text": "Ghana is in Africa.", "task": "tts"},
            "answer.units": b"\x15\0",
        },
        {
            "__key__": "b",
            "json": {"id": "b", "answer_text": "Ghana is in Africa.", "task": "tts"},
            "answer.units": b"\x63\0",
        },
        {"__key__": "c", "json": {"id": "c", "answer_text": "Nobody asks.", "task": "tts"}, "answer.units": b"\x63\0"},
    ]
    write_shards(folder / "tts", spoken, per_shard=3)
    return list(read_folder(folder / "sqa"))


def test_cascade_and_copy_stand_beside_the_speech_and_are_judged_by_the_same_strict_rule(tmp_path: Path) -> None:
    samples = facts(tmp_path)
    model = Facts({
        1: "Timbabwe is in Africa.", 2: "Peru is in Africa.", 3: "Oslo is the capital of Norway",
        11: "Ghana is in Africa.", 12: "Peru is in Africa.", 13: "Also is the capital of Norway.",
        21: "Ghana is in Africa.", 22: "Peru is in south america.",
    })  # fmt: skip
    copies = spoken_references([tmp_path / "tts"], [sample.meta["answer_text"] for sample in samples])
    assert {text: units.tolist() for text, units in copies.items()} == {"Ghana is in Africa.": [21]}
    score = score_questions(model, samples, Listener(model, model), copies=copies)
    ghana, peru, norway = score.items
    assert (ghana.heard, ghana.cascade_heard, ghana.copy_heard) == (model.heard[1], model.heard[11], model.heard[21])
    assert [item.speech_right for item in score.items] == [True, False, True]
    assert [item.speech_strict for item in score.items] == [False, False, True]
    assert [item.cascade_strict for item in score.items] == [True, False, False]
    assert [item.copy_strict for item in score.items] == [True, True, None]
    assert (score.s2s_acc, score.s2s_strict_acc, score.s2t_strict_acc) == (2 / 3, 1 / 3, 2 / 3)
    assert (score.cascade_acc, score.copy_acc, score.copy_n) == (1 / 3, 1.0, 2)
    assert score.relations == {
        "capital": {"n": 1, "s2t_strict": 1.0, "s2s_strict": 1.0, "cascade": 0.0, "copy": None, "copy_n": 0},
        "continent": {"n": 2, "s2t_strict": 0.5, "s2s_strict": 0.0, "cascade": 0.5, "copy": 1.0, "copy_n": 2},
    }
    assert peru.relation == "continent" and norway.entity == ["Norway"]
    assert score.strict_rule == "entity and answer"


def test_the_teacher_is_judged_on_given_texts_in_batches_by_length() -> None:
    model = Facts({32: "it", 34: "four", 35: "other words"})
    score = score_teacher(model, ["fours", "it", "four"], Listener(model, model), batch=2)
    assert model.said == [["it", "four"], ["fours"]]
    assert (score.wer, score.exact, score.n) == (pytest.approx(2 / 3), pytest.approx(2 / 3), 3)
