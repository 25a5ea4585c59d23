"""What is wrong among the nodes of a run is said on every rank, all of it, before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from echox.engine.start_check import NodeReport, compare, installed, model_hash
from tests.engine.launching import launch, prepare

WORKER = Path(__file__).parent / "start_check_worker.py"
TWO = ["a", "b"]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = prepare(tmp_path_factory.mktemp("start"))
    for name in ("runs/model", "runs/other"):
        (folder / name).mkdir(parents=True)
        (folder / name / "model.safetensors").write_text(name)
    (folder / "runs" / "file").write_text("no folder")
    scenarios = [
        {"name": "healthy", "hosts": TWO},
        {"name": "one node", "storage": ["shared", "elsewhere"]},
        {"name": "unshared", "hosts": TWO, "storage": ["shared", "elsewhere"]},
        {"name": "unwritable", "hosts": TWO, "storage": ["file", "file"]},
        {"name": "all at once", "hosts": TWO, "storage": ["shared", "elsewhere"], "torch": ["2.0", "2.1"],
         "code": ["abc", "def"], "model": ["model", "other"], "sqlite": True},
        {"name": "room", "hosts": TWO, "least_free": [1 << 60] * 2},
        {"name": "absent", "hosts": TWO, "model": ["model", "nowhere"]},
        {"name": "absent everywhere", "hosts": TWO, "model": ["nowhere", "nowhere"]},
        {"name": "clock", "hosts": TWO, "clock": [0, 100]},
        {"name": "slow", "hosts": TWO, "least": 1e6},
    ]  # fmt: skip
    return launch(folder, WORKER, 2, scenarios)


def problems(outcomes: dict[str, Any], label: str) -> list[str]:
    ranks = outcomes[label]
    assert ranks[0] == ranks[1], "every rank ends with the same words"
    assert ranks[0]["code"] == 7
    first, *listed, last = ranks[0]["error"].splitlines()
    assert first.endswith("nodes of this run do not fit together:") and last == "Nothing was trained."
    return [line.removeprefix("  - ") for line in listed]


def test_healthy_nodes_are_named_and_their_fabric_measured(outcomes: dict[str, Any]) -> None:
    for rank in outcomes["healthy"]:
        assert rank["hosts"] == TWO and rank["notes"] == [] and rank["speed"] > 0
        assert rank["left"] == [], "what was written for the proof is gone"


def test_on_one_node_nothing_is_compared(outcomes: dict[str, Any]) -> None:
    assert [rank["hosts"] for rank in outcomes["one node"]] == [["one"]] * 2


def test_storage_that_is_not_shared_and_storage_that_takes_nothing(outcomes: dict[str, Any]) -> None:
    (said,) = problems(outcomes, "unshared")
    assert said.startswith("b: what rank 0 writes to ") and said.endswith("it is no place that the nodes share")
    (said,) = problems(outcomes, "unwritable")
    assert said.startswith("a: nothing can be written to ") and said.endswith("Not a directory")


def test_all_mistakes_of_all_nodes_come_at_once(outcomes: dict[str, Any]) -> None:
    said = problems(outcomes, "all at once")
    assert len(said) == 5
    assert said[1:4] == [
        "b: torch 2.1 where a has 2.0",
        "b: the project's code is another than on a (def, abc)",
        "b: model llm has other files than on a",
    ]
    assert said[0].startswith("b: what rank 0 writes")
    assert "2 nodes must not share" in said[4] and "mlflow server" in said[4]


def test_little_room_is_a_note(outcomes: dict[str, Any]) -> None:
    first, second = outcomes["room"][0]["notes"]
    assert first.startswith("a: ") and second.startswith("b: ") and second.endswith("MiB are left on the storage")


def test_models_clocks_and_bandwidth(outcomes: dict[str, Any]) -> None:
    assert problems(outcomes, "absent") == ["b: model llm is absent"]
    assert outcomes["absent everywhere"][0]["hosts"] == TWO, "the model's own error says how to get it"
    assert [rank["notes"] for rank in outcomes["clock"]] == [["the clock of b differs from a's by 100 s"]] * 2
    (said,) = problems(outcomes, "slow")
    assert "GB/s, and scaling.least_busbw=1e+06" in said


def test_shared_memory_of_a_container_is_too_small_for_gpus_alone() -> None:
    def node(gpus: bool, shared: int | None) -> NodeReport:
        return NodeReport(rank=0, host="a", versions={}, code="", models={}, free=None, shared=shared, gpus=gpus)

    (said,) = compare([node(True, 64 << 20)])
    assert said.startswith("a: /dev/shm has 64 MiB") and "--shm-size" in said
    assert compare([node(False, 64 << 20)]) == compare([node(True, 1 << 30)]) == compare([node(True, None)]) == []


def test_a_models_hash_sees_names_sizes_and_both_ends(tmp_path: Path) -> None:
    assert model_hash(tmp_path) == model_hash(tmp_path / "none") == "absent"
    file = tmp_path / "model.safetensors"
    seen = set()
    for content in (b"a" * 3_000_000, b"b" + b"a" * 2_999_999, b"a" * 2_999_999 + b"b", b"a" * 3_000_001):
        file.write_bytes(content)
        seen.add(model_hash(tmp_path))
    file.rename(tmp_path / "other.safetensors")
    assert len(seen | {model_hash(tmp_path)}) == 5
    assert {"python", "torch", "deepspeed"} <= set(installed())
