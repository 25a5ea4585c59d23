"""A real server on a port of this machine, on a tiny run: answers, limits, errors, several at once, cancelling."""

from __future__ import annotations

import base64
import json
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from echox.errors import DataError, EchoXError
from echox.serve.app import build_app
from echox.serve.limits import Limits
from echox.serve.messages import parse_question
from echox.serve.worker import BusyError, Question, Worker
from echox.speak.pipeline import SpeechToSpeech
from echox.speak.vocoder import UnitMelVocoder
from tests.serve.serving import LIMITS, Served, long, pcm_of, wav
from tests.speak.echo_run import MAX_NEW, clips

JSON = {"Content-Type": "application/json"}


def test_an_answer_is_that_of_the_model(served: Served, model: SpeechToSpeech, vocoder: UnitMelVocoder) -> None:
    for clip in clips():
        (expected,) = model.answer([clip])
        status, events = served.ask(body=wav(clip))
        assert status == 200 and events[-1]["event"] == "done" and events[-1]["text"] == expected.text
        assert "".join(each["text"] for each in events if each["event"] == "text") == expected.text
        units = [unit for each in events if each["event"] == "units" for unit in each["units"]]
        assert units == expected.units.tolist()
        wave = np.round(np.clip(vocoder([expected.units])[0], -1, 1) * 32767)
        assert pcm_of(events).tolist() == wave.tolist()
        cuts = [each for each in events if each["event"] == "cut"]
        assert len(cuts) == events[-1]["segments"] and all(len(each["scores"]) == each["last"] - each["first"]
                                                            for each in cuts)  # fmt: skip


def test_history_options_and_the_transcript(served: Served, model: SpeechToSpeech) -> None:
    clip = long(model)
    history = [{"role": "user", "text": " w20 w21 "}, {"role": "assistant", "text": " w22 "}]
    body = {"audio": base64.b64encode(wav(clip)).decode(), "history": history, "max_tokens": 3, "transcript": True}
    status, events = served.ask(body=json.dumps(body), **{"Content-Type": "application/json"})
    assert status == 200 and [each["event"] for each in events[-2:]] == ["transcript", "done"]
    assert events[-2]["text"] == list(model.transcribe(clip))[-1]
    whole = model.answer([clip], turns=[history])[0].text
    assert events[-1]["text"] == " ".join(whole.split()[:3]) and events[-1]["why"] == "limit"
    sampled = {served.ask(f"/answer?temperature=1.5&seed={seed}", wav(clip))[1][-1]["text"] for seed in (1, 2, 3, 1)}
    assert len(sampled) == 3


def test_several_at_once(served: Served, model: SpeechToSpeech) -> None:
    found: dict[int, Any] = {}

    def ask(number: int) -> None:
        found[number] = served.ask(body=wav(clips()[number]))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    answers = model.answer(clips())
    for number, (status, events) in found.items():
        if status == 503:
            assert "the queue is full" in events[0]["error"]
            continue
        assert status == 200 and events[-1]["text"] == answers[number].text
    assert sum(status == 200 for status, _ in found.values()) >= 2


@pytest.mark.parametrize(
    ("path", "body", "headers", "status", "error"),
    [
        ("/answer", b"noise", {}, 422, "5 bytes of audio"),
        ("/answer", b"", {}, 422, "audio"),
        ("/answer", wav(np.zeros(16_000 * 3, np.float32), 16_000), {}, 422, "2"),
        ("/answer", b"x" * 300_000, {}, 413, "larger than"),
        ("/answer?temperature=-1", wav(np.zeros(800)), {}, 422, "temperature is -1"),
        ("/answer?temperature=nan", wav(np.zeros(800)), {}, 422, "temperature is nan"),
        ("/answer?top_k=x", wav(np.zeros(800)), {}, 422, "invalid literal"),
        ("/answer?max_tokens=13", wav(np.zeros(800)), {}, 422, "max_tokens is 13, not from 1 to 12"),
        ("/answer?voice=x", wav(np.zeros(800)), {}, 422, "there is no 'voice' in a question"),
        ("/answer", b"{", JSON, 422, "no JSON"),
        ("/answer", b"[" * 9999, JSON, 422, "no JSON"),
        ("/answer", b"[]", JSON, 422, "is a list, not an object"),
        ("/answer", b'{"audio": "%%"}', JSON, 422, "no audio file in base64"),
        ("/answer", b'{"audio": "", "history": "hello"}', JSON, 422, "turns is a str"),
        ("/answer", json.dumps({"history": [{"role": "user", "text": "a"}] * 4}), JSON, 422, "there are 4 turns"),
        ("/answer", b"", {"Origin": "http://elsewhere.example"}, 403, "another site"),
    ],
)  # fmt: skip
def test_what_cannot_be_answered_is_one_clear_error(
    served: Served, path: str, body: Any, headers: dict[str, str], status: int, error: str
) -> None:
    found, (content,) = served.ask(path, body, **headers)
    assert found == status and error in content["error"] and content["fix"]


def test_only_this_machine_is_a_name_for_this_machine(served: Served) -> None:
    assert served.begin("GET", "/", Host="elsewhere.example").status == 400
    assert served.begin("GET", "/answer").status == 405


def test_the_page_needs_nothing_beside_it(served: Served) -> None:
    response = served.begin("GET", "/")
    page = response.read().decode()
    assert response.status == 200 and "default-src 'none'" in (response.getheader("Content-Security-Policy") or "")
    assert "http://" not in page and "https://" not in page and "src=" not in page
    about = json.loads(served.begin("GET", "/about").read())
    assert about["name"] == "tiny" and about["question_s"] == 2.0 and about["in_progress"] == 0


def test_one_who_leaves_ends_the_answer(served: Served, model: SpeechToSpeech, monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[int] = []
    turn = type(model.engine()).turn

    def slow(engine: Any) -> None:
        turns.append(len(engine))
        time.sleep(0.8 if len(engine) else 0)
        turn(engine)

    with monkeypatch.context() as patch:
        patch.setattr(type(model.engine()), "turn", slow)
        response = served.begin("POST", "/answer", wav(long(model)))
        assert json.loads(response.readline())["event"] == "text"
        response.close()
        while json.loads(served.begin("GET", "/about").read())["in_progress"]:
            time.sleep(0.02)
        assert sum(turns) < MAX_NEW - 2, "it went on for nobody"
    status, events = served.ask(body=wav(clips()[2]))
    assert status == 200 and events[-1]["event"] == "done"


def test_a_token_is_asked_for(model: SpeechToSpeech, vocoder: UnitMelVocoder) -> None:
    served = Served(build_app(Worker(model, vocoder, LIMITS), LIMITS, token="open sesame", hosts=("*",)))
    try:
        assert served.ask(body=wav(clips()[0]))[0] == 401
        assert served.ask(body=wav(clips()[0]), Authorization="Bearer other")[0] == 401
        assert served.begin("GET", "/about", Authorization="Bearer caf\u00e9").status == 401
        assert served.begin("GET", "/about", Authorization="Bearer open sesame", Host="any.example").status == 200
        assert served.ask(body=wav(clips()[0]), Authorization="Bearer open sesame")[0] == 200
    finally:
        served.stop()


class Broken:
    """A model whose engine fails once."""

    def __init__(self, model: SpeechToSpeech) -> None:
        self.model, self.engines = model, 0

    def engine(self) -> Any:
        self.engines += 1
        made = self.model.engine()
        if self.engines == 1:
            made.turn = lambda: 1 / 0  # type: ignore[method-assign]
        return made

    def begin(self, *given: Any, **options: Any) -> Any:
        if not len(given[1]):
            raise DataError("no sound")
        return self.model.begin(*given, **options)


def test_an_error_reaches_the_one_who_asked_and_the_next_question_is_answered(
    model: SpeechToSpeech, vocoder: UnitMelVocoder, capsys: pytest.CaptureFixture[str]
) -> None:
    worker = Worker(Broken(model), vocoder, LIMITS)  # type: ignore[arg-type]
    heard: list[Any] = []
    over = threading.Semaphore(0)

    def notify(event: Any) -> None:
        heard.append(event)
        if isinstance(event, EchoXError) or type(event).__name__ == "Done":
            over.release()

    def asked(clip: Any) -> Any:
        heard.clear()
        worker.ask(Question(audio=clip, tokens=MAX_NEW), notify)
        assert over.acquire(timeout=60)
        return heard[-1]

    worker.ask(Question(audio=clips()[2], tokens=2), notify)
    worker.ask(Question(audio=clips()[2], tokens=2), notify)
    with pytest.raises(BusyError, match=r"the queue is full \(2 waiting\)"):
        worker.ask(Question(audio=clips()[2], tokens=2), notify)
    worker.start()
    assert over.acquire(timeout=60) and over.acquire(timeout=60)
    assert "the answer was lost: ZeroDivisionError" in heard[0].what
    assert "the answer was lost" in capsys.readouterr().err
    assert asked(np.zeros(0, np.float32)).what == "no sound"
    assert asked(clips()[0]).text == model.answer(clips())[0].text
    worker.stop()


def test_one_who_left_before_is_not_answered(model: SpeechToSpeech, vocoder: UnitMelVocoder) -> None:
    worker, heard = Worker(model, vocoder, LIMITS), []  # type: ignore[var-annotated]
    worker.cancel(worker.ask(Question(audio=clips()[0], tokens=3), heard.append))
    assert [event.why for event in heard] == ["cancelled"] and worker.load == (0, 0)
    last = worker.ask(Question(audio=clips()[1], tokens=3), heard.append)
    worker.start()
    began = time.monotonic()
    while not (len(heard) > 1 and type(heard[-1]).__name__ == "Done") and time.monotonic() - began < 60:
        time.sleep(0.01)
    worker.stop()
    assert sum(type(event).__name__ == "Done" for event in heard) == 2 and not last.cancelled


def test_limits_are_above_zero_and_a_question_keeps_to_them() -> None:
    with pytest.raises(ValueError, match="open is 0, not above 0; waiting is -1, not above 0"):
        Limits(open=0, waiting=-1)
    question = parse_question(wav(clips()[0]), False, {"top_k": "4", "temperature": "0.5"}, LIMITS)
    assert question.tokens == MAX_NEW and question.sampling.top_k == 4 and question.sampling.temperature == 0.5
    assert len(question.audio) == len(clips()[0])


def test_a_run_is_served_in_the_voice_that_is_named(model: SpeechToSpeech, monkeypatch: pytest.MonkeyPatch) -> None:
    from echox.serve.loading import load

    monkeypatch.setattr("echox.serve.loading.SpeechToSpeech.load", lambda run: model)
    monkeypatch.setattr("echox.serve.loading.check_vocoder", lambda folder, parts: None)
    monkeypatch.setattr("echox.serve.loading.load_vocoder", lambda folder, speaker: (folder, speaker))
    assert load("run", "voice", "bo")[1] == (Path("voice"), "bo")
    assert load("run", "voice")[1] == (Path("voice"), None)


def test_the_command_refuses_a_port_that_is_taken(
    served: Served, tmp_path: Path, model: SpeechToSpeech, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from echox.cli import main

    monkeypatch.setattr("echox.speak.pipeline.SpeechToSpeech.load", lambda run: model)
    monkeypatch.setattr("echox.serve.loading.load_vocoder", lambda folder, speaker=None: None)
    command = ["serve", str(tmp_path), "--vocoder", str(tmp_path)]
    assert main([*command, "--port", str(served.port)]) == 1
    assert f"port {served.port} of 127.0.0.1 is taken" in capsys.readouterr().err
    assert main([*command, "--open", "0"]) == 1
    assert "open is 0, not above 0" in capsys.readouterr().err
