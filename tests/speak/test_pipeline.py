"""Spoken answers of a loaded Echo run against plain PyTorch: one clip, one segment, one whole forward a token."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from echox.builders.unit_sets import LANGUAGE
from echox.errors import CheckpointError, DataError
from echox.speak.pipeline import SpeechToSpeech
from echox.units.language import UnitLanguage
from tests.builders import tiny_run
from tests.speak.echo_run import MAX_NEW, clips, load_with_ends, write_echo_run
from tests.stages import by_hand


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An Echo run of random weights."""
    return write_echo_run(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def model(run: Path) -> SpeechToSpeech:
    """The run, loaded."""
    return load_with_ends(run)


def answers_by_hand(model: SpeechToSpeech) -> tuple[list[by_hand.Said], list[list[list[int]]]]:
    """What each clip is answered, and the unit words of each of its segments."""
    stage = model.stage
    heard, spoken = [], []
    with torch.no_grad():
        for clip in clips():
            prompt = by_hand.row_of_prompt(stage.s2t, model._batch([clip], "sqa"), 0)
            tokens = by_hand.own_answer(stage.s2t, prompt, model._text.prompt.end, MAX_NEW)
            said = by_hand.said(stage, tokens, by_hand.states(stage.s2t, prompt, tokens)[:-1])
            adapted = stage.denoising.outer(F.relu(stage.denoising.inner(said.hidden_Rh)))
            words = []
            for first, last in said.segments:
                text = by_hand.template(stage, stage.s2t.embed, adapted[first:last])
                words.append(by_hand.spoken_words(stage.echo, text, limit(model, last - first)))
            heard.append(said)
            spoken.append(words)
    return heard, spoken


def limit(model: SpeechToSpeech, tokens: int) -> int:
    return int(tokens * float(model.recipe.model.echo.units_per_token)) + 32


def test_an_answer_is_that_of_each_segment_by_hand(model: SpeechToSpeech) -> None:
    heard, spoken = answers_by_hand(model)
    answers = model.answer(clips())
    language = model._text.language
    assert language is not None
    for answer, said, words in zip(answers, heard, spoken, strict=True):
        assert answer.text == " ".join("." if token == tiny_run.STOP else f"w{token}" for token in said.tokens)
        assert answer.units.dtype == np.uint16
        assert answer.units.tolist() == [unit for segment in words for unit in language.decode(segment)]

    lengths = [len(said.tokens) for said in heard]
    assert min(lengths) < MAX_NEW == max(lengths), "some answers end early in the batch, others at the limit"
    assert sum(len(said.segments) > 1 for said in heard) >= 2, "the trigger must cut"
    assert any(len(set(map(tuple, words))) > 1 for words in spoken), "alike segments would hide their order"
    bound = [len(words[n]) == limit(model, last - first)
             for said, words in zip(heard, spoken, strict=True)
             for n, (first, last) in enumerate(said.segments)]  # fmt: skip
    assert any(bound) and not all(bound), "the limit of words must bind, and not everywhere"


def taught_by_hand(model: SpeechToSpeech, tokens: list[int], segments: list[tuple[int, int]]) -> list[int]:
    """Units that the teacher makes of text embeddings, a segment at a time."""
    stage, language = model.stage, model._text.language
    assert language is not None
    units: list[int] = []
    with torch.no_grad():
        for first, last in segments:
            embedded = stage.s2t.embed(torch.tensor(tokens[first:last], dtype=torch.long))
            text = by_hand.template(stage, stage.s2t.embed, embedded)
            words = by_hand.spoken_words(stage.teacher.decoder, text, limit(model, last - first))
            units += language.decode(words)
    return units


def test_the_cascade_is_the_teacher_on_the_same_tokens_in_the_same_segments(model: SpeechToSpeech) -> None:
    heard, _ = answers_by_hand(model)
    answers = model.answer(clips(), cascade=True)
    taught = [taught_by_hand(model, said.tokens, said.segments) for said in heard]
    assert [answer.cascade.tolist() for answer in answers if answer.cascade is not None] == taught
    plain = model.answer(clips())
    assert all(answer.cascade is None for answer in plain)
    assert all(a.text == b.text and np.array_equal(a.units, b.units) for a, b in zip(plain, answers, strict=True))
    assert sum(units != answer.units.tolist() for units, answer in zip(taught, answers, strict=True)) >= 3
    whole = [taught_by_hand(model, said.tokens, [(0, len(said.tokens))]) for said in heard]
    assert whole != taught, "one segment would hide where the text is cut"


def test_a_text_is_said_by_the_teacher_as_one_segment(model: SpeechToSpeech) -> None:
    texts = ["w5 w6 w7 w8 w9 w10 w11", "w12 .", "", "w3"]
    tokens = [model._collate.tokenize(text) for text in texts]
    assert len({len(row) for row in tokens}) == 4, "uneven texts are padded"
    said = model.say(texts)
    assert [units.tolist() for units in said] == [taught_by_hand(model, row, [(0, len(row))][: len(row)])
                                                   for row in tokens]  # fmt: skip
    assert said[0].dtype == np.uint16 and said[2].tolist() == []
    assert np.array_equal(model.say(texts[1:2])[0], said[1])


def test_a_clip_is_answered_as_if_it_were_alone(model: SpeechToSpeech) -> None:
    together = model.answer(clips())
    assert sum(bool(answer.text) for answer in together) >= 3
    for clip, answer in zip(clips(), together, strict=True):
        if not answer.text:
            continue
        (alone,) = model.answer([clip])
        assert alone.text == answer.text and np.array_equal(alone.units, answer.units)


def test_what_is_loaded_is_what_was_trained(run: Path, model: SpeechToSpeech) -> None:
    from safetensors.torch import load_file

    stored = load_file(next(run.rglob("*.safetensors")))
    have = {**dict(model.stage.named_parameters()), **dict(model.stage.named_buffers())}
    assert any(name.startswith("echo.") for name in stored) and any("lora_" in name for name in stored)
    for name, value in stored.items():
        assert torch.equal(have[name], value), name
    assert not any(part.training for part in model.stage.modules())
    assert model.max_audio_s == 30.0
    assert model.units.place == "run tiny-echo" and model.units.unit_set is None


def test_questions_and_transcripts_have_their_own_prompt(model: SpeechToSpeech) -> None:
    asked, transcribed = model._batch(clips(), "sqa"), model._batch(clips(), "asr")
    assert asked.after_BQ.shape[1] < transcribed.after_BQ.shape[1]
    assert asked.frames_on_host_B is not None, "the batch did not go to the model's device"
    answers = model.answer(clips())
    assert model.write(clips()) == [answer.text for answer in answers]
    assert model.write(clips(), "asr") != model.write(clips())
    own = model.generate(clips())
    assert own.tokens_BR.shape[1] == MAX_NEW


def test_text_is_decoded_without_special_tokens_and_margins(
    model: SpeechToSpeech, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    class Tokenizer:
        def decode(self, tokens: list[int], **options: bool) -> str:
            asked.append((tokens, options))
            return f"  {len(tokens)} words "

    text = dataclasses.replace(model._text, tokenizer=Tokenizer())
    own = model.generate(clips())
    monkeypatch.setattr(model, "_text", text)
    assert model.write(clips()) == [f"{int(mask.sum())} words" for mask in own.mask_BR]
    assert [tokens for tokens, _ in asked] == [t[m].tolist() for t, m in zip(own.tokens_BR, own.mask_BR, strict=True)]
    assert all(options == {"skip_special_tokens": True} for _, options in asked)


def test_a_run_speaks_in_the_unit_language_that_it_keeps(run: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from echox.config.schema import Recipe
    from echox.engine.checkpoint.manifest import MANIFEST

    manifest = json.loads(next(run.rglob(MANIFEST)).read_text())
    tensors = load_file(next(run.rglob("*.safetensors")))
    recipe = Recipe.model_validate(manifest["recipe"])
    own = UnitLanguage.load(run.parent / "language.json")
    random = np.random.default_rng(8)
    other = UnitLanguage.fit([random.integers(0, tiny_run.N_UNITS, 90) for _ in range(20)], tiny_run.N_UNITS,
                             vocab_size=own.size)  # fmt: skip
    assert other.sha256 != own.sha256
    kept = tiny_run.write_run(tmp_path / "kept", recipe, tensors, other)
    loaded = SpeechToSpeech.load(kept, device="cpu")
    assert loaded._text.language is not None and loaded._text.language.sha256 == other.sha256
    (kept / LANGUAGE).unlink()
    with pytest.raises(CheckpointError, match="is not the one that"):
        SpeechToSpeech.load(kept, device="cpu")
    own.save(kept / LANGUAGE)
    with pytest.raises(CheckpointError, match="is not the one that"):
        SpeechToSpeech.load(kept, device="cpu")


def test_without_a_unit_language_nothing_is_spoken(model: SpeechToSpeech, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "_text", dataclasses.replace(model._text, language=None))
    assert model.units.unit_set is None
    with pytest.raises(CheckpointError, match="does not speak"):
        model.answer(clips()[:1])


def test_an_s2t_run_writes_and_does_not_speak_and_a_t2c_run_does_not_hear(run: Path) -> None:
    model = SpeechToSpeech.load(run.parent / "s2t")
    assert model.max_new == 64
    assert model._device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    from safetensors.torch import load_file

    have = dict(model.stage.named_parameters())
    for name, value in load_file(next((run.parent / "s2t").rglob("*.safetensors"))).items():
        if name in have:
            assert torch.equal(have[name], value), name
    assert len(model.write(clips()[:2])) == 2
    with pytest.raises(CheckpointError, match="does not speak"):
        model.answer(clips()[:1])
    with pytest.raises(CheckpointError, match="does not speak"):
        model.say(["w1"])
    with pytest.raises(CheckpointError, match="hears no speech"):
        SpeechToSpeech.load(run.parent / "t2c")


def test_an_answer_without_a_word_is_silent(model: SpeechToSpeech, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = model._batch(clips()[:1], "sqa")
    first = by_hand.own_answer(model.stage.s2t, by_hand.row_of_prompt(model.stage.s2t, batch, 0), -1, 1)[0]
    text = dataclasses.replace(model._text, prompt=dataclasses.replace(model._text.prompt, end=first))
    monkeypatch.setattr(model, "_text", text)
    (answer,) = model.answer(clips()[:1])
    assert answer.text == "" and answer.units.tolist() == []


DIALOGUE = [{"role": "user", "text": " w20 w21 "}, {"role": "assistant", "text": " w22 "}]


def test_an_answer_hears_what_was_said_before(model: SpeechToSpeech) -> None:
    turns = [DIALOGUE, [], DIALOGUE[:1], [{"role": "system", "text": " w30"}], DIALOGUE * 2]
    batch = model._batch(clips(), "sqa", turns)
    assert batch.before_mask_BP is not None and model.reads_history
    decoded = [model._text.tokenizer.decode(row[mask])
               for row, mask in zip(batch.before_BP, batch.before_mask_BP, strict=True)]  # fmt: skip
    # Between words without a space this tokenizer knows none.
    assert decoded == ["w5 w6 w20 w21 w7 w8 w22 w0 w6", "w5 w6", "w5 w6 w20 w21 w7 w0 w6", "w5 w6 w30",
                       "w5 w6 w20 w21 w7 w8 w22 w0 w6 w20 w21 w7 w8 w22 w0 w6"]  # fmt: skip
    answers = model.answer(clips(), turns=turns)
    plain = model.answer(clips())
    assert answers[1].text == plain[1].text and np.array_equal(answers[1].units, plain[1].units)
    assert [answer.text for answer in answers] != [answer.text for answer in plain]
    assert model.write(clips(), turns=turns) == [answer.text for answer in answers]
    (alone,) = model.answer(clips()[:1], turns=turns[:1])
    assert alone.text == answers[0].text and np.array_equal(alone.units, answers[0].units)
    assert model.write(clips(), "asr", turns=turns) == model.write(clips(), "asr"), "a transcript has no dialogue"
    with pytest.raises(DataError, match="turns is a str, not a list"):
        model.answer(clips()[:1], turns=["hello"])  # type: ignore[list-item]


def test_a_run_without_history_answers_as_it_was_trained(
    model: SpeechToSpeech, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model._collate, "history", None)
    assert not model.reads_history
    assert model.write(clips()[:1], turns=[DIALOGUE]) == model.write(clips()[:1])


def test_with_states_at_the_tokens_an_answer_is_that_of_each_segment_by_hand(
    model: SpeechToSpeech, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = model.answer(clips())
    monkeypatch.setattr(model.stage, "config", model.stage.config.model_copy(update={"state": "own"}))  # type: ignore[union-attr]
    states = by_hand.states

    def one_later(*given: Any) -> Any:
        # `answers_by_hand` leaves out the last state, and is to leave out the first one.
        found = states(*given)
        return torch.cat([found[1:], found[:1]])

    def answered(*given: Any) -> list[int]:
        with monkeypatch.context() as patch:
            patch.setattr(by_hand, "states", states)
            return own_answer(*given)

    own_answer = by_hand.own_answer
    monkeypatch.setattr(by_hand, "own_answer", answered)
    monkeypatch.setattr(by_hand, "states", one_later)
    heard, spoken = answers_by_hand(model)
    language = model._text.language
    assert language is not None
    answers = model.answer(clips())
    for answer, words in zip(answers, spoken, strict=True):
        assert answer.units.tolist() == [unit for segment in words for unit in language.decode(segment)]
    assert [answer.text for answer in answers] == [answer.text for answer in usual]
    assert any(not np.array_equal(a.units, b.units) for a, b in zip(answers, usual, strict=True))
    assert max(len(said.tokens) for said in heard) == MAX_NEW, "the last token's state is one more forward"
