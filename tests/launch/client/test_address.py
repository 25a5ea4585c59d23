"""Which cluster a command speaks to: what was said explicitly, in the one form there is, and no other."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from echox.errors import LaunchError
from launch.client.address import DEFAULT, VARIABLES, api_address, on_this_machine
from launch.client.jobs import Jobs
from tests.launch.client.stub_api import StubApi, stub_api


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*VARIABLES, "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def one() -> Iterator[StubApi]:
    with stub_api() as server:
        yield server


@pytest.fixture
def other() -> Iterator[StubApi]:
    with stub_api() as server:
        yield server


def test_what_is_said_wins_over_the_environment_and_that_over_the_default() -> None:
    environment = {"RAY_ADDRESS": "http://b:1", "RAY_API_SERVER_ADDRESS": "http://c:1/"}
    assert api_address("https://a.example/ray/", environment) == "https://a.example/ray"
    assert api_address(None, environment) == "http://c:1"
    assert api_address(None, {"RAY_ADDRESS": "http://b:1"}) == "http://b:1"
    assert api_address(None, {"RAY_ADDRESS": ""}) == DEFAULT
    assert api_address("http://[::1]:8265", {}) == "http://[::1]:8265"


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("auto", "auto is not the address"),
        ("head:8265", r"without http://.*write http://head:8265"),
        ("10.0.0.1:6379", "without http://.*name the dashboard"),
        ("ray://head:10001", "a Ray Client address"),
        ("http://", "this is not the address"),
        ("http://head:port", "this is not"),
        ("http://head:99999", "this is not"),
        ("http://head:8265?x=1", "this is not"),
        ("http://user:secret@head:8265", "a URL with a login.*leave the login out"),
        ("ssh://head", "without http://"),
    ],
)
def test_another_form_is_refused_wherever_it_was_said(address: str, said: str) -> None:
    for where, arguments in (("--address", (address, {})), ("RAY_ADDRESS", (None, {"RAY_ADDRESS": address}))):
        with pytest.raises(LaunchError, match=said) as refused:
            api_address(*arguments)
        assert str(refused.value).count(where) == 1 and "secret" not in str(refused.value)


def test_the_named_cluster_is_asked_and_not_the_one_of_the_environment(
    clean: None, one: StubApi, other: StubApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in VARIABLES:
        monkeypatch.setenv(name, other.address)
    assert Jobs(one.address).list() == []
    assert one.asked and other.asked == []
    assert [os.environ[name] for name in VARIABLES] == [other.address] * 2, "what the user has set stays"
    assert Jobs().list() == [] and other.asked


def test_a_named_cluster_that_does_not_answer_is_no_reason_to_take_another(
    clean: None, other: StubApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", other.address)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(LaunchError, match=f"no Ray cluster answers at {nowhere}"):
        Jobs(nowhere)
    assert other.asked == []


def summary(host: str, boot: float, **raylet: Any) -> dict[str, Any]:
    node = {"bootTime": boot, "raylet": {"nodeManagerHostname": host, "isHeadNode": True, "state": "ALIVE", **raylet}}
    return {"data": {"summary": [node]}}


def test_a_head_behind_a_tunnel_is_not_this_machine(clean: None, one: StubApi) -> None:
    here, boot = socket.gethostname(), psutil.boot_time()
    cases: list[tuple[Any, bool]] = [
        (summary(here, boot), True),
        (summary("pod-7", boot), False),
        (summary(here, boot - 3600), False),
        (summary(here, boot, isHeadNode=False), False),
        (summary(here, boot, state="DEAD"), False),
        (None, False),
        ({"data": {"summary": [{}]}}, False),
    ]
    for nodes, local in cases:
        one.nodes = nodes
        assert Jobs(one.address).is_local is local, nodes
    assert not on_this_machine("http://head.example:8265", summary(here, boot))


def test_secrets_of_the_environment_are_not_given_to_a_job(
    clean: None, one: StubApi, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    names = ("MLFLOW_TRACKING_PASSWORD", "HF_TOKEN", "MLFLOW_TRACKING_TOKEN", "ECHOX_STORE_KEY", "HF_SECRET")
    for name in names:
        monkeypatch.setenv(name, "s3cr3t-9f")
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    assert Jobs(one.address).submit("demo/t2c") == "demo-t2c-a1"
    (job,) = [json.loads(body) for body in one.sent if body.startswith(b"{")]
    assert job["runtime_env"]["env_vars"]["MLFLOW_TRACKING_USERNAME"] == "me"
    assert not any(b"s3cr3t-9f" in body for body in one.sent)
    assert all(name in caplog.text for name in names) and "s3cr3t-9f" not in caplog.text
