"""Batches on their way to a device: pinned by the threads that read them, so that a GPU copies them by itself."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, Self

import pytest
import torch
from torch import Tensor

from echox.builders import data
from echox.config.load import load_recipe
from echox.stream.quarantine import Allowance
from echox.stream.reader import StreamReader
from echox.stream.sampling.batching import SampleBudget
from echox.stream.storage.store import ShardStore
from echox.stream.validation import ValidReader
from tests import tiny
from tests.stream.datasets import make_dataset
from tests.stream.streaming import Batch, Collate, plan_of


def test_every_tensor_of_a_batch_is_pinned_and_goes_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[int] = []
    ways: list[bool] = []
    to = Tensor.to

    def pin_memory(tensor: Tensor) -> Tensor:
        found = tensor.clone()
        pinned.append(id(found))
        return found

    def noted(tensor: Tensor, device: Any, non_blocking: bool = False) -> Tensor:
        assert id(tensor) in pinned
        ways.append(non_blocking)
        return to(tensor, device)

    batch = tiny.speech_batch(3)
    tensors = {name: value for name, value in vars(batch).items() if isinstance(value, Tensor)}
    monkeypatch.setattr(Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(Tensor, "to", noted)
    ready = batch.pinned()
    assert len(pinned) == len(tensors) > 9 and ready.ids == batch.ids and ready.account is batch.account
    assert all(torch.equal(getattr(ready, name), value) for name, value in tensors.items())
    moved = ready.to("cpu")
    assert ways == [True] * len(tensors)
    assert id(moved.frames_on_host_B) in pinned and id(moved.transcript_lengths_on_host_B) in pinned


class _Batch(Batch):
    def pinned(self) -> Self:
        self.by = threading.current_thread().name
        return self


class _Collate(Collate):
    def join(self, rows: Any, step: int) -> Batch:
        return _Batch(list(rows), step)

    def blank(self, step: int) -> Batch:
        return _Batch([], step)


@pytest.mark.parametrize("pin", [False, True])
def test_the_threads_that_read_pin(tmp_path: Path, pin: bool) -> None:
    plan = plan_of([make_dataset(tmp_path / "a", 23, per_shard=5, seed=1)])
    stores = [ShardStore(each.catalogue) for each in plan.sources]
    reader = StreamReader(
        plan, stores, _Collate(), rank=0, world_size=1, threads=2, prefetch=3, allowance=Allowance(None, 1.0), pin=pin
    )
    reader.start(step=0, run_folder=tmp_path, saved=None)
    found = {getattr(batch, "by", "nobody")[:6] for batch in reader.step(0)}
    reader.close()
    valid = ValidReader(
        plan.sources[0], ShardStore(plan.sources[0].catalogue), _Collate(), SampleBudget(4, 1, False),
        by_tokens=False, rank=0, world_size=1, threads=2, prefetch=2, pin=pin,
    )  # fmt: skip
    found |= {getattr(batch, "by", "nobody")[:5] for batch in valid}
    assert found == ({"reader", "valid"} if pin else {"nobody", "nobod"})


def test_batches_are_pinned_where_there_is_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_dataset(tmp_path / "a", 23, per_shard=5, seed=1)
    recipe = load_recipe("demo/s2t", [f"data.train=[{{path: {tmp_path / 'a'}, task: sqa}}]"])
    sources = plan_of([tmp_path / "a"]).sources
    for gpus in (0, 2):
        monkeypatch.setattr(data, "usable_gpus", lambda gpus=gpus: gpus)
        reader = data.train_reader(recipe, sources, Collate(), 0, 1)
        valid = data.valid_readers(recipe, sources, Collate(), 0, 1)
        assert {reader._pin, *(each._pin for each in valid.values())} == {gpus > 0}
        reader.close()
