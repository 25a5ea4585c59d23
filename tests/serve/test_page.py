"""The page in a real browser: press, speak, hear; a conversation, the stop button, and a server that is full."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partialmethod
from typing import Any

import numpy as np
import pytest
import soundfile
from playwright.sync_api import Browser, Page, expect

from echox.config.paths import cache_dir
from echox.errors import NetworkError
from echox.serve.app import build_app
from echox.serve.worker import Worker
from echox.speak.pipeline import SpeechToSpeech
from tests.serve.browser import browser_that_hears
from tests.serve.serving import LIMITS, Served, wav
from tests.speak.echo_run import clips, write_echo_run
from tests.speak.voices import unit_mel

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

HERTZ = 440
WITHIN_MS = 300_000
TURN_S = 0.25
WATCH = """
window.started = []; window.stopped = 0;
const start = AudioBufferSourceNode.prototype.start, stop = AudioBufferSourceNode.prototype.stop;
AudioBufferSourceNode.prototype.start = function (when) {
  const answers = document.querySelectorAll(".turn.model > p:first-child");
  started.push({when, now: this.context.currentTime, seconds: this.buffer.duration,
    text: answers[answers.length - 1].textContent});
  return start.call(this, when);
};
AudioBufferSourceNode.prototype.stop = function () { stopped += 1; return stop.call(this); };
"""


@pytest.fixture(scope="module")
def patched() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, patched: pytest.MonkeyPatch) -> Iterator[Served]:
    """Each turn of the engine takes a while, so that there is a before and an after."""
    model = SpeechToSpeech.load(write_echo_run(tmp_path_factory.mktemp("runs")), device="cpu")
    turn = type(model.engine()).turn

    def slow(engine: Any) -> None:
        time.sleep(TURN_S if len(engine) else 0)
        turn(engine)

    patched.setattr(type(model.engine()), "turn", slow)
    patched.setattr(SpeechToSpeech, "transcribe", partialmethod(SpeechToSpeech.transcribe, max_new=5))
    limits = replace(LIMITS, question_s=30.0, body_bytes=16 << 20, turns=8, tokens=30, open=1, waiting=1)
    made = Served(build_app(Worker(model, unit_mel(7), limits), limits, name="tiny"))
    yield made
    made.stop()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    tone = 0.3 * np.sin(2 * np.pi * HERTZ * np.arange(48_000 * 2) / 48_000)
    recording = tmp_path_factory.mktemp("microphone") / "question.wav"
    soundfile.write(recording, tone, 48_000, subtype="PCM_16")
    try:
        with browser_that_hears(recording) as opened:
            yield opened
    except NetworkError as error:
        pytest.skip(str(error))


@pytest.fixture
def page(browser: Browser, served: Served) -> Iterator[Page]:
    opened = browser.new_page(viewport={"width": 800, "height": 700})
    opened.set_default_timeout(WITHIN_MS)
    complaints: list[str] = []
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    opened.add_init_script(WATCH)
    opened.goto(f"http://127.0.0.1:{served.port}/")
    expect(opened.locator("#about")).to_contain_text("Run: tiny.", timeout=WITHIN_MS)
    yield opened
    opened.close()
    assert [text for text in complaints if "503" not in text] == []


def shoot(page: Page, name: str) -> None:
    folder = cache_dir() / "browser" / "screenshots"
    folder.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=folder / f"{name}.png", full_page=True)


def speak(page: Page) -> dict[str, Any]:
    """Press, speak for a second, press again; what the page asks."""
    page.click("#speak")
    expect(page.locator("#state")).to_have_text("listening", timeout=WITHIN_MS)
    until(page, "recording && recording.parts.length * 128 > context.sampleRate")
    with page.expect_request("**/answer") as asked:
        page.click("#speak")
    return dict(json.loads(asked.value.post_data or ""))


def until(page: Page, what: str) -> None:
    """Wait for something to be true there; the page's own rules forbid to wait inside it."""
    began = time.monotonic()
    while not page.evaluate(what):
        assert time.monotonic() - began < WITHIN_MS / 1000, what
        time.sleep(0.02)


def done(page: Page) -> None:
    until(page, "running === null")


def pitch(question: dict[str, Any]) -> float:
    samples, rate = soundfile.read(io.BytesIO(base64.b64decode(question["audio"])))
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    return float(np.argmax(spectrum) * rate / len(samples))


def load(served: Served) -> tuple[int, int]:
    about = json.loads(served.begin("GET", "/about").read())
    return about["in_progress"], about["in_queue"]


def test_one_speaks_and_hears_the_answer_begin_before_its_text_has_ended(page: Page) -> None:
    shoot(page, "idle")
    question = speak(page)
    assert question["history"] == [] and abs(pitch(question) - HERTZ) < 5, "the microphone is heard"
    until(page, "started.length > 0")
    shoot(page, "speaking")
    done(page)
    text = page.locator(".turn.model > p").first.text_content() or ""
    started = page.evaluate("started")
    assert len(started) > 1 and len(text.split()) > 5
    assert text.startswith(started[0]["text"].strip()) and len(started[0]["text"].strip()) < len(text)
    for before, after in zip(started, started[1:], strict=False):
        assert after["when"] >= before["when"] + before["seconds"] - 1e-6, "pieces follow each other"
    assert all(each["when"] > each["now"] for each in started), "none is late when it is scheduled"
    transcript = page.locator(".turn.user > p").text_content() or ""
    assert transcript not in ("", "…")
    assert page.locator(".turn.model canvas").count() == 1
    until(page, "document.querySelector('audio').duration > 0.5")  # the question can be heard again
    shoot(page, "answered")
    second = speak(page)
    assert second["history"] == [{"role": "user", "text": transcript}, {"role": "assistant", "text": text}]
    done(page)
    assert page.locator(".turn").count() == 4
    page.click("#forget")
    assert page.locator(".turn").count() == 0 and page.evaluate("history.length") == 0


def test_the_stop_button_stops_at_once(page: Page, served: Served) -> None:
    speak(page)
    until(page, "started.length > 1")
    began = time.monotonic()
    page.click("#stop")
    stopped, sounding = page.evaluate("[stopped, sources.length]")
    assert stopped == page.evaluate("started.length") and sounding == 0
    assert time.monotonic() - began < 2.0
    done(page)
    assert page.locator(".failed").text_content() == "stopped"
    count = page.evaluate("started.length")
    while load(served) != (0, 0):
        assert time.monotonic() - began < 20, "the server goes on for nobody"
        time.sleep(0.05)
    assert page.evaluate("started.length") == count and page.evaluate("history.length") == 0
    assert page.locator("#stop").is_disabled() and page.locator("#speak").is_enabled()


def test_a_server_that_is_full_says_so(page: Page, served: Served) -> None:
    waiting = [threading.Thread(target=served.ask, kwargs={"body": wav(clip)}) for clip in clips()[:2]]
    waiting[0].start()
    while load(served) != (1, 0):
        time.sleep(0.02)
    waiting[1].start()
    while load(served) != (1, 1):
        time.sleep(0.02)
    speak(page)
    done(page)
    sentence = "the queue is full (1 waiting). Ask again in some seconds."
    assert page.locator("#state").text_content() == sentence
    assert page.locator(".failed").text_content() == sentence
    shoot(page, "failing")
    assert page.locator("#speak").is_enabled() and page.evaluate("started.length") == 0
    for thread in waiting:
        thread.join()
    speak(page)
    until(page, "started.length > 0")
    page.click("#stop")
    done(page)
