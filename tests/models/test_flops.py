"""FLOP from sizes and lengths against torch's counter on the real modules."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from echox.builders.stages import build_s2t_stage
from echox.models.flops import flops_by_part
from echox.models.work import counts_of
from tests import tiny


def _without_pairs(stage: Any) -> float:
    """FLOP of the stage's last forward and backward, attention scores and the teacher's decode left out.

    A CTC head that trains computes its logits again in the backward, which are no useful FLOP, and yet are counted.
    """
    counts = {name: 0.0 if name.endswith("_pairs") else count for name, count in counts_of([stage.work]).items()}
    parts = flops_by_part(stage._costs, counts)
    again = parts["ctc"] if "ctc_backward" in parts else 0.0
    return again + sum(flops for part, flops in parts.items() if part != "teacher")


def _one_length(batch: Any) -> Any:
    """Clips of one length: the convolutions run on padding too."""
    frames = int(batch.frames_B.max())
    return replace(batch, frames_B=torch.full_like(batch.frames_B, frames))


def _run(stage: Any, batch: Any) -> float:
    """What torch counts in a forward and backward, but for attention scores and the teacher."""
    stage.train()
    with FlopCounterMode(display=False, depth=2) as counted:
        torch.stack([term.total for term in stage(batch).values()]).sum().backward()
    by_module = counted.get_flop_counts()
    teacher = by_module.get("EchoStage.teacher", {})
    return float(sum(by_module["Global"].values()) - sum(teacher.values()))


@pytest.mark.parametrize(
    "case", ["s2t", "s2t-align", "t2c", "echo", "echo-generated", "echo-adapters", "echo-ctc", "echo-align"]
)
def test_a_step_of_every_stage_costs_what_torch_counts(case: str) -> None:
    name, _, variant = case.partition("-")
    batch: Any = _one_length(tiny.speech_batch())
    if name == "s2t":
        config = tiny.model_config()
        if variant:
            batch.step = 0
            config = config.model_copy(update={"ctc": config.ctc.model_copy(update={"align_steps": 5})})
        stage: Any = build_s2t_stage(config, tiny.s2t_model(config))
    elif name == "t2c":
        stage, batch = tiny.t2c_stage(), _unit_batch()
    else:
        echo: dict[str, Any] = {
            "generated": {"pseudo_text": "generated"},
            "adapters": {"train_speech_adapters": True},
            "ctc": {"ctc_weight": 0.3},
            "align": {"denoising": {"dropout": 0.0, "ffn": 24, "align_steps": 5}},
        }.get(variant, {})
        stage = tiny.echo_stage(**echo)
        batch.step = 0 if variant == "align" else -1
        if variant == "generated":
            batch = replace(batch, own_BR=batch.response_BR[:, :5], own_mask_BR=batch.response_mask_BR[:, :5])
    counted = _run(stage, batch)
    assert _without_pairs(stage) == pytest.approx(counted, rel=0.01)


def _unit_batch() -> Any:
    from echox.stream.batch import UnitBatch

    lengths_N1 = torch.tensor([[3], [6], [4]])
    mask_NM = torch.arange(6) < lengths_N1
    words_NM = torch.randint(0, tiny.WORDS, mask_NM.shape)
    return UnitBatch(
        ids=["a", "b", "c"],
        step=-1,
        weight_B=torch.ones(3),
        text_BT=torch.full((3, 4), 12),
        text_mask_BT=torch.ones(3, 4, dtype=torch.bool),
        words_BM=words_NM,
        words_mask_BM=mask_NM,
    )
