"""`echox plan`: its parts against real modules, and what it says where a recipe does not fit."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from echox.bench.plan.forecast import GIB, forecast, largest_micro_batch
from echox.bench.plan.load import Sample, counts, rows_of, stage_costs, template_tokens
from echox.bench.plan.memory import activation_bytes, state_bytes
from echox.bench.plan.shapes import stage_shape
from echox.bench.plan.timing import link_bytes, step_flops
from echox.cli import main
from echox.config.load import load_recipe
from echox.engine.hardware import GPUS

README = Path(__file__).resolve().parents[2] / "echox" / "bench" / "README.md"
H100 = GPUS["h100"]


@pytest.fixture(autouse=True)
def no_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is downloaded: shapes are the published ones."""
    monkeypatch.setenv("ECHOX_CACHE", str(tmp_path))


@pytest.mark.parametrize("recipe", ["demo/s2t", "demo/t2c", "demo/echo", "3b/s2t", "3b/echo", "8b/t2c", "8b/echo"])
@pytest.mark.parametrize("gpus", [1, 8, 64, 1024])
def test_memory_never_falls_and_time_is_positive(recipe: str, gpus: int) -> None:
    loaded = load_recipe(recipe)
    shape, rows = stage_shape(loaded), rows_of(loaded, Sample())
    parts = [activation_bytes(loaded, shape, rows, samples) for samples in (1, 2, 3, 8, 64)]
    chunks = [found.pop("a chunk of logits") for found in parts]
    sizes = [sum(found.values()) for found in parts]
    assert sizes == sorted(sizes) and sizes[0] > 0 and sizes[1] == pytest.approx(2 * sizes[0])
    assert chunks == sorted(chunks) and chunks[0] > 0
    found = forecast(loaded, H100, "h100", gpus)
    assert found.step_s > 0 and 0 < found.mfu < 0.44
    assert found.global_batch == found.micro_batch * found.micro_batches * gpus
    assert found.global_batch >= min(loaded.data.global_batch, gpus)


def test_what_is_said_to_fit_does_and_one_sample_more_does_not() -> None:
    recipe = load_recipe("8b/echo")
    shape, rows = stage_shape(recipe), rows_of(recipe, Sample())
    limit = 74 * GIB
    most = largest_micro_batch(recipe, shape, rows, 8, limit)

    def memory(samples: int) -> float:
        parts = {**state_bytes(recipe, shape, 8), **activation_bytes(recipe, shape, rows, samples)}
        return sum(parts.values()) + GIB

    assert memory(most) <= limit < memory(most + 1)
    assert 0 < most < largest_micro_batch(recipe, shape, rows, 8, 2 * limit)


def test_sharding_divides_by_the_ranks_and_pads_each_tensor() -> None:
    recipe = load_recipe("3b/echo", ["engine.frozen_placement=shard"])
    shape = stage_shape(recipe)
    alone, seven = state_bytes(recipe, shape, 1), state_bytes(recipe, shape, 7)
    for part in ("frozen weights", "trainable weights", "fp32 master weights", "Adam's moments", "gradients"):
        assert 0 <= seven[part] * 7 - alone[part] <= 7 * 8 * (len(shape.frozen) + len(shape.trainable))
    offloaded = load_recipe("8b/echo", ["engine.deepspeed=ds_configs/zero3_8b_offload.json"])
    assert state_bytes(offloaded, stage_shape(offloaded), 8)["Adam's moments"] == 0


def test_replicated_frozen_weights_are_neither_divided_nor_sent() -> None:
    whole, shard = load_recipe("3b/echo"), load_recipe("3b/echo", ["engine.frozen_placement=shard"])
    shape = stage_shape(whole)
    assert state_bytes(whole, shape, 64)["frozen weights"] == 2 * sum(shape.frozen)
    sent = link_bytes(whole, shape, 8, 1)
    assert sent["gradients"] == pytest.approx(7 / 8 * 2 * sum(shape.trainable))
    assert sent["weights"] == pytest.approx(sent["gradients"]), "what trains is gathered once a step"
    assert link_bytes(shard, shape, 8, 1)["weights"] > 20 * sent["weights"]
    hpz = load_recipe("3b/echo", ["engine.frozen_placement=hpz"])
    assert link_bytes(hpz, shape, 512, 1)["weights"] == pytest.approx(
        link_bytes(shard, shape, 8, 1)["weights"], rel=0.02
    )
    assert sum(link_bytes(whole, shape, 1, 1).values()) == 0


@pytest.mark.parametrize(
    ("hardware", "overrides", "sentence"),
    [
        (
            "h100",
            ["data.micro_batch=128", "data.global_batch=1024"],
            r"128 samples at once do not fit: set data\.micro_b",
        ),
        ("rtx4090", [], r"Not one sample fits: set engine\.frozen_placement=shard"),
    ],
)
def test_a_gpu_that_is_too_small_says_what_to_change(hardware: str, overrides: list[str], sentence: str) -> None:
    recipe = load_recipe("8b/echo", overrides)
    (advice,) = forecast(recipe, GPUS[hardware], hardware, 8).advice
    assert re.match(sentence, advice)
    changed = re.findall(r"[\w.]+=\w+", advice)
    helped = forecast(load_recipe("8b/echo", [*overrides, *changed]), GPUS[hardware], hardware, 8)
    assert helped.advice == () and sum(helped.memory.values()) <= helped.limit


def test_no_setting_helps_a_gpu_that_cannot_hold_the_states() -> None:
    recipe = load_recipe("8b/s2t", ["data.batch_for=null"])
    *_, advice = forecast(recipe, GPUS["rtx4090"], "rtx4090", 1, sample=Sample(question_s=30)).advice
    assert advice.startswith("Not one sample fits, also with")


def test_a_batch_that_does_not_divide_is_named() -> None:
    found = forecast(load_recipe("8b/echo", ["data.batch_for=null"]), H100, "h100", 512)
    assert found.micro_batch == 1 and found.global_batch == 512
    assert any("data.global_batch=512" in each for each in found.advice)


@pytest.mark.parametrize("gpus", [1, 2, 8, 64, 96, 512])
def test_a_batch_that_grows_with_the_gpus_keeps_its_micro_batches(gpus: int) -> None:
    found = forecast(load_recipe("8b/echo", [f"scaling.workers={gpus}"]), H100, "h100", gpus)
    assert (found.micro_batch, found.global_batch) == (8, 16 * gpus)
    grown = [each for each in found.advice if f"A step has {16 * gpus:,} samples on {gpus} ranks" in each]
    assert len(grown) == (gpus != 8)
    if gpus == 512:
        assert (
            "64 times the 128 for 8" in grown[0] and "optim.steps=39 is as many samples as 2500 were there" in grown[0]
        )


@pytest.mark.parametrize(
    ("asked", "hardware", "gpus", "found"),
    [
        ("auto", "h200", 64, "replicate"),
        ("auto", "rtx4090", 64, "hpz"),
        ("auto", "rtx4090", 8, "shard"),
        ("hpz", "h200", 64, "hpz"),
    ],
)
def test_the_plan_places_frozen_weights_as_the_run_does(asked: str, hardware: str, gpus: int, found: str) -> None:
    memory, expected = (
        forecast(
            load_recipe("8b/echo", [f"engine.frozen_placement={placement}"]), GPUS[hardware], hardware, gpus
        ).memory
        for placement in (asked, found)
    )
    assert memory == expected
    shape = stage_shape(load_recipe("8b/echo"))
    share = {"replicate": 1.0, "hpz": 1 / 8 + 1 / gpus, "shard": 1 / gpus}[found]
    assert memory["frozen weights"] == pytest.approx(2 * sum(shape.frozen) * share, rel=1e-3)


def test_a_survey_costs_forwards_and_gathers() -> None:
    recipe = load_recipe("3b/echo")
    shape = stage_shape(recipe)
    once, four = link_bytes(recipe, shape, 8, 1), link_bytes(recipe, shape, 8, 4)
    assert four["gradients"] == 4 * once["gradients"] and four["weights"] == once["weights"]
    divided = load_recipe("3b/echo", ["engine.frozen_placement=shard"])
    once, four = link_bytes(divided, shape, 8, 1), link_bytes(divided, shape, 8, 4)
    assert four["weights"] - once["gradients"] == pytest.approx(6 * (once["weights"] - once["gradients"]))
    one, split = (
        forecast(recipe, H100, "h100", 8),
        forecast(load_recipe("3b/echo", ["data.micro_batch=4"]), H100, "h100", 8),
    )
    assert split.micro_batches == 4 and split.flops == pytest.approx(one.flops)
    assert split.parts["LLM"].compute_s > 1.3 * one.parts["LLM"].compute_s


def test_flops_grow_with_samples_and_length() -> None:
    recipe = load_recipe("3b/s2t")
    shape, rows = stage_shape(recipe), rows_of(recipe, Sample())
    one, two = (step_flops(recipe, shape, rows, samples) for samples in (1, 2))
    assert two == pytest.approx({part: 2 * flops for part, flops in one.items()})
    longer = step_flops(recipe, shape, rows_of(recipe, Sample(question_s=20)), 1)
    assert longer["speech_encoder"] > 2 * one["speech_encoder"]
    assert longer["head"] == one["head"]


def test_every_count_that_costs_something_is_counted() -> None:
    for name in ("demo/s2t", "demo/t2c", "demo/echo", "3b/echo"):
        recipe = load_recipe(name)
        counted = counts(recipe, rows_of(recipe, Sample()), 1)
        wanted = {count for row in stage_costs(recipe, stage_shape(recipe)).values() for count in row}
        assert wanted <= counted.keys()


def test_template_tokens_count_special_ones_as_one() -> None:
    assert template_tokens("<|begin|><|user|>\n\nabcdef") == 2 + 2
    assert template_tokens("") == 0


def _printed() -> list[tuple[str, str]]:
    """Commands of `echox plan` in the README, and what stands below each."""
    text = README.read_text(encoding="utf-8")
    return re.findall(r"```bash\n(echox plan [^\n]+)\n```\n\n### (.+?)\n\n(?=`)", text, flags=re.DOTALL)


def test_the_readme_shows_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    found = _printed()
    assert len(found) == 2
    for command, shown in found:
        assert main(shlex.split(command)[1:]) == 0
        assert _cells(capsys.readouterr().out) == _cells(f"# {shown}")


def _cells(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.splitlines() if line.strip()]


def test_json_says_that_nothing_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "3b/echo", "--gpus", "64", "--hardware", "h200", "--hours", "505", "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert found["measured"] is False and found["gpus"] == 64 and found["pass_hours"] > 0
    assert found["parts"]["LLM"]["bound"] in ("compute", "memory", "host")


def test_the_number_of_gpus_has_bounds() -> None:
    for number in ("0", "1025"):
        with pytest.raises(SystemExit):
            main(["plan", "3b/echo", "--gpus", number])
