"""Samples to batches: padding, masks, templates, and what cannot be used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from echox.audio.features import LogMel
from echox.audio.io import encode_flac
from echox.builders.setup import build_speech_collate
from echox.errors import CorruptSampleError
from echox.stream.collate import Item, PromptTokens, SpeechCollate, UnitCollate
from echox.stream.format.encoded_features import pack
from echox.stream.format.writer import write_shards
from echox.stream.storage.store import Sample, read_folder
from tests import tiny

PROMPT = PromptTokens(before=[1], after=[2, 3], after_asr=[9, 2, 3], end=4)


def letters(text: str) -> list[int]:
    return [ord(c) for c in text]


def sample(number: int, **changes: Any) -> Sample:
    seconds = 0.2 + 0.1 * (number % 5)
    wave = np.sin(np.arange(int(16000 * seconds)) / (5 + number)).astype(np.float32) * 0.3
    members = {"question.flac": encode_flac(wave), "answer.units": np.arange(number + 1, dtype="<u2").tobytes()}
    meta = {"id": f"s{number}", "question_text": "ab", "answer_text": "c" * (1 + number % 3)}
    return Sample(f"k{number}", number, {**members, **changes.pop("members", {})}, {**meta, **changes})


def speech() -> SpeechCollate:
    return SpeechCollate(letters, PROMPT, LogMel(80), max_samples=16000)


def strict() -> SpeechCollate:
    return SpeechCollate(letters, PROMPT, LogMel(80), max_samples=16000, needs_transcript=True)


def units() -> UnitCollate:
    return UnitCollate(letters, tiny.Words(lambda found: found + 100))


def known_units() -> UnitCollate:
    return UnitCollate(letters, tiny.Words(known=1))


def test_speech_is_padded_and_masked() -> None:
    batch = speech()([Item(sample(0), "sqa"), Item(sample(4), "asr", 0.0)], 7)
    assert batch.step == 7 and batch.ids == ["s0", "s4"] and batch.weight_B.tolist() == [1.0, 0.0]
    assert batch.after_BQ.tolist() == [[2, 3, 0], [9, 2, 3]]
    assert batch.after_mask_BQ.tolist() == [[True, True, False], [True] * 3]
    assert batch.response_BR.tolist() == [[99, 4, 0], [97, 98, 4]], "what is asked is to be written, not its answer"
    assert batch.response_mask_BR.tolist() == [[True, True, False], [True] * 3]
    assert batch.transcript_lengths_B.tolist() == [2, 2]
    assert batch.mel_BMT.shape[2] >= int(batch.frames_B.max())


def test_decoding_apart_and_joining_is_the_same_as_at_once() -> None:
    items = [Item(sample(number), "sqa") for number in (3, 0, 2)]
    at_once, collate = speech()(items, 1), speech()
    joined = collate.join([collate.decode(item) for item in items], 1)
    assert joined.ids == at_once.ids and torch.equal(joined.mel_BMT, at_once.mel_BMT)


def long(seconds: float) -> Sample:
    wave = np.full(int(16000 * seconds), 0.1, dtype=np.float32)
    return sample(0, members={"question.flac": encode_flac(wave)})


def test_audio_longer_than_the_limit_is_cut_and_is_no_target_of_ctc() -> None:
    collate = speech()
    rows = [collate.decode(Item(found, "sqa")) for found in (long(2.5), long(1.0), sample(0))]
    assert [row.cut_s for row in rows] == [1.5, 0.0, 0.0]
    batch = collate.join(rows, 0)
    assert batch.frames_B.tolist() == [152, 152, 72]  # a second and the margin
    assert batch.transcript_lengths_B.tolist() == [0, 2, 2]
    assert batch.response_BR.tolist() == [[99, 4]] * 3 and batch.weight_B.tolist() == [1.0] * 3
    heard = collate.from_audio([np.full(40000, 0.1, np.float32)], ["sqa"], ["ab"], ["c"], ids=["a"], weights=[1.0])
    assert heard.frames_B.tolist() == [152] and heard.transcript_lengths_B.tolist() == [0]


def test_of_features_that_were_cut_the_metadata_tell_it() -> None:
    collate = SpeechCollate(letters, PROMPT, LogMel(80), max_samples=16000, precomputed=6)
    encoded = {"question.encoded.npy": pack(torch.ones(76, 6))}
    rows = [collate.decode(Item(sample(0, members=encoded, question_s=s), "sqa")) for s in (2.25, 1.0, None)]
    assert [row.cut_s for row in rows] == [1.25, 0.0, 0.0]
    assert collate.join(rows, 0).transcript_lengths_B.tolist() == [0, 2, 2]


@pytest.mark.parametrize("input_mode", ["trim", "pad_30s"])
def test_up_to_the_limit_all_windows_of_30_s_are_heard(input_mode: str) -> None:
    log_mel = LogMel(8, input_mode=input_mode)  # type: ignore[arg-type]
    batch = SpeechCollate(letters, PROMPT, log_mel, max_samples=45 * 16000)([Item(long(40), "sqa")], 0)
    assert batch.frames_B.tolist() == [4052] and batch.transcript_lengths_B.tolist() == [2]
    assert batch.mel_BMT.shape[2] == (6000 if input_mode == "pad_30s" else 4052)
    assert batch.stats()["audio_s"] == 40.52


def test_units_become_words() -> None:
    batch = units()([Item(sample(2), "tts"), Item(sample(0), "tts")], 0)
    assert batch.words_BM.tolist() == [[100, 101, 102], [100, 0, 0]]
    assert batch.words_mask_BM.sum(1).tolist() == [3, 1]


@pytest.mark.parametrize("collate", [speech, units])
def test_a_blank_batch_counts_nothing_and_has_the_tensors_of_a_real_one(collate: Callable[[], Any]) -> None:
    blank, real = collate().blank(5), collate()([Item(sample(1), "sqa")], 5)
    assert blank.ids == [] and blank.step == 5 and blank.weight_B.tolist() == [0.0]
    for name, value in vars(real).items():
        if isinstance(value, torch.Tensor):
            other = getattr(blank, name)
            assert (other.dtype, other.ndim, len(other)) == (value.dtype, value.ndim, 1)


def test_a_blank_batch_of_encoded_questions_has_features() -> None:
    collate = SpeechCollate(letters, PROMPT, LogMel(80), max_samples=16000, precomputed=6)
    blank = collate.blank(0)
    assert blank.features_BTd is not None and blank.features_BTd.shape[2] == 6
    assert blank.ids == [] and blank.weight_B.tolist() == [0.0]


@pytest.mark.parametrize("shape", [(4, 5), (6,)])
def test_encoded_questions_of_another_width_are_named(shape: tuple[int, ...]) -> None:
    collate = SpeechCollate(letters, PROMPT, LogMel(80), max_samples=16000, precomputed=6)
    encoded = Sample("k", 0, {"question.encoded.npy": pack(torch.zeros(shape))}, {})
    with pytest.raises(CorruptSampleError, match=r"question.encoded.npy has shape .*, not \[frames, 6\]") as caught:
        collate.decode(Item(encoded, "sqa"))
    assert caught.value.kind == "schema"
    whole = Sample("k", 0, {"question.encoded.npy": pack(torch.ones(4, 6))}, {"answer_text": "c"})
    batch = collate([Item(whole, "sqa")], 0)
    assert batch.features_BTd is not None and batch.features_BTd.tolist() == torch.ones(1, 4, 6).tolist()
    assert batch.frames_B.tolist() == [8] and batch.mel_BMT.shape[2] == 0


@pytest.mark.parametrize("collate", [speech, units])
def test_only_the_members_asked_for_are_needed(collate: Callable[[], Any], tmp_path: Path) -> None:
    whole = sample(1)
    (wanted,) = collate().members
    write_shards(
        tmp_path / "set",
        [{"__key__": "a", wanted: whole.members[wanted], "json": whole.meta, "other.bin": b"x"}],
        per_shard=1,
    )
    (read,) = read_folder(tmp_path / "set", collate().members)
    assert set(read.members) == {wanted}
    assert collate()([Item(read, "sqa")], 0).ids == ["s1"]


@pytest.mark.parametrize(
    ("collate", "changes", "kind", "message"),
    [
        (speech, {"members": {"question.flac": b"fLaC"}}, "decode", "question.flac cannot be decoded"),
        (speech, {"question_text": 7}, "schema", "question_text is a int, not text"),
        (units, {"members": {"answer.units": b"\1"}}, "decode", "answer.units cannot be decoded"),
        (known_units, {}, "decode", "answer.units cannot be decoded: Unit 1 is outside"),
        (units, {"answer_text": ["a"]}, "schema", "answer_text is a list, not text"),
        (speech, {"answer_text": ""}, "empty", "answer_text is empty; the end token would be all"),
        (strict, {"answer_text": None}, "empty", "answer_text is empty; the end token would be all"),
        (strict, {"question_text": ""}, "empty", "question_text is empty; CTC would learn"),
        (strict, {"question_text": " \n"}, "empty", "question_text is empty; CTC would learn"),
        (units, {"answer_text": " "}, "empty", "answer_text is empty; its units would stand for no words"),
    ],
)
@pytest.mark.parametrize("task", ["sqa", "asr"])
def test_what_cannot_be_used_is_named(
    collate: Callable[[], Any], changes: dict[str, Any], kind: str, message: str, task: str
) -> None:
    if task == "asr" and message.startswith("answer_text is empty; the end"):
        changes = {**changes, "question_text": None}  # with a transcript, no answer is needed
        assert collate().decode(Item(sample(1, answer_text=None), task)).answer == "ab"
    with pytest.raises(CorruptSampleError, match=f"sample k1: {message}") as caught:
        collate().decode(Item(sample(1, **changes), task))
    assert caught.value.kind == kind


def test_a_text_that_cannot_be_said_in_the_time_is_no_target() -> None:
    long_text = "x" * 150
    fits = sample(0, members={"question.flac": encode_flac(np.full(32_000, 0.1, np.float32))}, question_text=long_text)
    assert strict().decode(Item(fits, "sqa")).question == long_text
    longer = sample(1, members=fits.members, question_text=long_text + "x")
    with pytest.raises(CorruptSampleError, match=r"question_text has 151 characters, more than can be said in 2.0 s"):
        strict().decode(Item(longer, "sqa"))
    assert speech().decode(Item(longer, "sqa")).question == long_text + "x", "no loss reads it"
    spoken = sample(2, members={"answer.units": np.arange(10, dtype="<u2").tobytes()}, answer_text="y" * 151)
    with pytest.raises(CorruptSampleError, match=r"answer_text has 151 characters, more than can be said in 2.0 s"):
        units().decode(Item(spoken, "tts"))


def test_without_ctc_no_transcript_is_needed() -> None:
    batch = speech()([Item(sample(1, question_text=None), "sqa")], 0)
    assert batch.transcript_lengths_B.tolist() == [0]


def test_serving_and_blank_batches_need_no_texts() -> None:
    wave = np.full(1600, 0.1, np.float32)
    batch = strict().from_audio([wave], ["sqa"], [""], [""], ids=[""], weights=[1.0])
    assert batch.response_BR.tolist() == [[4]] and batch.transcript_lengths_B.tolist() == [0]
    assert strict().blank(3).weight_B.tolist() == [0.0]


@pytest.mark.parametrize(
    ("stage", "ctc", "needed"),
    [
        ("s2t", {}, True),
        ("s2t", {"weight": 0.0}, False),
        ("s2t", {"weight": 0.0, "align_steps": 5}, True),
        ("echo", {}, False),
    ],
)
def test_a_transcript_is_needed_where_ctc_is_trained(
    monkeypatch: pytest.MonkeyPatch, stage: str, ctc: dict[str, Any], needed: bool
) -> None:
    monkeypatch.setattr("echox.release.pretrained.mel_bins", lambda ref, *, random_init: 8)
    model = tiny.model_config()
    model = model.model_copy(update={"ctc": model.ctc.model_copy(update=ctc)})
    data = SimpleNamespace(history_tokens=0)
    recipe = SimpleNamespace(stage=stage, model=model, data=data)
    text = SimpleNamespace(tokenize=letters, prompt=PROMPT)
    assert build_speech_collate(recipe, text).needs_transcript is needed  # type: ignore[arg-type]


@pytest.mark.parametrize(("collate", "member"), [(speech, "question.flac"), (units, "answer.units")])
def test_a_missing_member_is_named(collate: Callable[[], Any], member: str) -> None:
    with pytest.raises(CorruptSampleError, match=f"sample k has no member {member}") as caught:
        collate().decode(Item(Sample("k", 0, {}, {}), "sqa"))
    assert caught.value.kind == "member"


def annotated() -> SpeechCollate:
    language = tiny.Words(lambda found: found + 100)
    return SpeechCollate(letters, PROMPT, LogMel(80), max_samples=16000, labels=language)


def test_units_of_recorded_answers_are_labels_where_they_are_wanted() -> None:
    collate = annotated()
    assert collate.members == {"question.flac", "answer.units"}
    silent = sample(1)
    del silent.members["answer.units"]  # type: ignore[attr-defined]
    batch = collate([Item(sample(2), "sqa"), Item(silent, "asr"), Item(sample(0), "sqa")], 0)
    assert batch.labels_BM is not None and batch.labels_mask_BM is not None
    assert batch.labels_BM.tolist() == [[100, 101, 102], [0, 0, 0], [100, 0, 0]]
    assert batch.labels_mask_BM.sum(1).tolist() == [3, 0, 1]
    assert speech()([Item(sample(2), "sqa")], 0).labels_BM is None
    blank = collate.blank(0)
    assert blank.labels_mask_BM is not None and not blank.labels_mask_BM.any()


def test_units_that_cannot_be_labels_are_named() -> None:
    silent = sample(1)
    del silent.members["answer.units"]  # type: ignore[attr-defined]
    unknown = SpeechCollate(letters, PROMPT, LogMel(80), max_samples=16000, labels=tiny.Words(known=1))
    for collate, given, kind in ((annotated(), silent, "member"), (unknown, sample(1), "decode")):
        with pytest.raises(CorruptSampleError, match="answer.units") as caught:
            collate.decode(Item(given, "sqa"))
        assert caught.value.kind == kind
