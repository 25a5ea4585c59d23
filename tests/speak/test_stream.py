"""Streamed answers: text, units and samples are those of the whole; cancelling, failures, several at a time."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch

from echox.errors import DataError
from echox.models.sampling import Sampling
from echox.speak.events import Audio, Done, Event, Failed, SegmentCut, TextToken, Units
from echox.speak.incremental_text import IncrementalText
from echox.speak.pipeline import SpeechToSpeech
from echox.speak.sampling import SeededSampling
from echox.speak.unit_mel import UnitMel, UnitMelConfig
from echox.speak.vocoder import UnitMelVocoder
from tests.builders import tiny_run
from tests.speak.echo_run import MAX_NEW, clips, load_with_ends, write_echo_run
from tests.speak.voices import unit_mel

DIALOGUE = [{"role": "user", "text": " w20 w21 "}, {"role": "assistant", "text": " w22 "}]
WARM = SeededSampling(temperature=1.3, top_p=0.9, top_k=20, seed=5)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> SpeechToSpeech:
    return load_with_ends(write_echo_run(tmp_path_factory.mktemp("runs")))


@pytest.fixture(scope="module")
def vocoder() -> UnitMelVocoder:
    return unit_mel(tiny_run.N_UNITS)


@pytest.fixture(scope="module")
def long(model: SpeechToSpeech) -> Any:
    """The question with the longest answer."""
    answers = model.answer(clips())
    assert max(len(answer.text.split()) for answer in answers) == MAX_NEW
    return max(zip(clips(), answers, strict=True), key=lambda each: len(each[1].text.split()))[0]


def streamed(model: SpeechToSpeech, clip: Any, **options: Any) -> list[Event]:
    return list(model.stream(clip, max_new=MAX_NEW, **options))


def units_of(events: Iterable[Event]) -> list[int]:
    return [unit for event in events if isinstance(event, Units) for unit in event.units.tolist()]


def text_of(events: Iterable[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, TextToken))


def done_of(events: list[Event]) -> Done:
    assert isinstance(events[-1], Done) and not any(isinstance(event, Done) for event in events[:-1])
    return events[-1]


@pytest.mark.parametrize("state", ["predicting", "own"])
@pytest.mark.parametrize("mode", ["trigger", "fixed", "none"])
def test_text_units_and_samples_are_those_of_the_whole_answer(
    model: SpeechToSpeech, vocoder: UnitMelVocoder, monkeypatch: pytest.MonkeyPatch, state: str, mode: str
) -> None:
    config = model.stage.config  # type: ignore[union-attr]
    cut = config.segmentation.model_copy(update={"mode": mode, "fixed_tokens": 3})
    monkeypatch.setattr(model.stage, "config", config.model_copy(update={"state": state, "segmentation": cut}))
    answers = model.answer(clips())
    several = 0
    for clip, answer in zip(clips(), answers, strict=True):
        events = streamed(model, clip, vocoder=vocoder)
        done = done_of(events)
        assert done.text == text_of(events) == answer.text
        assert units_of(events) == answer.units.tolist()
        samples = [event.samples for event in events if isinstance(event, Audio)]
        assert np.array_equal(np.concatenate([np.zeros(0, np.float32), *samples]), vocoder([answer.units])[0])
        assert tuple(event for event in events if isinstance(event, Failed)) == answer.failed
        cuts = [event for event in events if isinstance(event, SegmentCut)]
        assert [event.segment for event in cuts] == list(range(done.segments))
        assert [0, *(event.last for event in cuts)] == [*(event.first for event in cuts), done.tokens]
        assert " ".join(event.text for event in cuts) == answer.text
        assert done.why == ("limit" if done.tokens == MAX_NEW else "end")
        several += done.segments > 1
    assert several >= 2 or mode == "none"


def test_speech_begins_before_the_text_has_ended(model: SpeechToSpeech, vocoder: UnitMelVocoder) -> None:
    early = 0
    for clip in clips():
        kinds = [type(event) for event in streamed(model, clip, vocoder=vocoder)]
        if Units in kinds and TextToken in kinds[kinds.index(Units) :]:
            early += 1
    assert early >= 2


def test_answers_in_progress_do_not_change_each_other(model: SpeechToSpeech, vocoder: UnitMelVocoder) -> None:
    engine, options = model.engine(), {"vocoder": vocoder, "max_new": MAX_NEW}
    opened, found = [], []
    for clip in clips():
        opened.append(model.begin(engine, clip, sampling=WARM, **options))  # type: ignore[arg-type]
        found.append([])  # type: ignore[var-annotated]
        engine.turn()
        for answer, events in zip(opened, found, strict=True):
            events += answer.take()
    while len(engine):
        engine.turn()
    for clip, answer, events in zip(clips(), opened, found, strict=True):
        events += answer.take()
        alone = streamed(model, clip, vocoder=vocoder, sampling=WARM)
        assert done_of(events) == done_of(alone)
        assert text_of(events) == text_of(alone) and units_of(events) == units_of(alone)
    assert len(engine._speech) == 0 and engine._speech._open._step is None
    assert not engine._speech._most and not engine._speech._said


def test_a_sampled_answer_follows_its_seed_streamed_or_not(
    model: SpeechToSpeech, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = set()
    for seed in range(4):
        sampling = dataclasses.replace(WARM, seed=seed)
        answers = model.answer(clips()[:2], sampling=sampling)
        for clip, answer in zip(clips(), answers, strict=False):
            events = streamed(model, clip, sampling=sampling)
            assert text_of(events) == answer.text and units_of(events) == answer.units.tolist()
        texts.add(answers[1].text)
    assert len(texts) >= 3


def test_every_token_has_a_random_number_of_its_own_that_follows_the_seed() -> None:
    def drawn(seed: int, most: int = 50) -> list[list[int]]:
        pick = SeededSampling(temperature=1.0, seed=seed).choose(most)
        return [pick(torch.zeros(2, 10), place).tolist() for place in range(50)]

    first = drawn(1)
    assert all(one == other for one, other in first) and len({one for one, _ in first}) > 5
    assert drawn(1) == first == drawn(1, most=90) and drawn(2) != first


def test_history_is_heard(model: SpeechToSpeech, long: Any) -> None:
    (answer,) = model.answer([long], turns=[DIALOGUE])
    events = streamed(model, long, history=DIALOGUE)
    assert text_of(events) == answer.text and units_of(events) == answer.units.tolist()
    assert answer.text != model.answer([long])[0].text
    with pytest.raises(DataError, match="turns"):
        next(iter(model.stream(long, "hello")))  # type: ignore[arg-type]


class Watched(UnitMelVocoder):
    """Counts its streams that are alive."""

    def __init__(self, vocoder: UnitMelVocoder) -> None:
        super().__init__(vocoder.model)
        self.alive: list[weakref.ref[Any]] = []

    def stream(self) -> Any:
        made = super().stream()
        self.alive.append(weakref.ref(made))
        return made


@pytest.mark.parametrize("kind", [TextToken, SegmentCut, Units])
def test_an_answer_that_is_closed_anywhere_leaves_nothing_behind(
    model: SpeechToSpeech, vocoder: UnitMelVocoder, monkeypatch: pytest.MonkeyPatch, kind: Any, long: Any
) -> None:
    engine, watched = model.engine(), Watched(vocoder)
    monkeypatch.setattr(model, "engine", lambda: engine)
    monkeypatch.setattr("echox.speak.engine.WORDS_A_TURN", 1)
    stream = model.stream(long, vocoder=watched, max_new=MAX_NEW)
    assert any(isinstance(event, kind) for event in stream)
    assert len(engine) == 1 and bool(len(engine._speech)) == (kind is not TextToken)
    stream.close()  # type: ignore[attr-defined]
    gc.collect()
    assert len(engine) == 0 and len(engine._speech) == 0 and engine._speech._open._step is None
    assert not engine._speech._most and watched.alive[0]() is None
    assert text_of(model.stream(long, max_new=MAX_NEW)) == model.answer([long])[0].text


def test_a_flag_ends_an_answer_before_the_next_step(model: SpeechToSpeech, long: Any) -> None:
    asked = iter([False, False, False, False, True])  # after the speech encoder, and before each turn
    events = streamed(model, long, cancelled=lambda: next(asked))
    done = done_of(events)
    assert done.why == "cancelled" and done.tokens == 3
    assert done.text == text_of(events) and model.answer([long])[0].text.startswith(done.text)


def test_a_question_that_is_cancelled_while_it_is_encoded_goes_no_further(
    model: SpeechToSpeech, monkeypatch: pytest.MonkeyPatch, long: Any
) -> None:
    front_end = model.stage.s2t.front_end
    encoded, aligned, cancelled = [], [], [False]
    forward, align = front_end.encoder.forward, front_end.alignment.forward

    def interrupted(*args: Any) -> Any:
        found = forward(*args)
        encoded.append(found)
        cancelled[0] = True
        return found

    monkeypatch.setattr(front_end.encoder, "forward", interrupted)
    monkeypatch.setattr(front_end.alignment, "forward", lambda *args: aligned.append(args) or align(*args))
    engine = model.engine()
    answer = model.begin(engine, long, cancelled=lambda: cancelled[0])
    assert answer.finished and len(engine) == 0
    assert list(answer.take()) == [Done("", "cancelled", 0, 0, 0)]
    assert [type(event) for event in streamed(model, long, cancelled=lambda: cancelled[0])] == [Done]
    assert len(encoded) == 2 and not aligned, "nothing follows the encoder"
    assert text_of(streamed(model, long)) == model.answer([long])[0].text
    assert aligned


def test_one_that_is_cancelled_does_not_disturb_the_others(model: SpeechToSpeech, long: Any) -> None:
    engine = model.engine()
    first, second = (model.begin(engine, clip, max_new=MAX_NEW) for clip in (long, long[:-500]))
    for _ in range(6):
        engine.turn()
    first.cancelled = True
    while len(engine):
        engine.turn()
    assert done_of(list(first.take())).why == "cancelled"
    said = units_of(second.take())
    assert said == units_of(streamed(model, long[:-500])) and said


def test_a_segment_without_an_end_is_reported_and_the_answer_goes_on(
    model: SpeechToSpeech, vocoder: UnitMelVocoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = model.stage.config  # type: ignore[union-attr]
    cut = config.segmentation.model_copy(update={"mode": "fixed", "fixed_tokens": 2})
    monkeypatch.setattr(model.stage, "config", config.model_copy(update={"segmentation": cut}))
    reported = 0
    for clip in clips():
        events = streamed(model, clip, vocoder=vocoder)
        done, failed = done_of(events), [event for event in events if isinstance(event, Failed)]
        assert done.failed == len(failed)
        for event in failed:
            place = events.index(event)
            own = [each for each in events[:place] if isinstance(each, Units) and each.segment == event.segment]
            assert own[-1].last and "no end within" in event.why
            assert not [each for each in events[:place] if isinstance(each, Units) and each.segment > event.segment]
        reported += bool(failed) and failed[0].segment < done.segments - 1
    assert reported, "some answer goes on after a segment that failed"


def test_a_segment_that_the_vocoder_cannot_say_is_reported(model: SpeechToSpeech, long: Any) -> None:
    small = UnitMel(UnitMelConfig(n_units=2, width=16, blocks=1)).eval()
    events = streamed(model, long, vocoder=UnitMelVocoder(small))
    failed = [event for event in events if isinstance(event, Failed)]
    assert failed and all("unknown to a vocoder of 2 units" in event.why or "end" in event.why for event in failed)
    assert units_of(events) == model.answer([long])[0].units.tolist()


def test_a_segment_without_units_is_reported(model: SpeechToSpeech, monkeypatch: pytest.MonkeyPatch, long: Any) -> None:
    echo = model.stage.echo  # type: ignore[union-attr]
    head = echo.head.weight.detach().clone()
    monkeypatch.setattr(echo.head, "weight", torch.nn.Parameter(torch.zeros_like(head), requires_grad=False))
    monkeypatch.setattr(echo, "end", 0)
    events = streamed(model, long)
    failed = [event for event in events if isinstance(event, Failed)]
    assert {event.why for event in failed} == {"it has no units"} and len(failed) == done_of(events).segments > 1
    assert units_of(events) == []
    assert model.answer([long])[0].failed == tuple(failed)


def test_text_comes_in_whole_characters_and_without_spaces_at_its_ends() -> None:
    pieces = [b" ", b"a ", b"\xc3", b"\xa9", b" ", b"b", b" "]
    text = IncrementalText(lambda tokens: b"".join(pieces[token] for token in tokens).decode(errors="replace"))
    given = [text.push(token) for token in range(len(pieces))]
    assert given == ["", "a", "", " \u00e9", "", " b", ""] and text.close() == ""
    assert text.text == "a \u00e9 b" and text.of(1, 4) == "a \u00e9"
    cut = IncrementalText(lambda tokens: b"".join(pieces[token] for token in tokens).decode(errors="replace"))
    assert [cut.push(1), cut.push(2), cut.close()] == ["a", "", " \ufffd"]


def test_sampling_keeps_to_the_most_probable_tokens() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))

    def share(sampling: Sampling) -> list[float]:
        numbers = (torch.arange(1000) + 0.5) / 1000
        found = sampling.pick(logits.expand(1000, 4), numbers)
        return (torch.bincount(found, minlength=4) / 1000).tolist()

    assert share(Sampling()) == [1, 0, 0, 0]
    assert share(Sampling(temperature=1.0)) == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.002)
    assert share(Sampling(temperature=1.0, top_k=2)) == pytest.approx([5 / 8, 3 / 8, 0, 0], abs=0.002)
    assert share(Sampling(temperature=1.0, top_p=0.9)) == pytest.approx([50 / 95, 30 / 95, 15 / 95, 0], abs=0.002)
    assert share(Sampling(temperature=0.5))[0] == pytest.approx(0.25 / 0.365, abs=0.002)
    with pytest.raises(ValueError, match=r"temperature is -1.*top_p is 0.*top_k is -2"):
        Sampling(temperature=-1, top_p=0, top_k=-2)
