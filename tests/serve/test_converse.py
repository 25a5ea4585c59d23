"""Conversations over a WebSocket, by a real client at a real server: answers, cancelling, leaving, limits, crowds."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import websockets.exceptions
from websockets.sync.client import ClientConnection, connect

from echox.errors import EchoXError
from echox.serve import converse
from echox.serve.app import build_app
from echox.serve.limits import Limits
from echox.serve.worker import BusyError, Question, Worker
from echox.speak.events import Done
from echox.speak.pipeline import SpeechToSpeech
from echox.speak.vocoder import UnitMelVocoder
from tests.serve.serving import LIMITS, Served, long, pcm_of, wav
from tests.speak.echo_run import MAX_NEW, clips

FRAME = 640
"""20 ms."""


def pcm16(clip: Any) -> bytes:
    return np.round(clip * 32767).astype("<i2").tobytes()


def heard(clip: Any) -> Any:
    """What the server hears of it."""
    return np.frombuffer(pcm16(clip), "<i2").astype(np.float32) / np.float32(32768)


def open_at(served: Served, **options: Any) -> ClientConnection:
    return connect(f"ws://127.0.0.1:{served.port}/converse", open_timeout=120, **options)


def say(client: ClientConnection, clip: Any, *, end: bool = True, **start: Any) -> None:
    client.send(json.dumps({"type": "start", **start}))
    sound = pcm16(clip)
    for at in range(0, len(sound), FRAME):
        client.send(sound[at : at + FRAME])
    if end:
        client.send('{"type": "end"}')


def take(client: ClientConnection, until: str = "done") -> tuple[list[dict[str, Any]], bytes]:
    """Events up to one of a kind, and all samples."""
    events: list[dict[str, Any]] = []
    sound = b""
    while not events or events[-1]["event"] not in (until, "error"):
        events.append(json.loads(client.recv(timeout=120)))
        if events[-1]["event"] == "audio":
            piece = client.recv(timeout=120)
            assert isinstance(piece, bytes) and len(piece) == events[-1]["bytes"]
            sound += piece
    return events, sound


def refused(client: ClientConnection) -> tuple[str, int]:
    """The sentence of the error event, and the closing code."""
    events, _ = take(client)
    assert events[-1]["event"] == "error" and events[-1]["fix"]
    with pytest.raises(websockets.exceptions.ConnectionClosed) as closed:
        client.recv(timeout=60)
    assert closed.value.rcvd is not None
    return events[-1]["error"], closed.value.rcvd.code


def text_of(events: Sequence[dict[str, Any]]) -> str:
    return "".join(each["text"] for each in events if each["event"] == "text")


def about(served: Served) -> dict[str, Any]:
    return dict(json.loads(served.begin("GET", "/about").read()))


def free(served: Served) -> bool:
    """Whether nobody is there or answered, within a while."""
    began = time.monotonic()
    while time.monotonic() - began < 30:
        now = about(served)
        if not (now["in_progress"] or now["in_queue"] or now["in_conversation"]):
            return True
        time.sleep(0.02)
    return False


@contextmanager
def server(model: SpeechToSpeech, vocoder: UnitMelVocoder, limits: Limits, **options: Any) -> Iterator[Served]:
    made = Served(build_app(Worker(model, vocoder, limits), limits, **options))
    try:
        yield made
    finally:
        made.stop()


@contextmanager
def slowly(model: SpeechToSpeech, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Every turn of the engine that has an answer takes a while; counts them."""
    turns: list[int] = []
    turn = type(model.engine()).turn

    def slow(engine: Any) -> None:
        turns.append(len(engine))
        time.sleep(0.4 if len(engine) else 0)
        turn(engine)

    with monkeypatch.context() as patch:
        patch.setattr(type(model.engine()), "turn", slow)
        yield turns


def test_answers_are_those_of_http_and_of_the_model(
    served: Served, model: SpeechToSpeech, vocoder: UnitMelVocoder
) -> None:
    """Several on one connection, each with all that came before it."""
    history: list[dict[str, str]] = []
    with open_at(served) as client:
        for clip in (long(model), clips()[2]):
            say(client, clip, history=history[-2:])
            events, sound = take(client)
            (whole,) = model.answer([heard(clip)], turns=[history[-2:]] if history else None)
            assert events[-1]["event"] == "done" and events[-1]["text"] == text_of(events).strip() == whole.text
            units = [unit for each in events if each["event"] == "units" for unit in each["units"]]
            assert units == whole.units.tolist()
            wave = np.round(np.clip(vocoder([whole.units])[0], -1, 1) * 32767)
            assert np.frombuffer(sound, "<i2").tolist() == wave.tolist()
            if not history:
                _, of_http = served.ask(body=wav(heard(clip)))
                assert pcm_of(of_http).tobytes() == sound
                plain = [each for each in of_http if each["event"] != "audio"]
                assert plain == [each for each in events if each["event"] != "audio"]
            history += [{"role": "user", "text": " w20 w21 "}, {"role": "assistant", "text": whole.text}]
    assert free(served)


def test_options_and_the_transcript(served: Served, model: SpeechToSpeech) -> None:
    clip = long(model)
    with open_at(served) as client:
        say(client, clip, max_tokens=3, transcript=True)
        events, _ = take(client)
        assert [each["event"] for each in events[-2:]] == ["transcript", "done"] and events[-1]["why"] == "limit"
        assert events[-2]["text"] == list(model.transcribe(heard(clip)))[-1]
        say(client, clip, temperature=1.5, seed=2)
        sampled = take(client)[0][-1]["text"]
    assert sampled == served.ask("/answer?temperature=1.5&seed=2", wav(heard(clip)))[1][-1]["text"]


def test_cancel_ends_the_answer_at_once_and_the_next_question_is_answered(
    served: Served, model: SpeechToSpeech, monkeypatch: pytest.MonkeyPatch
) -> None:
    with slowly(model, monkeypatch) as turns, open_at(served) as client:
        say(client, long(model))
        take(client, "text")
        client.send('{"type": "cancel"}')
        client.send('{"type": "cancel"}')  # of what is over already: nothing
        say(client, clips()[1], end=False)  # barge in, before it has ended
        events, sound = take(client)
        assert events[-1]["why"] == "cancelled" and not sound
        assert [each["event"] for each in events if each["event"] not in ("text", "cut", "units")] == ["done"]
        assert sum(turns) < MAX_NEW - 2, "it went on for nobody"
        client.send('{"type": "cancel"}')
        assert take(client)[0] == [{"event": "done", "text": "", "why": "cancelled", "tokens": 0, "segments": 0,
                                    "failed": 0}]  # fmt: skip
        say(client, clips()[2], max_tokens=2)
        assert take(client)[0][-1]["why"] in ("end", "limit")


def test_one_who_barges_in_while_a_question_is_encoded_need_not_wait_for_the_next_one(
    model: SpeechToSpeech, vocoder: UnitMelVocoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, heard_of, encoding = model.stage.s2t.front_end.encoder, [], []  # type: ignore[var-annotated]
    forward = encoder.forward
    worker = Worker(model, vocoder, LIMITS)
    sessions = [
        worker.ask(Question(audio=clips()[n], tokens=2), lambda event, n=n: heard_of.append((n, event)))  # type: ignore[misc]
        for n in range(2)
    ]

    def interrupted(*args: Any) -> Any:
        found = forward(*args)
        encoding.append(len(heard_of))
        if len(encoding) == 1:
            worker.cancel(sessions[0])
        return found

    monkeypatch.setattr(encoder, "forward", interrupted)
    worker.start()
    began = time.monotonic()
    while not (heard_of and heard_of[-1][0] == 1 and isinstance(heard_of[-1][1], Done)):
        assert time.monotonic() - began < 60
        time.sleep(0.01)
    worker.stop()
    assert heard_of[0] == (0, Done("", "cancelled", 0, 0, 0)) and {n for n, _ in heard_of[1:]} == {1}
    assert encoding == [0, 1], "it is told before the next question is encoded"


def test_one_who_waits_leaves_the_queue_at_once(
    model: SpeechToSpeech, vocoder: UnitMelVocoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = replace(LIMITS, open=1, waiting=1)
    with slowly(model, monkeypatch), server(model, vocoder, limits) as served, open_at(served) as first:
        say(first, long(model))
        take(first, "text")
        with open_at(served) as second:
            say(second, clips()[0])
            while not about(served)["in_queue"]:
                time.sleep(0.01)
            with open_at(served) as third:
                say(third, clips()[1])
                assert refused(third) == ("the queue is full (1 waiting)", 4503)
            second.send('{"type": "cancel"}')
            assert take(second)[0][-1]["why"] == "cancelled"
            say(second, clips()[0], max_tokens=2)
            first.send('{"type": "cancel"}')
            assert take(second)[0][-1]["why"] in ("end", "limit")


@pytest.mark.parametrize("when", ["in the question", "in the queue", "in the answer"])
def test_one_who_vanishes_costs_nothing(
    when: str, model: SpeechToSpeech, vocoder: UnitMelVocoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = replace(LIMITS, open=1)
    with slowly(model, monkeypatch) as turns, server(model, vocoder, limits) as served, ExitStack() as opened:
        client = opened.enter_context(open_at(served))
        if when == "in the queue":
            other = opened.enter_context(open_at(served))
            say(other, long(model))
            take(other, "text")
        say(client, long(model), end=when != "in the question")
        if when == "in the answer":
            take(client, "text")
        client.socket.shutdown(socket.SHUT_RDWR)  # without a closing frame
        if when == "in the queue":
            while about(served)["in_conversation"] > 1:
                time.sleep(0.01)
            assert about(served)["in_queue"] == 0
            other.close()
        assert free(served)
        assert sum(turns) < MAX_NEW - 2, "it went on for nobody"


def test_one_who_reads_slowly_gets_all_of_it_and_holds_up_nobody(
    served: Served, model: SpeechToSpeech, vocoder: UnitMelVocoder
) -> None:
    clip = long(model)
    with open_at(served, max_queue=1) as slow:
        say(slow, clip)
        began = time.monotonic()
        assert served.ask(body=wav(heard(clips()[2])))[1][-1]["event"] == "done"
        while about(served)["in_progress"]:
            assert time.monotonic() - began < 60
            time.sleep(0.02)
        events, sound = take(slow)
    (whole,) = model.answer([heard(clip)])
    assert events[-1]["text"] == whole.text
    assert len(sound) == 2 * len(vocoder([whole.units])[0])


def test_one_who_reads_nothing_is_left(model: SpeechToSpeech, vocoder: UnitMelVocoder) -> None:
    """The buffers of the connection fill; what a turn says would wait for ever."""
    limits, clip = replace(LIMITS, idle_s=1.0), long(model)
    message = converse.event_message
    with pytest.MonkeyPatch.context() as patch, server(model, vocoder, limits) as served:
        # The tiny run says little, so each event is made long.
        patch.setattr(converse, "event_message", lambda event: (message(event)[0] + " " * (8 << 20), b""))
        with open_at(served, max_queue=1) as client:
            client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            say(client, clip)
            assert free(served)
            with suppress(OSError):  # the server has closed it, and so has the client's own thread
                client.socket.shutdown(socket.SHUT_RDWR)


def test_twenty_at_once_are_answered_in_the_order_they_asked(model: SpeechToSpeech, vocoder: UnitMelVocoder) -> None:
    limits = replace(LIMITS, open=3, waiting=20)
    worker = Worker(model, vocoder, limits)
    asked: list[Any] = []
    begun: list[Any] = []
    ask, begin = worker.ask, model.begin

    def ask_noted(question: Any, notify: Any) -> Any:
        asked.append(question.audio.tobytes())
        return ask(question, notify)

    def begin_noted(engine: Any, audio: Any, *given: Any, **options: Any) -> Any:
        begun.append(audio.tobytes())
        return begin(engine, audio, *given, **options)

    worker.ask = ask_noted  # type: ignore[method-assign]
    worker._model = Noted(model, begin_noted)  # type: ignore[assignment]
    served = Served(build_app(worker, limits))
    expected = [" ".join(each.text.split()[:3]) for each in model.answer([heard(clip) for clip in clips()])]
    found: dict[int, tuple[list[dict[str, Any]], bytes]] = {}

    def one(number: int) -> None:
        with open_at(served) as client:
            say(client, clips()[number % 5], max_tokens=3)
            found[number] = take(client)

    threads = [threading.Thread(target=one, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert free(served)
    served.stop()
    assert sorted(found) == list(range(20)) and begun == asked and len(begun) == 20
    for number, (events, sound) in found.items():
        assert events[-1]["event"] == "done" and events[-1]["text"] == expected[number % 5]
        assert sound == found[number % 5][1], "what is said does not depend on the others"


class Noted:
    """A model whose `begin` is another's."""

    def __init__(self, model: SpeechToSpeech, begin: Callable[..., Any]) -> None:
        self._model, self.begin = model, begin

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


START = '{"type": "start"}'


@pytest.mark.parametrize(
    ("messages", "error", "code"),
    [
        (["{"], "the message is no JSON", 4422),
        (["[]"], "the message is a list, not an object", 4422),
        (['{"type": "sing"}'], "there is no message of type 'sing'", 4422),
        (["{}"], "there is no message of type 'None'", 4422),
        (['{"type": "start", "voice": 1}'], "there is no 'voice' in a question", 4422),
        (['{"type": "start", "audio": ""}'], "there is no 'audio' in a question", 4422),
        (['{"type": "start", "max_tokens": 13}'], "max_tokens is 13, not from 1 to 12", 4422),
        (['{"type": "start", "history": [1]}'], "turns[0]", 4422),
        (['{"type": "start", "history": 1}'], "turns is a int, not a list", 4422),
        ([START, START], "before the last one is answered", 4422),
        ([b"\0\0"], "no question has started", 4422),
        (['{"type": "end"}'], "no question has started", 4422),
        ([START, '{"type": "end"}'], "the question has no sound", 4422),
        ([START, b"\0" * 3], "a piece of sound has 3 bytes", 4422),
        ([START, b"\0" * 40_000, b"\0" * 30_000], "the question is longer than 2 s", 4413),
        ([b"\0" * 50_000], "a message has more than 48 KiB", 4413),
        (["x" * 50_000], "a message has more than 48 KiB", 4413),
        ([START, *[b"\0\0"] * 500], "there are more than 200 messages a second", 4429),
        ([], "nothing has come for 1 s", 4408),
        ([START, b"\0\0"], "nothing has come for 1 s", 4408),
    ],
)
def test_what_cannot_be_answered_is_one_clear_error(
    bounded: Served, messages: list[Any], error: str, code: int
) -> None:
    with open_at(bounded) as client:
        try:
            for message in messages:
                client.send(message)
        except websockets.exceptions.ConnectionClosed:
            pass  # it was refused before the last one
        sentence, closed = refused(client)
    assert error in sentence and closed == code


@pytest.fixture(scope="module")
def bounded(model: SpeechToSpeech, vocoder: UnitMelVocoder) -> Iterator[Served]:
    limits = replace(LIMITS, message_bytes=48 << 10, messages_s=200, idle_s=1.0, conversations=2)
    with server(model, vocoder, limits) as made:
        yield made


def test_so_many_conversations_and_no_more(bounded: Served) -> None:
    with open_at(bounded), open_at(bounded), open_at(bounded) as third:
        assert refused(third) == ("2 conversations are open", 4503)
    assert free(bounded)


def test_an_answer_may_take_longer_than_silence_may(
    model: SpeechToSpeech, vocoder: UnitMelVocoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits, clip = replace(LIMITS, idle_s=0.5), long(model)
    with slowly(model, monkeypatch), server(model, vocoder, limits) as served, open_at(served) as client:
        began = time.monotonic()
        say(client, clip, max_tokens=4)
        assert take(client)[0][-1]["event"] == "done" and time.monotonic() - began > 1.0
        assert refused(client) == ("nothing has come for 0.5 s", 4408)


def test_a_page_of_another_site_cannot_converse(served: Served) -> None:
    with pytest.raises(websockets.exceptions.InvalidStatus) as denied:
        open_at(served, origin="http://elsewhere.example")
    assert denied.value.response.status_code == 403
    assert "another site" in json.loads(denied.value.response.body)["error"]
    with pytest.raises(websockets.exceptions.InvalidStatus) as denied:
        open_at(served, additional_headers={"Host": "elsewhere.example"})
    assert denied.value.response.status_code == 400
    with open_at(served, origin=f"http://127.0.0.1:{served.port}") as client:
        say(client, clips()[2], max_tokens=1)
        assert take(client)[0][-1]["event"] == "done"


def test_a_token_is_asked_for(model: SpeechToSpeech, vocoder: UnitMelVocoder) -> None:
    with server(model, vocoder, LIMITS, token="open sesame", hosts=("*",)) as served:
        for token in ({}, {"token": "other"}, {"token": "caf\u00e9"}, {"token": None}):
            with open_at(served) as client:
                client.send(json.dumps({"type": "start", **token}))
                assert refused(client) == ("the token is missing or wrong", 4401)
        with pytest.raises(websockets.exceptions.InvalidStatus) as denied:
            open_at(served, additional_headers={"Authorization": "Bearer other"})
        assert denied.value.response.status_code == 401
        for options, start in (({"additional_headers": {"Authorization": "Bearer open sesame"}}, {}),
                               ({}, {"token": "open sesame"})):  # fmt: skip
            with open_at(served, **options) as client:  # type: ignore[arg-type]
                say(client, clips()[2], max_tokens=1, **start)
                assert take(client)[0][-1]["event"] == "done"


def test_an_answer_that_is_lost_is_an_error_and_its_end(
    served: Served, model: SpeechToSpeech, monkeypatch: pytest.MonkeyPatch
) -> None:
    turn, lost = type(model.engine()).turn, []

    def broken(engine: Any) -> None:
        if len(engine) and not lost:
            lost.append(engine)
            raise MemoryError("no room")
        turn(engine)

    monkeypatch.setattr(type(model.engine()), "turn", broken)
    with open_at(served) as client:
        say(client, clips()[2])
        assert refused(client) == ("the answer was lost: MemoryError: no room", 4500)
    with open_at(served) as client:
        say(client, clips()[2])
        assert take(client)[0][-1]["event"] == "done"


def test_a_server_that_stops_tells_those_who_wait(model: SpeechToSpeech, vocoder: UnitMelVocoder) -> None:
    worker, told = Worker(model, vocoder, LIMITS), []  # type: ignore[var-annotated]
    worker.ask(Question(audio=heard(clips()[0]), tokens=3), told.append)
    worker._stopping.set()
    worker.start()
    worker.stop()
    assert isinstance(told[-1], EchoXError) and told[-1].what == "the server stops" and not worker.healthy
    with pytest.raises(BusyError, match="the server stops"):
        worker.ask(Question(audio=heard(clips()[0]), tokens=3), told.append)


def test_a_worker_that_loses_all_or_is_stuck_is_not_well(
    model: SpeechToSpeech, vocoder: UnitMelVocoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    turn, broken = type(model.engine()).turn, [True]

    def turning(engine: Any) -> None:
        if len(engine) and broken[0]:
            raise MemoryError("no room")
        turn(engine)

    monkeypatch.setattr(type(model.engine()), "turn", turning)
    worker = Worker(model, vocoder, LIMITS)
    assert not worker.healthy, "it has not begun"
    worker.start()
    over = threading.Semaphore(0)

    def ask() -> None:
        question = Question(audio=heard(clips()[2]), tokens=1)
        worker.ask(question, lambda event: over.release() if isinstance(event, Done | EchoXError) else None)
        assert over.acquire(timeout=60)

    for healthy in (True, True, False):
        ask()
        assert worker.healthy == healthy
    broken[0] = False
    ask()
    assert worker.healthy
    monkeypatch.setattr("echox.serve.worker._STUCK_S", 0.0)
    assert not worker.healthy
    worker.stop()
