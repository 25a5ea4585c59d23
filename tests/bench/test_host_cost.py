"""The host's work for a step hardly grows with the number of ranks; counted, not timed."""

from __future__ import annotations

import pytest

from echox.bench.host_cost import measured_apart

pytestmark = pytest.mark.timeout(600)


def test_a_step_on_512_ranks_costs_the_host_hardly_more_than_on_8() -> None:
    few, many = (measured_apart("3b/s2t", ranks, steps=1) for ranks in (8, 512))
    assert few["trainable"] == many["trainable"] <= 16
    assert few["python_calls"] < 120_000, "of 534,000 with a hook on every module, and 423 tensors"
    assert many["python_calls"] <= 1.15 * few["python_calls"]
    assert many["operators"] <= 1.3 * few["operators"]
    assert many["operators"] - few["operators"] <= 512 * 2 * many["trainable"], "a slice or two a tensor and rank"
