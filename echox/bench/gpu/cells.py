"""Lists the cells of a measurement and runs them one by one: each may fail alone, run out of memory, or lack time."""

from __future__ import annotations

import gc
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from echox.bench.gpu.build import build, vocabulary_of
from echox.bench.gpu.ceilings import Ceilings, measure_ceilings
from echox.bench.gpu.checks import CHECKS
from echox.bench.gpu.measure import measure_step, planned
from echox.bench.gpu.results import Results
from echox.bench.gpu.sizes import SIZES, STAGES
from echox.bench.imposed import imposed
from echox.bench.micro_batch import micro_batch
from echox.bench.optimizer import NOTE
from echox.bench.plan.shapes import RANDOM_WORDS
from echox.bench.teacher import measure_teacher, random_teacher, random_text
from echox.bench.techniques import TECHNIQUES, technique
from echox.release.shapes import SHAPES

BATCHES = 3
CEILINGS = "ceilings"
LADDERS = {
    "echo": tuple(each.name for each in TECHNIQUES if each.name != "eager layers"),
    "s2t": ("packed rows", "trimmed audio", "heads in chunks", "variable-length attention"),
}
"""Stage to the techniques that are switched off in it; compiling takes more time than the nine minutes leave."""
_NUMBERS = {"s2t": "I", "t2c": "II", "echo": "III"}
_BUILD_S = {"3b": 12.0, "8b": 25.0, "toy": 1.0}


@dataclass(frozen=True)
class Cell:
    """One measurement.

    Attributes:
        name: in the results.
        half: 1 or 2.
        seconds: that it should take on a GPU, the making of the weights included.
        measure: what it does.
    """

    name: str
    half: int
    seconds: float
    measure: Callable[[Workshop], Any]


class Workshop:
    """The device, and the stage that was built last: cells of the same stage share its weights.

    Args:
        device: to measure.
        results: where the ceilings are kept.
        step_s: seconds of timed steps in each cell.
    """

    def __init__(self, device: torch.device, results: Results, step_s: float = 4.0) -> None:
        self.device = device
        self.step_s = step_s
        self.results = results
        gpu = device.type == "cuda"
        self.dtype = torch.bfloat16 if gpu else torch.float32
        self._made: tuple[tuple[str, str], Any, list[Any]] | None = None

    def about(self) -> dict[str, Any]:
        """What is measured, and with what."""
        import transformers

        gpu = self.device.type == "cuda"
        return {
            "device": torch.cuda.get_device_name(self.device) if gpu else f"CPU, {torch.get_num_threads()} threads",
            "memory_gib": torch.cuda.get_device_properties(self.device).total_memory / 2**30 if gpu else None,
            "dtype": str(self.dtype).removeprefix("torch."),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "note": NOTE,
        }

    @property
    def ceilings(self) -> Ceilings:
        """Of this device, measured once."""
        found = self.results.cells.get(CEILINGS, {})
        if found.get("status") != "done":
            values = asdict(measure_ceilings(self.device, self.dtype))
            self.results.cells[CEILINGS] = found = {"status": "done", "seconds": 0.0, "values": values, "why": ""}
        return Ceilings(**found["values"])

    def stage(self, size: str, stage: str) -> tuple[Any, list[Any]]:
        """A stage and its batches, new unless it is the one built last."""
        if self._made is None or self._made[0] != (size, stage):
            self.forget()
            recipe = SIZES[size].recipe(stage)
            made = build(recipe, self.device, self.dtype).train()
            vocabulary, load = vocabulary_of(recipe), SIZES[size].load
            batches = [micro_batch(recipe, vocabulary, load, self.dtype, seed) for seed in range(BATCHES)]
            self._made = (size, stage), made, [batch.to(self.device) for batch in batches]
        return self._made[1:]

    def patience(self, cell: Cell) -> float:
        """Seconds after which a cell hangs; a CPU that others use as well may take its time."""
        return max(60.0, 3 * cell.seconds) if self.device.type == "cuda" else 1800.0

    def forget(self) -> None:
        """Give the memory of the last stage back."""
        self._made = None
        gc.collect()  # modules of PEFT and transformers refer to each other in circles
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def cells_of(sizes: Sequence[str], device: torch.device) -> list[Cell]:
    """All cells: checks and the first size in half 1, the others and the teachers in half 2."""
    found = [Cell(CEILINGS, 1, 10.0, lambda shop: asdict(shop.ceilings))]
    found += [Cell(f"check: {name}", 1, 8.0, _check(check)) for name, check in CHECKS.items()]
    for number, size in enumerate(sizes):
        half = 1 if number == 0 else 2
        for stage in STAGES:
            title = f"{size} {_NUMBERS[stage]}"
            seconds = 8.0 if stage == "t2c" else _BUILD_S[size] + 10.0
            found.append(Cell(title, half, seconds, _step(size, stage)))
            if stage in LADDERS:
                found.append(Cell(f"{title}, naive loop", half, 20.0, _step(size, stage, naive=True)))
                found += [
                    Cell(f"{title}, {each.without}", half, 9.0, _step(size, stage, without=each.name))
                    for each in TECHNIQUES
                    if each.name in LADDERS[stage]
                ]
    found += [Cell(f"{size} teacher", 2, 25.0, _teacher(size)) for size in sizes]
    return found


def run_cells(cells: Sequence[Cell], shop: Workshop, until: float, say: Callable[[str], None] = print) -> bool:
    """Run what is not finished, as long as there is time.

    Args:
        cells: in order.
        shop: with the results that are written to.
        until: when no cell should be running any more, as `time.time` has it.
        say: told of every cell.

    Returns:
        Whether the device still answers.
    """
    results = shop.results
    for cell in cells:
        if results.finished(cell.name):
            continue
        left = until - time.time()
        if left < cell.seconds:
            results.end(
                cell.name, "left out", why=f"{max(left, 0):.0f} s were left, and it may take {cell.seconds:.0f}"
            )
            continue
        results.begin(cell.name, shop.patience(cell))
        before = time.time()
        try:
            values = cell.measure(shop)
        except Exception as error:  # a row of the table; the other cells go on
            shop.forget()
            results.end(cell.name, "failed", why=sentence(error), seconds=time.time() - before)
            say(f"{cell.name}: failed: {sentence(error)}")
            if not _answers(shop.device):
                return False
            continue
        results.end(cell.name, "done", values=values, seconds=time.time() - before)
        say(f"{cell.name}: {time.time() - before:.1f} s")
    return True


def sentence(error: Exception) -> str:
    """The first line of an error, with its kind."""
    first = next(iter(str(error).splitlines()), "")[:300]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _answers(device: torch.device) -> bool:
    """Whether the device still computes: after some errors a process cannot use it again."""
    try:
        return int(torch.ones(1, device=device).sum()) == 1
    except RuntimeError:
        return False


def _check(check: Callable[[torch.device], str]) -> Callable[[Workshop], Any]:
    return lambda shop: check(shop.device)


def _step(size: str, stage: str, *, without: str = "", naive: bool = False) -> Callable[[Workshop], Any]:
    def measure(shop: Workshop) -> dict[str, Any]:
        made, batches = shop.stage(size, stage)
        off = technique(without) if without else None
        if off is not None and not off.applies(made, batches[0]):
            return {"applies": False}
        load, recipe = SIZES[size].load, SIZES[size].recipe(stage)
        with imposed(made, load.words_per_token):
            row = measure_step(made, batches, shop.ceilings, seconds=shop.step_s, without=off, naive=naive)
        if row.loss != row.loss:
            raise FloatingPointError("the loss is not a number")
        if off is None and not naive:
            row = replace(row, **planned(recipe, load, batches[0], shop.device, shop.ceilings))
        return asdict(row)

    return measure


def _teacher(size: str) -> Callable[[Workshop], Any]:
    def measure(shop: Workshop) -> list[dict[str, Any]]:
        shop.forget()
        recipe, load = SIZES[size].recipe("echo"), SIZES[size].load
        config: Any = recipe.model.t2c
        torch.manual_seed(0)
        with torch.device(shop.device):
            width = SHAPES[recipe.model.llm.path]["hidden_size"]
            decoder = random_teacher(config, width, RANDOM_WORDS, shop.dtype)
        tokens = 25 if size != "toy" else 6
        text, tokens_N = random_text(decoder, 4 * load.rows, tokens)
        rows = measure_teacher(decoder, text, tokens_N, load.words_per_token, repeats=2)
        return [asdict(row) for row in rows]

    return measure
