"""What a run on a cluster is asked to be, by the words of the command; without a cluster."""

from __future__ import annotations

from typing import Any

import pytest
import ray

from echox.errors import LaunchError
from echox.serve.limits import Limits
from launch import serve
from launch.job.environment import process_environment
from launch.serving.config import Serving
from launch.serving.deploy import check_room, start_failure


def serving(*words: str) -> Serving:
    return serve.serving_of(serve.arguments().parse_args(["/shared/runs/echo", *words]))


def test_words_become_options_of_ray_serve() -> None:
    options = serving("--replicas", "2", "--gpus", "1", "--cpus", "4", "--open", "8").deployment({"A": "1"})
    assert options["num_replicas"] == 2 and "autoscaling_config" not in options
    assert options["ray_actor_options"] == {"num_cpus": 4, "num_gpus": 1, "runtime_env": {"env_vars": {"A": "1"}}}
    assert options["max_ongoing_requests"] > Limits().conversations + 8 + 16
    scaled = serving("--autoscale", "1:4", "--open", "3").deployment({})
    assert "num_replicas" not in scaled
    wanted = {"min_replicas": 1, "max_replicas": 4, "target_ongoing_requests": 3}
    assert scaled["autoscaling_config"] == wanted
    assert serving("--autoscale", "2:2").deployment({})["num_replicas"] == 2


def test_a_run_is_served_in_the_voice_that_is_named() -> None:
    assert serving().speaker is None
    named = serving("--vocoder", "voice", "--speaker", "bo")
    assert (named.vocoder, named.speaker) == ("voice", "bo")


def test_ray_serve_takes_the_options() -> None:
    from ray import serve as ray_serve

    for words in ((), ("--autoscale", "1:3"), ("--gpus", "0.5")):
        made = ray_serve.deployment(name="echox", **serving(*words).deployment({"A": "1"}))(type("Some", (), {}))
        assert made.name == "echox"


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("--replicas", "0", "--cpus", "0"), "replicas is 0, not above 0; cpus is 0.0, not above 0"),
        (("--gpus", "-1"), "gpus is -1, below 0"),
        (("--gpus", "1.5"), "gpus is 1.5: above 1, only whole ones"),
        (("--autoscale", "3:2"), "at most 2 replicas are fewer than 3"),
        (("--autoscale", "3"), "--autoscale 3 is not MIN:MAX"),
        (("--autoscale", "a:b"), "--autoscale a:b is not MIN:MAX"),
        (("--port", "0"), "port is 0, not from 1 to 65535"),
        (("--waiting", "-1"), "waiting is -1, not above 0"),
    ],
)
def test_what_cannot_be_is_one_sentence(words: tuple[str, ...], error: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert serve.main(["/shared/runs/echo", *words]) == LaunchError("").exit_code
    said = capsys.readouterr().err
    assert said.startswith(f"error: {error}") and " Fix: " in said and said.count("\n") == 1


def test_a_cluster_without_room_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0})
    monkeypatch.delenv("ECHOX_AUTOSCALED", raising=False)
    check_room(serving("--replicas", "4"))
    with pytest.raises(LaunchError, match=r"2 replicas need more than the cluster has: 2 GPU \(0\), 6 CPU \(4\)"):
        check_room(serving("--replicas", "2", "--gpus", "1", "--cpus", "3"))
    monkeypatch.setenv("ECHOX_AUTOSCALED", "1")
    check_room(serving("--gpus", "1"))


def test_replicas_get_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("ECHOX_SERVE_TOKEN", "secret")
    monkeypatch.setenv("ECHOX_CACHE", "/shared/cache")
    monkeypatch.delenv("ECHOX_DEVICE", raising=False)
    given = process_environment(2.0, 0.0)
    assert (
        given["ECHOX_CACHE"] == "/shared/cache" and given["OMP_NUM_THREADS"] == "2" and "secret" not in given.values()
    )
    assert given["ECHOX_DEVICE"] == "cpu" and process_environment(1.0, 1.0).get("ECHOX_DEVICE") != "cpu"


def test_other_machines_are_let_in_by_a_token_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from launch.serving import replica

    monkeypatch.setattr(replica, "load", lambda run, vocoder, speaker: pytest.fail("it is refused before models load"))
    monkeypatch.delenv("ECHOX_SERVE_TOKEN", raising=False)
    with pytest.raises(LaunchError, match="whoever reaches 0.0.0.0 could use it, for no token is set") as refused:
        replica.Replica(serving("--host", "0.0.0.0"))
    assert "ECHOX_SERVE_TOKEN" in refused.value.fix


def test_another_cluster_gets_a_job(submitted: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    address = "http://head:8265"
    for words in (["--address", address, "--port", "9"], [f"--address={address}", "--port", "9"]):
        assert serve.main(["/shared/runs/echo", *words]) == 0
        assert submitted[-2:] == [address, ["launch.serve", "/shared/runs/echo", "--port", "9"]]
    assert "submitted serve-" in capsys.readouterr().out


def test_the_last_error_is_why_a_replica_does_not_start() -> None:
    said = """Deploying application echox failed: The deployment failed to start 2 times in a row:
ray::ServeReplica:echox:echox.initialize_and_get_metadata() (pid=1, ip=127.0.0.1)
  File "x.py", line 3, in __init__
    raise CheckpointError("an s2t run does not speak")
echox.errors.CheckpointError: an s2t run does not speak. Fix: name a run of the echo stage
"""
    assert start_failure(said) == ("an s2t run does not speak", "name a run of the echo stage")
    assert start_failure("x\nMemoryError: no room.") == ("no room", "see the log of the job")
    assert start_failure("it is so")[0] == "it is so" and start_failure("")[0] == "Ray Serve does not say why"
