"""Computes the metrics of a step under their stable names."""

from __future__ import annotations

import resource
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from echox.engine.hardware import peak_flops

if TYPE_CHECKING:
    from echox.engine.deepspeed_engine import Engine
    from echox.engine.monitor.step_timer import StepTimer
    from echox.engine.step import StepSums
    from echox.engine.world import World


def step_metrics(
    engine: Engine,
    sums: StepSums,
    rates: Mapping[str, float],
    timer: StepTimer,
    world: World,
) -> dict[str, float]:
    """Metrics after one optimizer step; collective, and a host sync.

    Losses are global token means of this step; times are means since the last call; what a stage reports is
    averaged over ranks.
    """
    values = {f"loss/{name}": mean for name, mean in sums.means().items()}
    elapsed_s, step_s, data_wait_share = timer.read()  # After the losses were read: the device has finished the step.
    values |= {f"weight/{name}": float(weight) for name, weight in sums.weights.items()}
    values |= {f"lr/{name}": rate for name, rate in rates.items()}
    values["grad_norm"] = float(engine.ds.get_global_grad_norm() or 0.0)
    local = {"samples": float(sums.samples), **sums.stats, **_flops(engine, sums), **_part_seconds(engine)}
    values |= {name: total / world.size for name, total in _over_ranks(_stage_metrics(engine), world).items()}
    values |= _probed(engine, world)
    totals = _over_ranks(local, world)
    tokens = totals.get("tokens", sums.tokens())
    values["perf/step_ms"] = step_s * 1000
    values["perf/samples_per_s"] = totals["samples"] / step_s
    values["perf/tokens_per_s_per_gpu"] = tokens / step_s / world.size
    values["perf/data_wait_share"] = data_wait_share
    values["perf/peak_gib"] = peak_gib(world.device)
    values["perf/zero_trace_invalidations"] = float(engine.invalidations.count)
    values |= _skew(step_s, data_wait_share * step_s, timer.cpu_s(), world)
    if totals.get("audio_s"):
        values["perf/audio_s_per_s"] = totals["audio_s"] / step_s
    if "flops" in totals:
        values |= _utilisation(totals["flops"] / step_s / world.size, engine, world.device)
    for name in (name for name in totals if name.startswith(_SECONDS)):
        values[f"perf/{name.removeprefix(_SECONDS)}_share"] = totals[name] / world.size / elapsed_s
    if totals.get("positions") and "perf/padding_share" not in values:
        values["perf/padding_share"] = 1 - tokens / totals["positions"]
    return values


_SECONDS = "seconds of "


def _flops(engine: Engine, sums: StepSums) -> dict[str, float]:
    """FLOP of this rank's part of the step, useful positions alone, where the stage counts them."""
    if not sums.work:
        return {}
    return {"flops": sum(engine.stage.flops(sums.work).values())}


def _part_seconds(engine: Engine) -> dict[str, float]:
    """Seconds in the parts that the stage times, since they were last read."""
    if not hasattr(engine.stage, "part_seconds"):
        return {}
    return {f"{_SECONDS}{name}": seconds for name, seconds in engine.stage.part_seconds().items()}


def _utilisation(flops_per_s: float, engine: Engine, device: torch.device) -> dict[str, float]:
    """Useful FLOP/s of a rank, and their share of what its device can do, where that is known."""
    values = {"perf/tflops_per_s_per_gpu": flops_per_s / 1e12}
    peak = peak_flops(device, next(engine.stage.parameters()).dtype)
    if peak is not None:
        values["perf/mfu"] = flops_per_s / peak
    return values


def peak_gib(device: torch.device) -> float:
    """Peak memory of this process so far: of its GPU, or of the process itself on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _skew(step_s: float, wait_s: float, cpu_s: float, world: World) -> dict[str, float]:
    """How far the ranks lie apart, and which one the others wait for.

    Collectives make all steps take equally long, so the slowest rank shows in what it does between them: waiting for
    its data, and (on a CPU, where that is the computation) time of its own processor.
    """
    if world.size == 1:
        return {}
    mine_3 = torch.tensor([step_s, wait_s, cpu_s if world.device.type == "cpu" else 0.0], dtype=torch.float64)
    all_R3 = torch.zeros(world.size, 3, dtype=torch.float64, device=world.device)
    all_R3[world.rank] = mine_3.to(world.device)
    all_R3 = world.all_reduce(all_R3).cpu()
    spread_3 = 1000 * (all_R3.amax(0) - all_R3.amin(0))
    own_R = all_R3[:, 1] + all_R3[:, 2]
    names = ("perf/step_skew_ms", "perf/data_wait_skew_ms", "perf/cpu_skew_ms")
    return {**dict(zip(names, spread_3.tolist(), strict=True)), "perf/slowest_rank": float(own_R.argmax())}


def _stage_metrics(engine: Engine) -> dict[str, float]:
    found = engine.stage.metrics() if hasattr(engine.stage, "metrics") else {}
    return {name if "/" in name else f"stage/{name}": float(value) for name, value in found.items()}


def _probed(engine: Engine, world: World) -> dict[str, float]:
    """Token means over all ranks of what the stage measures with a forward of its own."""
    probe = getattr(engine.stage, "probe", None)
    if probe is None:
        return {}
    with engine.evaluating("probe"):
        terms = engine.ds(None, probe)
    sums = {name: (float(term.total), float(term.count)) for name, term in terms.items()}  # host sync
    totals = _over_ranks({name: total for name, (total, _) in sums.items()}, world)
    counts = _over_ranks({name: count for name, (_, count) in sums.items()}, world)
    return {name: total / counts[name] for name, total in totals.items() if counts[name]}


def _over_ranks(numbers: Mapping[str, float], world: World) -> dict[str, float]:
    """Sums over the ranks; every rank must bring the same names."""
    names = sorted(numbers)
    if not names:
        return {}
    packed = world.all_reduce(torch.tensor([numbers[name] for name in names], dtype=torch.float64, device=world.device))
    return dict(zip(names, packed.tolist(), strict=True))
