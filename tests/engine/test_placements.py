"""Four gloo processes, as two nodes of two: what each placement of frozen weights sends; all train the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import launch, prepare
from safetensors.torch import load_file
from toy import ToyOptions, ToyStage

from echox.engine.checkpoint.checkpointer import find_weights
from echox.engine.placement import check_groups, choose_placement
from echox.errors import RecipeError

pytestmark = pytest.mark.timeout(900)
WORKER = Path(__file__).parent / "placement_worker.py"
TWO_NODES = ["a", "a", "b", "b"]
STEADY = slice(2, 5)
"""Steps in which nothing is learnt any more, and after which no validation comes."""


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = prepare(tmp_path_factory.mktemp("placements"))
    zero = {"stage": 3, "overlap_comm": False, "stage3_param_persistence_threshold": 0}
    # Sizes of the toy: by default all of it would be kept after the first gather.
    zero |= {"stage3_max_live_parameters": 1, "stage3_max_reuse_distance": 1, "stage3_prefetch_bucket_size": 1}
    (folder / "ds-small.json").write_text(json.dumps({"zero_optimization": zero}))
    scenarios = [
        {"name": placement, "placement": placement, "hosts": TWO_NODES}
        for placement in ("replicate", "shard", "hpz", "auto")
    ]
    return folder, launch(folder, WORKER, 4, scenarios)


def sent(launched: tuple[Path, dict[str, Any]], run: str) -> list[dict[str, list[int]]]:
    steps: list[dict[str, list[int]]] = launched[1][run]["steps"]
    assert len(steps) == 6 + 1, "six steps and a validation"
    return steps[STEADY]


def flat_bytes() -> int:
    """Of what trains, as a multiple of 4 ranks and 64 elements; one gather for each of three flat parameters."""
    stage, total = ToyStage(ToyOptions()), 0
    trainable = {name: p for name, p in stage.named_parameters() if p.requires_grad}
    for wanted in (
        lambda n, p: p.dim() > 1 and n != "lora.weight",
        lambda n, p: p.dim() == 1,
        lambda n, p: n == "lora.weight",
    ):
        aligned = sum(-(-p.numel() // 64) * 64 for n, p in trainable.items() if wanted(n, p))
        total += -(-aligned // 256) * 256 * 4
    return total


@pytest.mark.parametrize("run", ["replicate", "auto"])
def test_replicated_frozen_weights_send_nothing_and_what_trains_is_gathered_once(launched: Any, run: str) -> None:
    assert sent(launched, run) == [{"4": [3, flat_bytes()]}] * 3


def test_frozen_weights_that_are_kept_in_each_node_do_not_cross_nodes(launched: Any) -> None:
    for step in sent(launched, "hpz"):
        assert step["4"] == [3, flat_bytes()], "between the nodes only what trains"
        assert step["2"][1] > 0, "and within them the frozen weights"


def test_frozen_weights_in_partitions_cross_nodes_every_step(launched: Any) -> None:
    frozen = 4 * sum(p.numel() for p in ToyStage(ToyOptions()).parameters() if not p.requires_grad)
    for step in sent(launched, "shard"):
        assert step.keys() == {"4"} and step["4"][1] - flat_bytes() >= frozen


def test_every_placement_trains_the_same(launched: Any) -> None:
    weights = [load_file(find_weights(launched[0] / "runs" / run)) for run in ("replicate", "shard", "hpz", "auto")]
    for other in weights[1:]:
        assert other.keys() == weights[0].keys()
        for name, value in weights[0].items():
            assert torch.equal(other[name], value), name


@pytest.mark.parametrize(
    ("asked", "share", "nodes", "found"),
    [
        ("auto", 0.25, 1, "replicate"),
        ("auto", 0.26, 1, "shard"),
        ("auto", 0.26, 2, "hpz"),
        ("hpz", 0.01, 2, "hpz"),
        ("hpz", 0.01, 1, "shard"),
        ("shard", 0.01, 2, "shard"),
        ("replicate", 2.0, 2, "replicate"),
    ],
)
def test_auto_takes_whole_weights_where_they_are_a_quarter_of_the_memory(
    asked: Any, share: float, nodes: int, found: str
) -> None:
    assert choose_placement(asked, frozen_bytes=int(share * 1000), memory_bytes=1000, nodes=nodes) == found


@pytest.mark.parametrize("hosts", ["abab", "aaab", "aabbb"])
def test_ranks_that_are_not_node_by_node_are_refused(hosts: str) -> None:
    check_groups(tuple("aabb"), 2)
    with pytest.raises(RecipeError, match=r"engine\.frozen_placement=hpz .* not one of 2 nodes of 2 ranks each"):
        check_groups(tuple(hosts), 2)
