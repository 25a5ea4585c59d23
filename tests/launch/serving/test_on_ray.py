"""A run behind Ray Serve on a real head: answers, pages of other sites, a killed replica, the end."""

from __future__ import annotations

import contextlib
import http.client
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import websockets.exceptions

from echox.serve.messages import event_message
from echox.speak.pipeline import SpeechToSpeech
from echox.speak.vocoder import load_vocoder
from launch import serve
from launch.client import local_head
from launch.client.jobs import Jobs
from tests.serve.serving import pcm_of, wav
from tests.serve.test_converse import heard, open_at, refused, say, take
from tests.speak.echo_run import clips, write_echo_run
from tests.speak.voices import unit_mel

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


class Place:
    """Where it is served."""

    def __init__(self, port: int) -> None:
        self.port = port

    def begin(self, method: str, path: str, body: Any = None, **headers: str) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        connection.request(method, path, body, headers)
        return connection.getresponse()

    def answers(self) -> bool:
        try:
            return self.begin("GET", "/about").status == 200
        except OSError:
            return False


@pytest.fixture(scope="module")
def patched() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def head(patched: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[local_head.Head]:
    patched.setenv("ECHOX_CACHE", str(tmp_path_factory.mktemp("cluster") / "cache"))
    for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        patched.delenv(name, raising=False)
    head = local_head.start_head(cpus=2)
    try:
        for name, value in head.environment().items():
            patched.setenv(name, value)
        yield head
    finally:
        local_head.stop_head(head)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    unit_mel(7).model.save(folder / "vocoder")
    return write_echo_run(folder)


@pytest.fixture(scope="module")
def submit(head: local_head.Head, run: Path) -> Callable[..., str]:
    """Has a job serve the run; returns its id."""

    def submitted(run_folder: Path, *words: str) -> str:
        before = {job["id"] for job in Jobs(head.address).list()}
        command = [str(run_folder), "--vocoder", str(run.parent / "vocoder"), "--cpus", "0.5", *words]
        assert serve.main([*command, "--address", head.address]) == 0
        (job,) = {each["id"] for each in Jobs(head.address).list()} - before
        return job

    return submitted


@pytest.fixture(scope="module")
def served(head: local_head.Head, run: Path, submit: Callable[..., str]) -> Iterator[Place]:
    place, jobs = Place(local_head.next_free(21_000)), Jobs(head.address)
    job = submit(run, "--port", str(place.port), "--replicas", "2")
    while not place.answers():
        assert jobs.status(job) in ("PENDING", "RUNNING"), jobs.logs(job)
        time.sleep(0.5)
    yield place
    assert jobs.stop(job) == "STOPPED"
    assert not place.answers()
    assert not replicas(head)


def replicas(head: local_head.Head) -> list[psutil.Process]:
    found = []
    for process in local_head.processes_of(head):
        with contextlib.suppress(psutil.Error):
            found += [process] if "ServeReplica" in " ".join(process.cmdline()) else []
    return found


def test_a_run_that_does_not_speak_is_one_clear_sentence(
    head: local_head.Head, run: Path, submit: Callable[..., str]
) -> None:
    jobs = Jobs(head.address)
    job = submit(run.parent / "s2t", "--port", str(local_head.next_free(22_000)))
    assert jobs.wait(job) == "FAILED"
    said = "the replicas do not start: an s2t run does not speak. Fix: name a run of the echo stage"
    assert jobs.failure(job) == said, jobs.logs(job)
    assert not replicas(head)


def test_answers_are_those_of_the_model(served: Place, head: local_head.Head, run: Path) -> None:
    assert len(replicas(head)) == 2
    model = SpeechToSpeech.load(run, device="cpu")
    vocoder = load_vocoder(run.parent / "vocoder")
    for clip in clips()[:2]:
        events = list(model.stream(heard(clip), vocoder=vocoder, max_new=4))
        expected = [event_message(event) for event in events]
        samples = b"".join(sound for _, sound in expected)
        response = served.begin("POST", "/answer?max_tokens=4", wav(heard(clip)))
        of_http = [json.loads(line) for line in response.read().splitlines()]
        assert response.status == 200 and pcm_of(of_http).tobytes() == samples
        with open_at(served) as client:
            say(client, clip, max_tokens=4)
            told, sound = take(client)
        assert sound == samples and told == [json.loads(text) for text, _ in expected]
        assert of_http[-1] == told[-1]


def test_limits_and_refusals_come_through(served: Place) -> None:
    response = served.begin("POST", "/answer", b"noise")
    assert response.status == 422 and "5 bytes of audio" in json.loads(response.read())["error"]
    assert served.begin("GET", "/about", Origin="http://elsewhere.example").status == 403
    assert served.begin("GET", "/", Host="elsewhere.example").status == 400
    with pytest.raises(websockets.exceptions.InvalidHandshake):
        open_at(served, origin="http://elsewhere.example")
    with open_at(served) as client:
        client.send('{"type": "end"}')
        assert refused(client) == ("no question has started", 4422)


def test_one_who_cancels_or_leaves_frees_the_replica(served: Place) -> None:
    with open_at(served) as client:
        say(client, clips()[1])
        take(client, "text")
        client.send('{"type": "cancel"}')
        assert take(client)[0][-1]["why"] == "cancelled"
        say(client, clips()[1])
        take(client, "text")
    response = served.begin("POST", "/answer", wav(heard(clips()[1])))
    response.readline()
    response.close()
    for _ in range(20):  # of both replicas, whichever answers
        began = time.monotonic()
        while json.loads(served.begin("GET", "/about").read())["in_progress"]:
            assert time.monotonic() - began < 120
            time.sleep(0.05)


def test_who_is_answered_by_a_killed_replica_hears_of_it_and_the_next_question_is_answered(
    served: Place, head: local_head.Head
) -> None:
    before = replicas(head)
    with open_at(served) as client:
        say(client, clips()[1])
        take(client, "text")
        response = served.begin("POST", "/answer", wav(heard(clips()[1])))
        assert json.loads(response.readline())["event"] == "text"
        for process in before:
            process.kill()
        with pytest.raises(websockets.exceptions.ConnectionClosed):
            while True:
                client.recv(timeout=60)
        with pytest.raises(http.client.IncompleteRead):
            response.read()
    began = time.monotonic()
    while True:
        assert time.monotonic() - began < 400, "no new replica answers"
        try:
            with open_at(served) as client:
                say(client, clips()[0], max_tokens=2)
                assert take(client)[0][-1]["event"] == "done"
                break
        except websockets.exceptions.WebSocketException:
            time.sleep(0.5)
    print(f"answered again after {time.monotonic() - began:.1f} s")
    assert not {process.pid for process in before} & {process.pid for process in replicas(head)}
