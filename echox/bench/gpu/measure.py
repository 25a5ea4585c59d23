"""Times steps of a stage on a device, and says of them what a table needs: rates, FLOP, memory, shares, predictions."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from echox.bench.gpu.ceilings import Ceilings, synchronize
from echox.bench.naive import naive_losses
from echox.bench.optimizer import PlainAdamW, total_loss
from echox.bench.plan.forecast import memory_bytes
from echox.bench.plan.load import Sample, rows_of
from echox.bench.plan.shapes import stage_shape
from echox.bench.plan.timing import times
from echox.bench.techniques import Technique
from echox.engine.hardware import Gpu, known_gpu
from echox.models.work import counts_of

if TYPE_CHECKING:
    from echox.bench.micro_batch import Load
    from echox.config.schema import Recipe

WARM_UP, LEAST, MOST = 3, 3, 12
GIB = 2.0**30


@dataclass(frozen=True, kw_only=True)
class StepRow:
    """What a step does and takes; None is not known here.

    Attributes:
        ms, predicted_ms: of a step: forward, backward, optimizer; and as `echox plan` has it.
        steps: how many were timed.
        samples_s, audio_s_s: samples and seconds of audio a second.
        tokens_s: useful positions of the LLM a second, or of T2C.
        tflops: model TFLOP/s, of real positions, recomputed and padded ones left out.
        mfu_sheet, mfu_ceiling: their share of the data sheet's and of the measured matrix product's.
        peak_gib, plan_gib: memory, and as `echox plan` has it.
        teacher_share: of the time.
        host_gap: share of the time in which no kernel runs.
        kernels: that a step starts on the device.
        padding_share: of the positions computed on.
        loss: of the last step, which must be a number.
    """

    ms: float
    predicted_ms: float | None = None
    steps: int
    samples_s: float
    audio_s_s: float
    tokens_s: float
    tflops: float
    mfu_sheet: float | None
    mfu_ceiling: float
    peak_gib: float | None
    plan_gib: float | None = None
    teacher_share: float | None
    host_gap: float | None
    kernels: int | None
    padding_share: float | None
    loss: float


def measure_step(
    stage: Any,
    batches: Sequence[Any],
    ceilings: Ceilings,
    *,
    seconds: float,
    without: Technique | None = None,
    naive: bool = False,
) -> StepRow:
    """Time steps on batches that take turns, so that shapes change as in training.

    Args:
        stage: in training mode; it learns.
        batches: on its device.
        ceilings: of the device.
        seconds: that the timed steps may take, of which there are `LEAST` at least.
        without: a technique that is switched off.
        naive: the naive loop takes the stage's place.
    """
    device = next(stage.parameters()).device
    optimizer = PlainAdamW(stage)
    used: list[Any] = []
    losses: list[Tensor] = []
    works: dict[int, Any] = {}
    with ExitStack() as switched:
        for batch in batches:
            used.append(batch if without is None else switched.enter_context(without.off(stage, batch)))

        def step(number: int) -> None:
            place = number % len(used)
            batch = used[place]
            terms = naive_losses(stage, batch, limit_ends=True) if naive else stage(batch)
            loss = total_loss(stage, terms)
            loss.backward()
            optimizer.step()
            losses[:] = [loss.detach()]
            works[place] = stage.work

        _seconds(step, 0, 0 if naive else WARM_UP - 1, device)
        one = _seconds(step, WARM_UP - 1, 1, device)
        steps = max(LEAST, min(MOST, int(seconds / max(one, 1e-6))))
        steps -= steps % len(used) if steps > len(used) else 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        _teacher_seconds(stage)
        total = _seconds(step, 0, steps, device)
        teacher = _teacher_seconds(stage)
        peak = torch.cuda.max_memory_allocated(device) / GIB if device.type == "cuda" else None
        busy, kernels = (None, None) if naive else _busy(step, device)
        # The naive loop notes no work: a forward of the stage says how much there was.
        work = [_work_of(stage, batch) for batch in used] if naive else [works[place] for place in sorted(works)]
        padding = None if naive else float(stage.metrics()["perf/padding_share"])
    return StepRow(
        ms=total / steps * 1e3,
        steps=steps,
        **_rates(stage, batches, work, total / steps, ceilings),
        peak_gib=peak,
        teacher_share=teacher / total if teacher else None,
        host_gap=None if busy is None else max(0.0, 1 - busy / (total / steps)),
        kernels=kernels,
        padding_share=padding,
        loss=float(losses[0]),
    )


def planned(recipe: Recipe, load: Load, batch: Any, device: torch.device, ceilings: Ceilings) -> dict[str, Any]:
    """Milliseconds and GiB that `echox plan` has for this batch, all of whose samples it takes to be alike."""
    gpu = known_gpu(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if gpu is None:
        gpu = Gpu("", ceilings.matmul_tflops, 64.0, ceilings.copy_tb_s, 1.0)
    shape, rows = stage_shape(recipe), rows_of(recipe, sample_of(batch, load))
    parts = times(recipe, shape, rows, load.rows, gpu=gpu, gpus=1, network_gb_s=50.0, micro_batches=1)
    memory = memory_bytes(recipe, shape, rows, load.rows, 1)
    return {
        "predicted_ms": sum(part.seconds for part in parts.values()) * 1e3,
        "plan_gib": sum(memory.values()) / GIB,
    }


def sample_of(batch: Any, load: Load) -> Sample:
    """The mean lengths of a batch."""
    if hasattr(batch, "text_mask_BT"):
        text, words = float(batch.text_mask_BT.sum()), float(batch.words_mask_BM.sum())
        return Sample(reply=round(text / load.rows), words_per_token=words / text)
    reply = float(batch.response_mask_BR.sum()) / load.rows
    question = float(batch.frames_B.sum()) / 100 / load.rows
    return Sample(question_s=question, reply=round(reply), words_per_token=load.words_per_token)


@torch.no_grad()
def _work_of(stage: Any, batch: Any) -> Any:
    """What one forward in training mode notes."""
    stage(batch)
    return stage.work


def _rates(
    stage: Any, batches: Sequence[Any], work: Sequence[Any], step_s: float, ceilings: Ceilings
) -> dict[str, Any]:
    counts, number = counts_of(work), len(batches)
    weight = next(stage.parameters())
    flops = sum(stage.flops(work).values()) / number
    known = known_gpu(torch.cuda.get_device_name(weight.device)) if weight.is_cuda else None
    tflops = flops / step_s / 1e12
    return {
        "samples_s": sum(len(batch.ids) for batch in batches) / number / step_s,
        "audio_s_s": sum(batch.stats().get("audio_s", 0.0) for batch in batches) / number / step_s,
        "tokens_s": counts.get("llm", counts.get("t2c", 0.0)) / number / step_s,
        "tflops": tflops,
        "mfu_sheet": None if known is None or weight.dtype == torch.float32 else tflops / known.tflops,
        "mfu_ceiling": tflops / ceilings.matmul_tflops,
    }


def _seconds(step: Callable[[int], None], first: int, count: int, device: torch.device) -> float:
    """Of so many steps, between two moments at which the device was idle."""
    synchronize(device)
    before = time.perf_counter()
    for number in range(first, first + count):
        step(number)
    synchronize(device)
    return time.perf_counter() - before


def _teacher_seconds(stage: Any) -> float:
    return float(stage.part_seconds()["teacher"]) if hasattr(stage, "part_seconds") else 0.0


def _busy(step: Callable[[int], None], device: torch.device) -> tuple[float | None, int | None]:
    """Seconds of a step in which a kernel or copy runs, and how many there are; not known of a CPU."""
    if device.type != "cuda":
        return None, None
    from torch.profiler import ProfilerActivity, profile

    try:
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            step(0)
            synchronize(device)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # some virtual machines keep the profiler from the device: the rest of the row is known
        return None, None
    events = [event for event in profiled.events() or () if event.device_type.name == "CUDA"]
    spans = sorted((event.time_range.start, event.time_range.end) for event in events)
    return covered(spans) / 1e6, len(spans)


def covered(spans: Sequence[tuple[float, float]]) -> float:
    """Length of the union of sorted spans."""
    total, reached = 0.0, float("-inf")
    for start, end in spans:
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
