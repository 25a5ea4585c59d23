"""What a step of Stage I and III would ask of a GPU: kernels, host syncs, and the largest tensor.

Counted in the forward and the backward of a stage with the layers of the 3B models and tiny widths, in training mode
with the recipe's dropout; the optimizer, ZeRO-3 and the teacher's decode are left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from echox.models import chunked_heads, norms
from echox.models.compiled import compile_pointwise
from echox.models.greedy import BLOCK
from echox.stages import losses
from echox.stream.batch import SpeechBatch
from tests import tiny
from tests.counters import Kernels, Largest, Syncs
from tests.regions import Regions
from tests.stages import topology
from tests.stages.test_layouts import _s2t

COMPILED, ITS_REGIONS = 4_765, 2 * 2 * topology.LAYERS["3b"]
"""Kernels of Stage I where each compiled graph is one, and how many of them are graphs: rotary embedding and gated
activation of each layer, forward and backward."""
DECODE = "echox/models/greedy.py"
STAGE_I, STAGE_III, STAGE_III_OWN = 5_521, 6_127, 10_770
"""Kernels; the last where the LLM reads its own answer beside the reference. A GPU needs fewer: its attention takes
packed rows as they are. 7,394, 8,251 and 14,787 before losses read logits in chunks, maps of LoRA shared products and a
norm was one operator."""


def step(stage: nn.Module, batch: SpeechBatch) -> None:
    torch.stack([term.total for term in stage(batch).values()]).sum().backward()


def kernels_of(stage: Any, batch: SpeechBatch) -> int:
    """Without those of the teacher, if there is one."""
    inside: list[int] = []
    if hasattr(stage, "teacher"):
        decode = stage.teacher.forward

        def counted(*args: Any) -> Any:
            with Kernels() as kernels:
                found = decode(*args)
            inside.append(len(kernels.noted))
            return found

        stage.teacher.forward = counted
    with Kernels() as kernels:
        step(stage.train(), batch)
    return len(kernels.noted) - sum(inside)


def test_kernels_of_a_step_at_3b_topology(monkeypatch: pytest.MonkeyPatch) -> None:
    # On a GPU a norm is one kernel, which a CPU takes apart: `tests/models/test_fake_cuda.py` sees it whole.
    monkeypatch.setattr(norms._FusedForward, "forward", lambda norm, hidden: hidden * norm.weight)
    batch = topology.batch_of(16)
    assert kernels_of(topology.s2t_stage(), batch) <= STAGE_I
    teacher_forced = topology.echo_stage(pseudo_text="argmax_teacher_forced")
    assert kernels_of(teacher_forced, batch) <= STAGE_III
    assert kernels_of(topology.echo_stage(pseudo_text="generated"), batch) <= STAGE_III_OWN


def test_kernels_of_a_step_with_compiled_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norms._FusedForward, "forward", lambda norm, hidden: hidden * norm.weight)
    stage, batch, regions = topology.s2t_stage().train(), topology.batch_of(16), Regions()
    assert compile_pointwise(stage, regions) == (topology.LAYERS["3b"],) * 2
    step(stage, topology.batch_of(4))  # compiles
    stage.zero_grad()
    regions.reset()
    outside = kernels_of(stage, batch)
    assert regions.runs.total() == ITS_REGIONS and outside + ITS_REGIONS <= COMPILED
    # Elements of two sizes, such as those of queries and of keys, are two kernels where Inductor writes for a GPU.
    assert regions.sizes == ITS_REGIONS * 3 // 2
    assert regions.graphs == {"forward": 2, "backward": 2}
    torch._dynamo.reset()


def test_a_step_of_stage_one_waits_twice_for_the_device() -> None:
    stage, batch = topology.s2t_stage(layers=2).train(), topology.batch_of(16)
    with Syncs() as syncs:
        step(stage, batch)
    assert all(sync.marked for sync in syncs.noted), syncs.noted
    # How many frames were kept, and how long the LLM's rows are.
    assert len([sync for sync in syncs.noted if not sync.unless_known]) == 2


@pytest.mark.parametrize("pseudo_text", ["argmax_teacher_forced", "generated", "reference"])
@pytest.mark.parametrize("ctc_weight", [0.0, 0.3])
def test_a_step_of_stage_three_waits_a_few_times_and_never_for_a_token(pseudo_text: str, ctc_weight: float) -> None:
    stage = topology.echo_stage(layers=2, pseudo_text=pseudo_text, ctc_weight=ctc_weight).train()
    for rows in (3, 16):
        batch = topology.batch_of(rows)
        with Syncs() as syncs:
            step(stage, batch)
        assert all(sync.marked for sync in syncs.noted), syncs.noted
        waits = [sync for sync in syncs.noted if not sync.unless_known]
        blocks = sum(sync.file == DECODE for sync in waits) - 2
        outside = [sync for sync in waits if sync.file != DECODE]
        # Kept frames, rows of the LLM (twice where it reads its own answer), segments, rows of the Echo decoder.
        assert len(outside) == 4 + (pseudo_text == "generated"), outside
        words = stage.teacher.decoder.max_positions
        assert blocks >= 1 and len(waits) <= 8 + BLOCK * blocks / 16 <= 8 + words / 16 + 1


def test_the_front_end_and_its_ctc_head_ask_the_device_for_nothing() -> None:
    """On the meta device there is nothing to be asked: what needs a number raises."""
    stage = topology.s2t_stage(layers=1).to("meta")
    batch = topology.batch_of(4).to("meta")
    aligned, scores, frames = stage.s2t.front_end.align(*batch.audio, tokens_BC=batch.transcript_BC)
    assert aligned.shape[1] == frames.computed == int(frames.lengths_on_host_N.sum())
    assert scores.chosen is not None and scores.chosen.device.type == "meta"


def test_ctc_is_given_the_lengths_that_the_host_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    stage, batch, given = topology.s2t_stage(layers=1), topology.batch_of(4), []
    frames_B, lengths_B = batch.frames_B, batch.transcript_lengths_B
    batch.frames_B, batch.transcript_lengths_B = frames_B.clone(), lengths_B.clone()
    assert batch.transcript_lengths_on_host_B is lengths_B
    monkeypatch.setattr(losses, "_ctc", lambda log_probs, targets, *lengths: given.extend(lengths) or torch.zeros(4))
    stage(batch)
    columns = 2 * stage.s2t.front_end.alignment.stack
    assert given[1] is lengths_B and given[0].tolist() == [-(-int(frames) // columns) for frames in frames_B]


NO_CTC = {"echo", "echo-generated", "echo-align"}
STAGES: dict[str, Callable[[], nn.Module]] = {
    "s2t": lambda: _s2t("packed"),
    "s2t-padded": lambda: _s2t("padded"),
    "echo": lambda: tiny.echo_stage(),
    "echo-generated": lambda: tiny.echo_stage(pseudo_text="generated"),
    "echo-ctc": lambda: tiny.echo_stage(ctc_weight=0.3),
    "echo-adapters": lambda: tiny.echo_stage(ctc_weight=0.3, train_speech_adapters=True),
    "echo-align": lambda: tiny.echo_stage(denoising={"dropout": 0.0, "ffn": 24, "align_steps": 9}),
}


@pytest.mark.parametrize("name", STAGES)
def test_no_tensor_has_as_many_elements_as_logits_of_all_positions(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary, rows = 800, 6
    monkeypatch.setattr(tiny, "VOCABULARY", vocabulary)
    monkeypatch.setattr(chunked_heads, "CHUNK_ELEMENTS", 4096)
    stage, batch = STAGES[name]().train(), tiny.speech_batch(rows, step=0)
    batch.own_BR, batch.own_mask_BR = batch.response_BR, batch.response_mask_BR & (batch.response_BR != tiny.END)
    positions = int(batch.response_mask_BR.sum())
    assert positions < int((batch.frames_B // 8).sum()), "the response is the shorter of the two"
    with Largest() as largest:
        step(stage, batch)
    assert 0 < largest.elements < positions * vocabulary, largest.operator
    assert any(p.grad is not None for n, p in stage.named_parameters() if "ctc" in n) is not (name in NO_CTC)
