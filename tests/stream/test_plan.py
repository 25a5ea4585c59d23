from __future__ import annotations

from collections import Counter

import pytest

from echox.stream.plan import epoch_order, global_batch, micro_batches


@pytest.mark.parametrize(("samples", "size"), [(23, 5), (4, 10), (16, 8), (1, 3)])
def test_every_sample_comes_once_an_epoch(samples: int, size: int) -> None:
    epochs = 6
    steps = epochs * samples // size
    stream = [sample for step in range(steps) for sample in global_batch(samples, 3, step, size)]
    for epoch in range(steps * size // samples):
        seen = Counter(stream[epoch * samples : (epoch + 1) * samples])
        assert seen == Counter(range(samples))


def test_order_depends_on_seed_and_epoch_alone() -> None:
    assert epoch_order(50, 1, 0).tolist() == epoch_order(50, 1, 0).tolist()
    orders = {tuple(epoch_order(50, seed, epoch)) for seed in (1, 2) for epoch in (0, 1)}
    assert len(orders) == 4


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_split_a_step_without_loss_or_repetition(world_size: int) -> None:
    lengths = [float(sample * 7 % 13) for sample in range(40)]
    batch = global_batch(40, 5, 2, 16)
    ranks = [micro_batches(batch, lengths, 4, rank, world_size) for rank in range(world_size)]
    assert {len(groups) for groups in ranks} == {16 // 4 // world_size}
    flat = [sample for groups in ranks for group in groups for sample in group]
    assert Counter(flat) == Counter(batch)


def test_a_micro_batch_holds_neighbours_in_length() -> None:
    lengths = [float(sample) for sample in range(40)]
    batch = global_batch(40, 5, 0, 16)
    groups = micro_batches(batch, lengths, 4, 0, 1)
    spans = [(min(group), max(group)) for group in groups]
    assert all(left[1] < right[0] for left, right in zip(spans, spans[1:], strict=False))
