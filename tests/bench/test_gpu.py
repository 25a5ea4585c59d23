"""`echox bench gpu` at toy size on a CPU, with nothing but torch and transformers: so that it works the first time."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from echox.bench import naive
from echox.bench.gpu import checks, cli
from echox.bench.gpu.build import END, build, template, vocabulary_of
from echox.bench.gpu.cells import Cell, Workshop, cells_of, run_cells
from echox.bench.gpu.measure import StepRow, covered
from echox.bench.gpu.recipes import NAMES, plain_recipe, resolved
from echox.bench.gpu.report import report
from echox.bench.gpu.results import Results
from echox.bench.gpu.sizes import SIZES, STAGES
from echox.bench.gpu.supervise import BROKEN, supervise
from echox.bench.micro_batch import CORPUS_CLASSES
from echox.bench.optimizer import PlainAdamW
from echox.bench.plan.shapes import RANDOM_WORDS, stage_shape
from echox.builders.setup import build_stage
from echox.config.load import load_recipe
from echox.errors import DataError, EchoXError
from echox.models.step_graph import StepGraph
from echox.stream.collate import PromptTokens

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]
LACKING = ("ray", "mlflow", "deepspeed", "pydantic", "soundfile", "soxr", "webdataset", "braceexpand", "jiwer")
"""What the project needs and a lent machine may not have."""
WITHOUT = f"""
import sys
lacking = {LACKING!r}
class Without:
    def __init__(self, finder): self.finder = finder
    def __getattr__(self, name): return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in lacking else self.finder.find_spec(name, path, target)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
from echox.cli import main
code = main(sys.argv[1:])
assert not [name for name in sys.modules if name.partition(".")[0] in lacking]
sys.exit(code)
"""


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Results of everything, measured where the libraries of a run are not to be found."""
    path = tmp_path_factory.mktemp("gpu") / "toy.json"
    words = ["bench", "gpu", "--sizes", "toy", "--device", "cpu", "--step-s", "0", "--out", str(path)]
    command = [sys.executable, "-c", WITHOUT, *words, "--until", str(time.time() + 3600)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=580, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return Results(path)


@pytest.mark.timeout(900)
def test_every_cell_is_measured_without_the_libraries_of_a_run(toy: Results) -> None:
    wanted = [cell.name for cell in cells_of(["toy"], CPU)]
    assert list(toy.cells) == wanted and len(wanted) > 20
    assert {cell["status"] for cell in toy.cells.values()} == {"done"}
    assert toy.running is None and "no DeepSpeed" in toy.about["note"]


def test_every_step_has_every_column(toy: Results) -> None:
    for stage in ("toy I", "toy II", "toy III"):
        values = toy.cells[stage]["values"]
        assert set(values) == {field.name for field in fields(StepRow)}
        known = {name for name, value in values.items() if value is not None}
        missing = {"mfu_sheet", "peak_gib", "host_gap", "kernels"}
        missing |= set() if stage == "toy III" else {"teacher_share"}
        assert known == set(values) - missing
        assert values["ms"] > 0 and values["predicted_ms"] > 0 and values["plan_gib"] > 0 and values["tflops"] > 0
    assert 0 < toy.cells["toy III"]["values"]["teacher_share"] < 1
    assert (
        toy.cells["toy III"]["values"]["padding_share"]
        == 0
        < (toy.cells["toy III, every row padded to the longest"]["values"]["padding_share"])
    )
    steps = [cell["values"] for name, cell in toy.cells.items() if name.startswith("toy III")]
    useful = [values for values in steps if "ms" in values]
    assert len(useful) > 5
    flops = [values["tflops"] * values["ms"] for values in useful]
    assert flops == pytest.approx([flops[0]] * len(flops), rel=0.02), "useful work is that of the step, whatever is off"


def test_the_report_has_a_line_for_each(toy: Results) -> None:
    text = report(toy)
    for name, cell in toy.cells.items():
        if name == "ceilings" or isinstance(cell["values"], dict) and "applies" in cell["values"]:
            continue
        assert name.removeprefix("check: ") in text, name
    lines = [line for line in text.splitlines() if line.startswith("| toy III")]
    assert len(lines) == 1 + sum(name.startswith("toy III,") and "ms" in c["values"] for name, c in toy.cells.items())
    assert "| NO |" not in text and "not measured" not in text


def test_a_second_run_measures_nothing_again(toy: Results) -> None:
    again = [Cell(cell.name, cell.half, cell.seconds, _fails) for cell in cells_of(["toy"], CPU)]
    assert run_cells(again, Workshop(CPU, toy), time.time() + 1e4, lambda line: pytest.fail(line))


def _fails(shop: Workshop) -> Any:
    raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB\nmore")


def test_a_cell_that_fails_is_a_row_and_the_others_go_on(tmp_path: Path) -> None:
    shop = Workshop(CPU, Results(tmp_path / "r.json"))
    cells = [Cell("bad", 1, 1, _fails), Cell("long", 1, 500, _fails), Cell("good", 1, 1, lambda shop: {"n": 1})]
    assert run_cells(cells, shop, time.time() + 100, lambda line: None)
    found = Results(tmp_path / "r.json")
    assert found.cells["bad"]["status"] == "failed"
    assert found.cells["bad"]["why"] == "RuntimeError: CUDA out of memory. Tried to allocate 2 GiB"
    assert found.cells["good"]["values"] == {"n": 1} and found.cells["long"]["status"] == "left out"
    assert "500" in found.cells["long"]["why"] and not found.finished("long") and found.finished("bad")
    assert "| bad | failed: RuntimeError: CUDA out of memory" in report(found)


def test_a_device_that_no_longer_answers_ends_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("echox.bench.gpu.cells._answers", lambda device: False)
    shop = Workshop(CPU, Results(tmp_path / "r.json"))
    cells = [Cell("bad", 1, 1, _fails), Cell("good", 1, 1, lambda shop: 1)]
    assert not run_cells(cells, shop, time.time() + 100, lambda line: None)
    assert list(shop.results.cells) == ["bad"]


def test_the_halves_share_no_cell_and_leave_none_out() -> None:
    cells = cells_of(["3b", "8b"], CPU)
    names = [cell.name for cell in cells]
    assert len(set(names)) == len(names) and {cell.half for cell in cells} == {1, 2}
    for half in (1, 2):
        assert sum(cell.seconds for cell in cells if cell.half == half) > 60
    assert sum(cell.seconds for cell in cells) <= 9 * 60, "of the estimates, not of a clock"


SCRIPT = """
import os, sys, time
from pathlib import Path
from echox.bench.gpu.results import Results
results = Results(Path(sys.argv[1]))
for name, act in [("fine", lambda: None), ("hangs", lambda: time.sleep(600)), ("dies", lambda: os.kill(os.getpid(), 9)),
                  ("last", lambda: None)]:
    if not results.finished(name):
        results.begin(name, 0.5)
        act()
        results.end(name, "done")
"""


def test_a_cell_that_hangs_or_dies_ends_alone(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    supervise([sys.executable, "-c", SCRIPT, str(path)], path, time.time() + 200, say=lambda line: None)
    found = {name: (cell["status"], cell["why"]) for name, cell in Results(path).cells.items()}
    assert found == {
        "fine": ("done", ""),
        "hangs": ("failed", "it hung, and was ended"),
        "dies": ("failed", "it ended its process (signal 9)"),
        "last": ("done", ""),
    }


def test_a_process_that_ends_before_a_cell_is_an_error_and_one_that_lost_its_device_is_not(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    with pytest.raises(EchoXError, match="exit code 3"):
        supervise([sys.executable, "-c", "raise SystemExit(3)"], path, time.time() + 100)
    once = f"import sys, pathlib as p; f = p.Path(sys.argv[1]); sys.exit(0 if f.exists() else f.touch() or {BROKEN})"
    supervise([sys.executable, "-c", once, str(tmp_path / "seen")], path, time.time() + 100)


def test_results_of_another_device_are_forgotten_and_other_files_refused(tmp_path: Path) -> None:
    results = Results(tmp_path / "r.json")
    results.describe({"device": "H100"})
    results.end("a", "done")
    results.describe({"device": "H100", "torch": "2"})
    assert Results(tmp_path / "r.json").finished("a")
    results.describe({"device": "H200"})
    assert not Results(tmp_path / "r.json").finished("a")
    for text in ("{", "[]", '{"cells": 3}', "{}"):
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(DataError, match="no results"):
            Results(tmp_path / "other.json")


def test_the_exit_code_says_whether_all_checks_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = Results(tmp_path / "r.json")
    results.end("check: one", "done", values="0")
    assert cli.finish(results, as_json=False) == 0
    results.end("check: two", "failed", why="AssertionError: off")
    assert cli.finish(results, as_json=True) == 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["cells"]["check: two"]["why"] == "AssertionError: off"
    assert "| two | NO | AssertionError: off |" in (tmp_path / "r.md").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_the_recipes_are_those_that_are_trained(name: str) -> None:
    found = json.loads(json.dumps(plain_recipe(name), default=vars))
    assert found == json.loads(json.dumps(resolved(name))), "run `python -m echox.bench.gpu.recipes`"


@pytest.mark.parametrize("stage", STAGES)
def test_what_is_built_is_what_a_run_builds_and_what_is_planned(stage: str) -> None:
    recipe = SIZES["toy"].recipe(stage)
    made = build(recipe, CPU, torch.float32)
    changes = [f"{key.replace('__', '.')}={value}" for key, value in SIZES["toy"]._of(stage).items()]
    same = load_recipe(f"3b/{stage}", [*changes, "model.random_init=true"])
    vocabulary = vocabulary_of(recipe)
    t2c = recipe.model.t2c
    text: Any = SimpleNamespace(
        words=RANDOM_WORDS, word_units=[], characters=lambda t2c: None, stop=10,
        prefix=template(t2c.prefix) if t2c else [], header=template(t2c.unit_header) if t2c else [],
        prompt=PromptTokens(vocabulary.before, vocabulary.after, vocabulary.after, END),
    )  # fmt: skip
    init = same.model_copy(update={"init": type(same.init)()})
    wanted = build_stage(init, text, transcripts=range(CORPUS_CLASSES))

    def tensors(module: Any) -> dict[str, Any]:
        parameters = {name: (p.shape, p.requires_grad) for name, p in module.named_parameters()}
        return {**parameters, **{name: (b.shape, b.dtype) for name, b in module.named_buffers()}}

    assert tensors(made) == tensors(wanted) and type(made) is type(wanted)
    shape = stage_shape(recipe)
    for planned, trains in ((shape.trainable, True), (shape.frozen, False)):
        assert sum(planned) == sum(p.numel() for p in made.parameters() if p.requires_grad is trains)


def test_an_unknown_key_of_a_size_is_an_error() -> None:
    with pytest.raises(KeyError, match="model__none"):
        plain_recipe("3b/s2t", model__none=1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", list(checks.CHECKS))
def test_a_check_holds(name: str, device: str) -> None:
    assert checks.CHECKS[name](torch.device(device))


def _nothing(*given: Any) -> None:
    """In place of what does something."""


def _shifted(hidden: torch.Tensor, columns_BR: torch.Tensor) -> torch.Tensor:
    return hidden[:, columns_BR[0].clamp(min=0)]


def _scaled(stage: str, device: torch.device, dtype: torch.dtype, make: Callable[..., Any] = checks.toy) -> Any:
    made, batch = make(stage, device, dtype)
    if dtype == torch.bfloat16:
        next(p for p in made.parameters() if p.requires_grad).data.mul_(1.5)
    return made, batch


@pytest.mark.parametrize(
    ("name", "owner", "attribute", "broken"),
    [
        ("device = CPU within bf16", checks, "toy", _scaled),
        ("naive loop = engine", naive, "_at", _shifted),
        ("graph = eager", StepGraph, "__call__", _nothing),
        ("resume", PlainAdamW, "load", _nothing),
        ("rotary in float32", checks, "keep_rotary_float32", _nothing),
        ("packed attention = rows alone", checks, "_packed", lambda q, k, v, *_: q + 0 * (k.sum() + v.sum())),
    ],
)
def test_a_check_can_fail(name: str, owner: Any, attribute: str, broken: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner, attribute, broken)
    with pytest.raises(AssertionError):
        checks.CHECKS[name](CPU)


def test_the_union_of_spans_counts_no_moment_twice() -> None:
    assert covered([(0, 2), (1, 3), (5, 6), (5.5, 5.7)]) == 4
    assert covered([]) == 0


def test_the_optimizer_keeps_what_bf16_would_lose_and_is_adamw() -> None:
    torch.manual_seed(0)
    exact = torch.nn.Linear(8, 8)
    rounded = torch.nn.Linear(8, 8).to(torch.bfloat16)
    rounded.load_state_dict(exact.state_dict())
    exact.load_state_dict(rounded.state_dict())
    oracle = torch.optim.AdamW(exact.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1)
    plain = PlainAdamW(rounded)
    for _ in range(20):
        for one, other in zip(exact.parameters(), rounded.parameters(), strict=True):
            one.grad = torch.full_like(one, 0.01)
            other.grad = torch.full_like(other, 0.01)
        oracle.step()
        plain.step()
        assert all(weight.grad is None for weight in rounded.parameters())
    for one, master, weight in zip(exact.parameters(), plain.masters, rounded.parameters(), strict=True):
        torch.testing.assert_close(master, one, rtol=1e-4, atol=1e-6)
        assert torch.equal(weight, master.to(torch.bfloat16))
    before = [master.clone() for master in plain.masters]
    for weight in rounded.parameters():
        weight.grad = torch.full_like(weight, 100.0)
    plain.step()
    steps = [float((a - b).abs().max()) for a, b in zip(before, plain.masters, strict=True)]
    assert 0 < max(steps) < 2e-3
