"""Turns before a question: what is one, which fit a budget, and what of them a batch holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from echox.audio.features import LogMel
from echox.audio.io import encode_flac
from echox.errors import CorruptSampleError, RecipeError
from echox.stream.collate import Item, PromptTokens, SpeechCollate
from echox.stream.dialogue import History, RenderedTurns, Turn, heard_turns, newest, parse_turns
from echox.stream.storage.store import Sample

PROMPT = PromptTokens(before=[1], after=[2, 3], after_asr=[9, 2, 3], end=4)
TURNS = [{"role": "user", "text": "aaa", "audio": "turn-00.flac"}, {"role": "assistant", "text": "bb"}]


def render(turns: Sequence[Turn]) -> RenderedTurns:
    """A letter for the role before each text, a gap for a clip, `?` before the question and `!` after it."""
    if any(turn.text == "refused" for turn in turns):
        raise RecipeError("the template says no")
    pieces = [""]
    for turn in turns:
        pieces[-1] += turn.role[0].upper() + ("" if turn.clip is not None else turn.text)
        if turn.clip is not None:
            pieces.append("")
    pieces[-1] += "?"
    return RenderedTurns(pieces, "!")


def letters(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def collate(tokens: int = 100, *, spoken: bool = False) -> SpeechCollate:
    return SpeechCollate(letters, PROMPT, LogMel(8), 16000, history=History(render, letters, tokens, spoken))


def wave(seconds: float, level: float = 0.1) -> np.ndarray:
    return np.full(int(16000 * seconds), level, np.float32)


def sample(turns: Any = None, **members: bytes) -> Sample:
    found = {"question.flac": encode_flac(wave(0.3))}
    found |= {name.replace("_", "-") + ".flac": data for name, data in members.items()}
    return Sample("k", 0, found, {"id": "s", "question_text": "q", "answer_text": "a", "turns": turns})


def said(values_BP: torch.Tensor, mask_BP: torch.Tensor) -> list[str]:
    return ["".join(map(chr, row[mask].tolist())) for row, mask in zip(values_BP, mask_BP, strict=True)]


def test_turns_stand_before_the_question_of_their_row_alone() -> None:
    items = [Item(sample(TURNS), "sqa"), Item(sample([]), "sqa"), Item(sample(TURNS), "asr"), Item(sample(), "sqa")]
    batch = collate()(items, 0)
    assert batch.before_mask_BP is not None and batch.history_BK is None
    assert said(batch.before_BP, batch.before_mask_BP) == ["UaaaAbb?", "\1", "\1", "\1"]
    assert said(batch.after_BQ, batch.after_mask_BQ) == ["!", "\2\3", "\11\2\3", "\2\3"]
    assert sum(batch.before_sizes) == batch.before_BP.shape[1] and len(batch.frames_B) == 4


def test_without_history_turns_are_not_read() -> None:
    plain = SpeechCollate(letters, PROMPT, LogMel(8), 16000)
    batch = plain([Item(sample("no list"), "sqa"), Item(sample(TURNS), "asr")], 0)
    assert batch.before_BP.tolist() == [[1], [1]] and batch.before_mask_BP is not None
    assert bool(batch.before_mask_BP.all()) and batch.before_sizes == (1,)
    assert plain.members == {"question.flac"}


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ("hello", "turns is a str, not a list"),
        (3, "turns is a int, not a list"),
        (["hello"], r"turns\[0\] is a str, not an object"),
        ([TURNS[0], {"role": "gpt", "text": "x"}], r"turns\[1\].role is 'gpt', not system, user or assistant"),
        ([{"role": "user"}], r"turns\[0\].text is a NoneType, not text"),
        ([{"role": "user", "text": 5}], r"turns\[0\].text is a int, not text"),
        ([{"role": ["user"], "text": "x"}], r"turns\[0\].role is \['user'\]"),
        ([{"role": "user", "text": "x", "audio": 5}], r"turns\[0\].audio is a int, not a name"),
        ([{"role": "user", "text": "refused"}], "the template says no"),
    ],
)
def test_what_is_no_dialogue_is_quarantined(turns: Any, message: str) -> None:
    with pytest.raises(CorruptSampleError, match=f"sample k: {message}") as caught:
        collate().decode(Item(sample(turns), "sqa"))
    assert caught.value.kind == "schema"
    assert collate().decode(Item(sample(turns), "asr")).prompt is None, "a transcript has no dialogue before it"


def turns_of(letters: str) -> list[Turn]:
    """`u`, `a` and `s` as turns of one token, capitals as turns of three."""
    names = {"u": "user", "a": "assistant", "s": "system"}
    return [Turn(names[letter.lower()], "xxx" if letter.isupper() else "x") for letter in letters]


@pytest.mark.parametrize(
    ("turns", "budget", "kept"),
    [
        ("uaua", 4, "uaua"),
        ("uaua", 3, "ua"),  # the answer to a dropped turn goes too
        ("uaua", 2, "ua"),
        ("uaua", 1, ""),
        ("uaUa", 3, ""),
        ("uaUa", 4, "Ua"),
        ("Uaua", 3, "ua"),
        ("auau", 4, "auau"),  # a greeting stays, where nothing was dropped
        ("suaua", 3, "sua"),
        ("suaua", 1, "s"),
        ("Suaua", 2, "ua"),  # a system turn that does not fit gives way
        ("Suaua", 5, "Sua"),
        ("sa", 1, "s"),
        ("uasua", 3, "sua"),
        ("uasua", 2, "ua"),
        ("", 5, ""),
    ],
)
def test_the_newest_turns_stay_whole(turns: str, budget: int, kept: str) -> None:
    found = newest(turns_of(turns), budget, lambda turn: len(turn.text))
    assert "".join(t.role[0].upper() if len(t.text) == 3 else t.role[0] for t in found) == kept


def test_dropped_turns_are_counted() -> None:
    rows = [collate(tokens).decode(Item(sample(TURNS), "sqa")) for tokens in (5, 4, 1)]
    assert [row.turns_dropped for row in rows] == [0, 2, 2]
    assert [row.prompt is None for row in rows] == [False, True, True]


def test_spoken_turns_are_clips_behind_the_questions() -> None:
    spoken = collate(spoken=True)
    assert {"turn-00.flac", "turn-02.flac", "question.flac"} <= spoken.members
    two = [TURNS[0], TURNS[1], {"role": "user", "text": "c"}, TURNS[1],
           {"role": "user", "text": "d", "audio": "turn-04.flac"}]  # fmt: skip
    loud, quiet = encode_flac(wave(0.2, 0.4)), encode_flac(wave(0.5, 0.01))
    first = sample(two, turn_00=loud, turn_04=quiet)
    batch = spoken([Item(sample(), "sqa"), Item(first, "sqa"), Item(sample(TURNS, turn_00=quiet), "sqa")], 0)
    assert batch.history_BK is not None and batch.history_BK.tolist() == [[-1, -1], [0, 1], [2, -1]]
    assert batch.before_mask_BP is not None
    pieces = [said(*part) for part in zip(batch.before_BP.split(batch.before_sizes, 1),
                                          batch.before_mask_BP.split(batch.before_sizes, 1), strict=True)]  # fmt: skip
    assert [list(row) for row in zip(*pieces, strict=True)] == [
        ["\1", "", ""],
        ["U", "AbbUcAbbU", "?"],
        ["U", "Abb?", ""],
    ]
    alone = [LogMel(8)(torch.from_numpy(clip)[None], torch.tensor([len(clip)]))
             for clip in (*[wave(0.3)] * 3, wave(0.2, 0.4), wave(0.5, 0.01), wave(0.5, 0.01))]  # fmt: skip
    assert batch.frames_B.tolist() == [int(frames[0]) for _, frames in alone]
    for row, (mel, frames) in enumerate(alone):
        torch.testing.assert_close(
            batch.mel_BMT[row, :, : int(frames[0])], mel[0, :, : int(frames[0])], atol=2e-2, rtol=0
        )
    assert batch.stats()["audio_s"] == pytest.approx(sum(batch.frames_B.tolist()) / 100)
    read = collate()([Item(first, "sqa")], 0)
    assert read.history_BK is None and len(read.frames_B) == 1


def test_a_spoken_turn_counts_25_tokens_a_second_of_what_is_heard() -> None:
    for seconds, tokens in ((0.4, 10), (0.5, 13), (3.0, 25)):
        heard = sample(TURNS[:1], turn_00=encode_flac(wave(seconds)))
        assert collate(tokens, spoken=True).decode(Item(heard, "sqa")).turns_dropped == 0
        row = collate(tokens - 1, spoken=True).decode(Item(heard, "sqa"))
        assert row.turns_dropped == 1
        clips = [wave(0.1)]
        for room in (tokens, tokens - 1):
            batch = collate(room, spoken=True).from_audio(
                clips, ["sqa"], [""], [""], ids=["a"], weights=[1.0], turns=[[Turn("user", "x", clip=wave(seconds))]]
            )
            assert len(batch.frames_B) == 1 + (room == tokens)
    cut = collate(25, spoken=True).decode(Item(sample(TURNS[:1], turn_00=encode_flac(wave(3.0))), "sqa"))
    assert cut.prompt is not None and len(cut.prompt.clips[0]) == 16000


def test_a_sound_that_is_missing_or_damaged_is_named() -> None:
    for members, kind in (({}, "member"), ({"turn_00": b"fLaC"}, "decode")):
        with pytest.raises(CorruptSampleError, match="turn-00.flac") as caught:
            collate(spoken=True).decode(Item(sample(TURNS, **members), "sqa"))
        assert caught.value.kind == kind


def test_serving_asks_with_the_turns_that_it_is_given() -> None:
    waves = [wave(0.1), wave(0.2)]
    turns = [[], [Turn("user", "aaa", clip=wave(0.4))]]
    more: dict[str, Any] = {"ids": ["", ""], "weights": [1.0, 1.0], "turns": turns}
    read = collate().from_audio(waves, ["sqa"] * 2, [""] * 2, [""] * 2, **more)
    heard = collate(spoken=True).from_audio(waves, ["sqa"] * 2, [""] * 2, [""] * 2, **more)
    assert read.before_mask_BP is not None and heard.before_mask_BP is not None
    assert said(read.before_BP, read.before_mask_BP) == ["\1", "Uaaa?"] and len(read.frames_B) == 2
    assert said(heard.before_BP, heard.before_mask_BP) == ["\1", "U?"] and len(heard.frames_B) == 3
    asr = collate().from_audio(waves, ["asr"] * 2, [""] * 2, [""] * 2, **more)
    assert asr.before_BP.tolist() == [[1], [1]]


def test_turns_are_parsed_once() -> None:
    assert parse_turns(None) == parse_turns([]) == []
    first, second = parse_turns(TURNS)
    assert (first.role, first.text, first.audio) == ("user", "aaa", "turn-00.flac") and second.audio is None
    assert parse_turns([{"role": "assistant", "text": "", "audio": "x"}])[0].audio is None, "an answer is read"
    assert parse_turns([first]) == [first]


def test_evaluation_hears_what_the_sample_was_read_with() -> None:
    (heard, answer) = heard_turns(sample(TURNS, turn_00=encode_flac(wave(0.2))))
    assert heard.clip is not None and len(heard.clip) == 3200 and answer.clip is None
    assert heard_turns(sample(TURNS))[0].clip is None
