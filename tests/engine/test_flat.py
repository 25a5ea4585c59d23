"""What trains lies in a few flat parameters, and nobody but ZeRO-3 can tell: values, gradients, names, checkpoints."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from toy import ToyOptions, ToyStage, toy_recipe

from echox.bench.plan.shapes import stage_shape
from echox.builders.setup import build_stage
from echox.config.deepspeed import load_deepspeed
from echox.config.load import load_recipe
from echox.engine.checkpoint.sharded_state import HostState, put_back, slices_file
from echox.engine.context import LocalContext
from echox.engine.deepspeed_engine import Engine, trainable_groups
from echox.engine.flat import ALIGNMENT, FlatTrainables, Piece, pieces
from tests import tiny

MOST = 16
"""Trainable tensors that ZeRO-3 may see."""


def flattened(stage: nn.Module, ranks: int = 3) -> FlatTrainables:
    flat = FlatTrainables(stage, trainable_groups(stage), ranks)
    for parameter in flat.flats:
        parameter.ds_numel = parameter.numel()  # as ZeRO-3 notes it
    return flat


def total(stage: Any, batch: Any) -> torch.Tensor:
    torch.manual_seed(7)
    return sum(term.total for term in stage(batch).values())  # type: ignore[return-value]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_losses_and_gradients_are_those_of_single_tensors(checkpointing: bool) -> None:
    single = tiny.echo_stage(pseudo_text="free_run", free_run_tokens=6)
    if checkpointing:
        single.s2t.causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
    stage, batch = copy.deepcopy(single).train(), tiny.speech_batch(3)
    flat = flattened(stage)
    expected = total(single.train(), batch)
    expected.backward()
    flat.bind()
    found = total(stage, batch)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    found.backward()
    gradients = {name: part.grad for name, part in single.named_parameters() if part.requires_grad}
    assert [place.name for place in flat.tensors] == list(gradients)
    for place in flat.tensors:
        part = flat.flats[place.flat].grad[place.start : place.stop].view(place.shape)
        single_grad = gradients[place.name]
        wanted = torch.zeros(place.shape) if single_grad is None else single_grad
        torch.testing.assert_close(part, wanted, rtol=1e-5, atol=1e-7, msg=lambda text, n=place.name: f"{n}: {text}")
    assert sum(p.requires_grad for p in stage.parameters()) == 0, "the modules own nothing that trains"


def test_a_of_maps_with_one_input_is_one_view_that_nobody_copies() -> None:
    stage = tiny.echo_stage()
    weights = {name: p.detach().clone() for name, p in stage.named_parameters() if ".lora_A." in name}
    flat = flattened(stage)
    attention = stage.s2t.causal_lm.model.layers[1].self_attn
    stacked = attention.q_proj.lora_input.stacked
    at = "s2t.llm.base_model.model.model.layers.1.self_attn.{}_proj.lora_A.default.weight"
    assert torch.equal(stacked, torch.cat([weights[at.format(which)] for which in "qkv"]))
    assert stacked.untyped_storage().data_ptr() == flat.flats[flat.tensors[0].flat].untyped_storage().data_ptr()
    assert stage.s2t.causal_lm.model.layers[0].mlp.up_proj.lora_input.stacked is not None


def test_shared_tensors_stay_shared_and_begin_where_kernels_want_them() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
            self.second.weight = self.first.weight

        def parameter_groups(self) -> dict[str, list[str]]:
            return {"lora": [name for name, _ in self.named_parameters()]}

    tied, x = Tied(), torch.randn(2, 3)
    expected = tied.second(tied.first(x))
    flat = flattened(tied)
    flat.bind()
    assert tied.first.weight is tied.second.weight
    assert torch.equal(tied.second(tied.first(x)), expected)
    assert all(place.start % ALIGNMENT == 0 for place in flat.tensors)
    assert all(part.numel() % 3 == 0 for part in flat.flats)


@pytest.mark.parametrize("ranks", [1, 2, 3, 7, 64])
def test_the_ranks_hold_every_element_once(ranks: int) -> None:
    flat = flattened(tiny.echo_stage(), ranks)
    held: dict[str, list[Piece]] = {}
    for rank in range(ranks):
        for piece in pieces(flat, rank, ranks):
            held.setdefault(piece.place.name, []).append(piece)
            size = flat.flats[piece.place.flat].numel() // ranks
            assert piece.offset >= 0 and piece.offset + piece.stop - piece.start <= size
            if piece.stop > piece.start:
                assert rank * size + piece.offset == piece.place.start + piece.start
    for place in flat.tensors:
        covered = [index for piece in held[place.name] for index in range(piece.start, piece.stop)]
        assert covered == list(range(place.shape.numel()))


@pytest.mark.parametrize("stage", ["s2t", "t2c", "echo"])
@pytest.mark.parametrize("scale", ["3b", "8b", "small", "demo"])
def test_zero_sees_few_tensors_at_every_shipped_recipe(scale: str, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(f"{scale}/{stage}", ["model.random_init=true"])
    text: Any = SimpleNamespace(
        words=100, word_units=[1] * 100, prefix=[1], header=[2], stop=3, prompt=SimpleNamespace(end=4, unseen=None)
    )
    text.characters = lambda t2c: None
    monkeypatch.setattr("echox.builders.setup.earlier_tensors", lambda *which: {})
    with torch.device("meta"):
        built = build_stage(recipe, text)
    before = sum(p.requires_grad for p in built.parameters())
    elements = sum(p.numel() for p in built.parameters() if p.requires_grad)
    flat = flattened(built, 512)
    assert len(flat.flats) <= MOST < before
    assert 0 <= sum(p.numel() for p in flat.flats) - elements < len(flat.flats) * 512 * ALIGNMENT + before * ALIGNMENT
    if scale in ("3b", "8b"):
        assert stage_shape(recipe).flats == len(flat.flats), "the plan counts as many"
    print(f"{scale}/{stage}: {before} trainable tensors, {len(flat.flats)} flat ones")


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    """Of the toy, alone."""
    recipe = toy_recipe("alone", tmp_path / "ds.json", data__micro_batch=8)
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 3, "overlap_comm": false}}')
    torch.manual_seed(0)
    with LocalContext(tmp_path):
        config = load_deepspeed(
            tmp_path / "ds.json", global_batch=8, micro_batch=8, world_size=1, clip=1.0, precision="fp32"
        )
        made = Engine(recipe, ToyStage(ToyOptions()), device=torch.device("cpu"), precision="fp32", config=config)
        yield made
        made.close()


def test_checkpoints_from_before_and_after_hold_the_same(engine: Engine, tmp_path: Path) -> None:
    """Before, every rank had ceil(elements / ranks) of each tensor by itself."""
    kinds, ranks = ("fp32", "exp_avg", "exp_avg_sq"), 3
    wanted = {
        f"{kind}/{place.name}": torch.randn(place.shape.numel())
        for kind in kinds
        for place in engine.trainables.tensors
    }
    (tmp_path / "zero").mkdir()
    for rank in range(ranks):
        cut = {name: value.split(-(-value.numel() // ranks)) for name, value in wanted.items()}
        own = {name: parts[rank].clone() if rank < len(parts) else torch.zeros(0) for name, parts in cut.items()}
        save_file(own, str(tmp_path / slices_file(rank)))
    addresses = [flat.data_ptr() for flat in engine.trainables.flats]
    put_back(engine, tmp_path, rank=0, ranks=1, saved_ranks=ranks, updates=4)
    host = HostState()
    host.copy_from(engine, rank=0, ranks=1)
    assert host.updates == 4 and host.tensors.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(host.tensors[name], value), name
    assert [flat.data_ptr() for flat in engine.trainables.flats] == addresses, "where the views look"
    engine.refresh()
    for place in engine.trainables.tensors:
        module, _, attribute = place.name.rpartition(".")
        have = getattr(engine.stage.get_submodule(module), attribute)
        assert torch.equal(have.detach().reshape(-1), wanted[f"fp32/{place.name}"])
