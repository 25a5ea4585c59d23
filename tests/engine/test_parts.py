"""The engine's parts that need no processes: schedule, precision, frozen weights, fingerprints, random states, logs."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from toy import ToyOptions, ToyStage, toy_recipe

from echox.engine import precision, rng_state
from echox.engine.deepspeed_engine import adam_groups, prepare_deepspeed, spare_linear_maps, trainable_groups
from echox.engine.flat import FlatTrainables
from echox.engine.frozen import compare_identities, identify, replicate_as_buffers
from echox.engine.lr_schedule import lr_at, rate_at
from echox.engine.monitor.event_log import EventLog
from echox.engine.monitor.run_dir import RunDir
from echox.engine.monitor.update_check import fingerprint
from echox.errors import AlteredModelError, CheckpointError, MissingModelError
from tests.counters import Kernels


def test_schedule_equals_torch_schedulers() -> None:
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=2.0)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.25, total_iters=3)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=15, eta_min=0.2)
    both = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, cosine], milestones=[4])
    for step in range(20):
        expected = optimizer.param_groups[0]["lr"]
        assert lr_at(step, peak=2.0, warmup_steps=4, steps=20, final_ratio=0.1) == pytest.approx(expected, rel=1e-6), (
            step
        )
        optimizer.step()
        both.step()


def test_schedule_ends_and_degenerates() -> None:
    assert lr_at(19, peak=1.0, warmup_steps=4, steps=20, final_ratio=0.1) == pytest.approx(0.1)
    assert lr_at(99, peak=1.0, warmup_steps=4, steps=20, final_ratio=0.1) == pytest.approx(0.1)
    assert lr_at(0, peak=1.0, warmup_steps=0, steps=1, final_ratio=0.1) == 1.0
    assert lr_at(3, peak=1.0, warmup_steps=3, steps=4, final_ratio=0.1) == 1.0


def test_schedule_holds_the_peak_before_it_decays() -> None:
    held = [lr_at(step, peak=2.0, warmup_steps=2, hold_steps=5, steps=20, final_ratio=0.1) for step in range(20)]
    shifted = [lr_at(step, peak=2.0, warmup_steps=0, steps=13, final_ratio=0.1) for step in range(13)]
    assert held == [1.0, 2.0, *[2.0] * 5, *shifted]


def test_alignment_with_a_rate_is_a_cycle_of_its_own_for_the_adapters_alone(tmp_path: Path) -> None:
    two = toy_recipe("two", tmp_path, optim__steps=30, optim__lr__align=5.0, model__ctc__align_steps=10)
    one = toy_recipe("one", tmp_path, optim__steps=20)
    adapters = [rate_at(two, "adapters", step) for step in range(10)]
    assert adapters[:8] == [2.5, *[5.0] * 7]
    assert adapters[9] == pytest.approx(0.0, abs=1e-12)
    assert [rate_at(two, "lora", step) for step in range(10)] == [0.0] * 10
    for group in ("adapters", "lora"):
        assert [rate_at(two, group, step) for step in range(10, 30)] == [rate_at(one, group, s) for s in range(20)]


def test_the_alignment_of_stage_three_is_a_cycle_of_the_denoising_adapter(tmp_path: Path) -> None:
    recipe = toy_recipe(
        "echo",
        tmp_path,
        stage="echo",
        optim__steps=30,
        optim__lr__align=5.0,
        model__random_init=True,
        model__t2c={"prefix": "p", "unit_header": "h", "unit_language": "u"},
        model__echo__denoising={"align_steps": 10},
    )
    assert [rate_at(recipe, "denoising", step) for step in range(4)] == [2.5, 5.0, 5.0, 5.0]
    assert {rate_at(recipe, group, step) for group in ("echo", "lora") for step in range(10)} == {0.0}
    assert rate_at(recipe, "echo", 11) == recipe.optim.lr.echo


def test_auto_precision_follows_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for flags, expected in (({"avx2"}, "fp32"), ({"avx2", "avx512_bf16"}, "bf16"), ({"amx_bf16"}, "bf16")):
        monkeypatch.setattr(precision, "_cpu_flags", lambda flags=flags: frozenset(flags))
        assert precision.resolve_precision("auto") == expected
    assert precision.resolve_precision("bf16") == "bf16"


def test_replicating_keeps_outputs_sharing_and_trainables() -> None:
    torch.manual_seed(0)
    stage = ToyStage(ToyOptions())
    trainable = {name for name, parameter in stage.named_parameters() if parameter.requires_grad}
    x_BTD = torch.randn(2, 3, 8)
    before = stage.tied(torch.tanh(stage.tower(x_BTD)))
    names = replicate_as_buffers(stage, torch.device("cpu"), torch.float32)
    assert torch.equal(stage.tied(torch.tanh(stage.tower(x_BTD))), before)
    assert {name for name, _ in stage.named_parameters()} == trainable
    assert names == {f"{part}.{kind}" for part in ("tower.0", "tower.2", "tied") for kind in ("weight", "bias")}
    assert stage.tied.weight is stage.tower[2].weight
    assert set(stage.state_dict()) == trainable | {"classes"}
    census = precision.dtype_census(stage, names)
    assert census["frozen"] == {"torch.float32": 8 * 16 + 16 + 16 * 16 + 16 + 16}


def test_parameter_groups_cover_everything_once() -> None:
    stage, optim = ToyStage(ToyOptions()), toy_recipe("x", Path("none")).optim
    groups = trainable_groups(stage)
    named = [name for group in groups for name in group.names]
    assert sorted(named) == sorted(name for name, p in stage.named_parameters() if p.requires_grad)
    adam = adam_groups(FlatTrainables(ToyStage(ToyOptions()), groups, 2), optim)
    assert [(group["rate"], group["weight_decay"], len(group["params"])) for group in adam] == [
        ("adapters", 0.1, 1),
        ("adapters", 0.0, 1),
        ("lora", 0.1, 1),
    ]
    vectors = next(group for group in groups if not group.decays)
    assert set(vectors.names) == {"adapter.bias", "text_head.bias", "ctc_head.bias"}
    stage.parameter_groups = lambda: {"adapters": ["adapter.weight"]}  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"without a learning rate.*lora\.weight"):
        trainable_groups(stage)
    stage.parameter_groups = lambda: {"adapters": ["tower.0.weight"]}  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"frozen, unknown or grouped twice.*tower\.0\.weight"):
        trainable_groups(stage)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_fingerprint_sees_one_bit_and_a_swap(dtype: torch.dtype) -> None:
    tensor = torch.arange(1000).to(dtype)
    one = tensor.clone()
    one[500] = one[500] * 2
    swapped = tensor.clone()
    swapped[[3, 900]] = swapped[[900, 3]]
    prints = {fingerprint(value) for value in (tensor, one, swapped)}
    assert len(prints) == 3
    assert fingerprint(tensor.clone().view(10, 100)) == fingerprint(tensor)


def test_identity_follows_content_not_place(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"same")
    cache = tmp_path / "cache" / "sha256.json"
    first, second = (identify({"llm": tmp_path / name}, cache) for name in ("a", "b"))
    compare_identities(first, second)
    (tmp_path / "b" / "model.safetensors").write_bytes(b"more")
    with pytest.raises(AlteredModelError, match=r"'llm'.*changed: model\.safetensors"):
        compare_identities(first, identify({"llm": tmp_path / "b"}, cache))
    with pytest.raises(AlteredModelError, match="'teacher' is not part of this run"):
        compare_identities({**first, "teacher": first["llm"]}, first)
    with pytest.raises(MissingModelError, match="no weight files"):
        identify({"llm": tmp_path / "nowhere"})


def test_identity_cache_is_used_and_expires(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, cache = tmp_path / "m", tmp_path / "sha256.json"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"one")
    hashed: list[Path] = []
    real = identify.__globals__["sha256_file"]
    monkeypatch.setitem(identify.__globals__, "sha256_file", lambda path: hashed.append(path) or real(path))
    assert identify({"m": folder}, cache) == identify({"m": folder}, cache)
    assert len(hashed) == 1
    (folder / "model.safetensors").write_bytes(b"three")
    identify({"m": folder}, cache)
    assert len(hashed) == 2


def test_random_states_come_back() -> None:
    import random

    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    rng_state.seed_all(5)
    draw()
    state = rng_state.capture()
    expected = draw()
    rng_state.restore(state)
    assert draw() == expected
    rng_state.restore(state)
    with rng_state.untouched():
        draw()
    assert draw() == expected


def test_random_states_come_back_from_their_file(tmp_path: Path) -> None:
    import random

    def draw() -> tuple[object, ...]:
        return random.gauss(0, 1), random.random(), float(np.random.randn()), np.random.rand(), torch.randn(3).tolist()

    rng_state.seed_all(5)
    draw()  # one draw of two normal numbers leaves the second for the next
    assert random.getstate()[2] is not None and np.random.get_state()[3] == 1
    rng_state.save(rng_state.capture(), tmp_path / "states.json")
    expected = draw()
    rng_state.seed_all(6)
    assert draw() != expected
    rng_state.restore_from(tmp_path / "states.json")
    assert draw() == expected


class Runs:
    """What a pickle may ask to be done when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("kind", ["pickle", "not JSON", "a list", "short", "negative", "deep"])
def test_random_states_of_others_are_refused_and_never_run(tmp_path: Path, kind: str) -> None:
    states, mark = tmp_path / "states.json", tmp_path / "mark"
    rng_state.save(rng_state.capture(), states)
    kept = json.loads(states.read_text())
    content: dict[str, bytes] = {
        "pickle": pickle.dumps(Runs(mark)),
        "not JSON": b"{",
        "a list": b"[]",
        "short": json.dumps({**kept, "python": [3, [1, 2], None]}).encode(),
        "negative": json.dumps({**kept, "numpy": ["MT19937", [-1] * 624, 0, 0, 0.0]}).encode(),
        "deep": b"[" * 100_000,
    }
    states.write_bytes(content[kind])
    with pytest.raises(CheckpointError, match="random states are not what a run writes"):
        rng_state.restore_from(states)
    assert not mark.exists()


@pytest.mark.parametrize("content", ["", "\n", "fou"])
def test_an_attempt_that_a_crash_left_empty_is_counted_on_from_the_progress(tmp_path: Path, content: str) -> None:
    run = RunDir(tmp_path / "run")
    assert [run.next_attempt() for _ in range(4)] == [1, 2, 3, 4]
    run.write_progress(stage="t2c", step=1, steps=9, state="training", attempt=4)
    (run.path / "attempt").write_text(content)
    assert run.next_attempt() == 5
    (run.path / "attempt").write_text(content)
    run.progress_path.unlink()
    assert run.next_attempt() == 1


def test_run_folder_counts_attempts_and_forgets_steps_done_again(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    assert [run.next_attempt(), run.next_attempt()] == [1, 2]
    for step in (1, 2, 3):
        run.append_metrics(step, {"loss/total": 1 / step})
    with run.metrics_path.open("a") as file:
        file.write('{"step": 2, "cut')
    run.forget_after(2)
    assert [json.loads(line)["step"] for line in run.metrics_path.read_text().splitlines()] == [1, 2]


def test_events_are_a_line_for_people_and_a_line_of_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    EventLog(tmp_path, rank=0, attempt=2)("step", step=3, aside={"perf/x": 1.0}, loss=math.pi)
    EventLog(tmp_path, rank=1, attempt=2)("step", step=3, loss=2.0)
    assert capsys.readouterr().err.split(" ", 1)[1] == "step step=3 attempt=2 loss=3.142\n"
    record = json.loads((tmp_path / "log" / "rank-00000.jsonl").read_text())
    assert {key: record[key] for key in ("event", "rank", "step", "attempt", "loss", "perf/x")} == {
        "event": "step", "rank": 0, "step": 3, "attempt": 2, "loss": math.pi, "perf/x": 1.0,
    }  # fmt: skip
    assert (tmp_path / "log" / "rank-00001.jsonl").is_file()


def test_only_partitioned_weights_in_a_graph_meet_the_linear_map_of_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare_deepspeed(torch.device("cpu"))
    from deepspeed.runtime.zero.linear import zero3_linear_wrap
    from deepspeed.runtime.zero.partition_parameters import InsertPostInitMethodToModuleSubClasses as Patch

    plain = getattr(Patch, "linear_bk", nn.functional.linear)
    monkeypatch.setattr(nn.functional, "linear", plain)
    spare_linear_maps()
    assert nn.functional.linear is plain, "DeepSpeed has not replaced it yet"
    # What its engine does where it partitions.
    monkeypatch.setattr(Patch, "linear_bk", plain, raising=False)
    nn.functional.linear = replaced = zero3_linear_wrap
    spare_linear_maps()
    spared = nn.functional.linear
    spare_linear_maps()
    assert nn.functional.linear is spared is not replaced is not plain
    layer, x = nn.Linear(4, 3), torch.randn(2, 5, 4, requires_grad=True)
    graph = lambda: type(layer(x).grad_fn).__name__  # noqa: E731
    assert "ZeroStage3" not in graph()
    layer.weight.ds_id = 0  # type: ignore[assignment]  # as ZeRO-3 marks what it partitions
    assert "ZeroStage3" in graph()
    with torch.no_grad(), Kernels() as kernels:
        layer(x)
    assert kernels.by_name() == {"aten.addmm.default": 1}
