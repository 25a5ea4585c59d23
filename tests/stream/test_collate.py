"""Samples to batches: padding, masks, templates, and what cannot be used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from echox.audio.features import LogMel
from echox.audio.io import encode_flac
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


def units() -> UnitCollate:
    return UnitCollate(letters, tiny.Words(lambda found: found + 100))


def known_units() -> UnitCollate:
    return UnitCollate(letters, tiny.Words(known=1))


def test_speech_is_padded_and_masked() -> None:
    batch = speech()([Item(sample(0), "sqa"), Item(sample(4), "asr", 0.0)], 7)
    assert batch.step == 7 and batch.ids == ["s0", "s4"] and batch.weight_B.tolist() == [1.0, 0.0]
    assert batch.after_BQ.tolist() == [[2, 3, 0], [9, 2, 3]]
    assert batch.after_mask_BQ.tolist() == [[True, True, False], [True] * 3]
    assert batch.response_BR.tolist() == [[99, 4, 0], [99, 99, 4]]
    assert batch.response_mask_BR.tolist() == [[True, True, False], [True] * 3]
    assert batch.transcript_lengths_B.tolist() == [2, 2]
    assert batch.mel_BMT.shape[2] >= int(batch.frames_B.max())


def test_decoding_apart_and_joining_is_the_same_as_at_once() -> None:
    items = [Item(sample(number), "sqa") for number in (3, 0, 2)]
    at_once, collate = speech()(items, 1), speech()
    joined = collate.join([collate.decode(item) for item in items], 1)
    assert joined.ids == at_once.ids and torch.equal(joined.mel_BMT, at_once.mel_BMT)


def test_audio_longer_than_the_limit_is_cut_and_counted() -> None:
    collate = speech()
    wave = np.ones(40000, dtype=np.float32) * 0.1
    batch = collate.from_audio([wave], ["sqa"], [""], [""], ids=["a"], weights=[1.0])
    assert collate.cut == 1
    assert int(batch.frames_B[0]) < 40000 / 160


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
    whole = Sample("k", 0, {"question.encoded.npy": pack(torch.ones(4, 6))}, {})
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
    ],
)
def test_what_cannot_be_used_is_named(
    collate: Callable[[], Any], changes: dict[str, Any], kind: str, message: str
) -> None:
    with pytest.raises(CorruptSampleError, match=f"sample k1: {message}") as caught:
        collate().decode(Item(sample(1, **changes), "sqa"))
    assert caught.value.kind == kind


@pytest.mark.parametrize(("collate", "member"), [(speech, "question.flac"), (units, "answer.units")])
def test_a_missing_member_is_named(collate: Callable[[], Any], member: str) -> None:
    with pytest.raises(CorruptSampleError, match=f"sample k has no member {member}") as caught:
        collate().decode(Item(Sample("k", 0, {}, {}), "sqa"))
    assert caught.value.kind == "member"
