from __future__ import annotations

from echox.tracking.compare import Outcome, as_json, common, differences, outcomes
from echox.tracking.curves import Curves, Point
from echox.tracking.page import distinct_names, smooth


def curves(name: str, params: dict[str, str], **series: list[float]) -> Curves:
    """Metrics by name (`loss__total`), a value every ten steps and every half hour."""
    points = {
        key.replace("__", "/"): [Point(10 * (i + 1), value, 0.5 * (i + 1)) for i, value in enumerate(values)]
        for key, values in series.items()
    }
    return Curves(name=name, params=params, points=points)


SMALL = curves(
    "3b",
    {"scale": "3b", "optim.steps": "20", "optim.lr.lora": "1e-4", "scaling.workers": "2"},
    loss__total=[4.0, 2.0],
    loss__s2t=[3.0, 1.5],
    perf__step_ms=[1000.0, 1000.0],
    perf__tokens_per_s_per_gpu=[100.0, 300.0],
    perf__peak_gib=[10.0, 12.0],
)
LARGE = curves(
    "8b",
    {"scale": "8b", "optim.steps": "20", "optim.lr.lora": "2e-4", "engine.offload": "cpu", "scaling.workers": "2"},
    loss__total=[5.0, 1.0],
    perf__step_ms=[2000.0, 2000.0],
    perf__audio_s_per_s=[36.0, 36.0],
)


def test_only_what_differs_is_listed_by_section() -> None:
    assert differences([SMALL, LARGE]) == {
        "run": {"scale": ["3b", "8b"]},
        "engine": {"engine.offload": [None, "cpu"]},
        "optim": {"optim.lr.lora": ["1e-4", "2e-4"]},
    }


def test_tokens_and_audio_are_the_rates_over_the_steps_they_stand_for() -> None:
    # 100 tokens a second and GPU, 1 s a step, 2 GPUs, 10 steps; then three times as many.
    assert SMALL.axis("tokens", "loss/total") == [(0.002, 4.0), (0.008, 2.0)]
    assert LARGE.axis("audio", "loss/total") == [(0.2, 5.0), (0.4, 1.0)]
    assert LARGE.axis("tokens", "loss/total") == []
    assert SMALL.axis("hours", "loss/s2t") == [(0.5, 3.0), (1.0, 1.5)]


def test_outcomes_say_how_far_how_well_and_how_fast() -> None:
    found = {(line.name, line.kind): line for line in outcomes([SMALL, LARGE])}
    assert found["optimizer steps", "in all"].values == (20.0, 20.0)
    assert found["million tokens", "in all"].values == (0.008, None)
    assert found["loss/total", "final"].values == (3.0, 3.0)  # a mean over the last values
    assert found["loss/total", "best"].values == (2.0, 1.0) and found["loss/total", "best"].best() == 1
    assert found["loss/s2t", "best"].values == (1.5, None) and found["loss/s2t", "best"].best() is None
    assert found["perf/peak_gib", "peak"].values == (12.0, None)
    assert found["perf/step_ms", "median"].values == (1000.0, 2000.0) and found["perf/step_ms", "median"].best() is None
    assert Outcome("eval/x/s2t_acc", "score", (0.5, 0.7), lower_is_better=False).best() == 1


def test_curves_are_drawn_of_what_all_have() -> None:
    assert common([SMALL, LARGE], "loss/") == ["loss/total"]
    assert common([SMALL, SMALL], "loss/") == ["loss/total", "loss/s2t"]


def test_json_has_the_same_numbers() -> None:
    found = as_json([SMALL, LARGE])
    assert found["runs"] == ["3b", "8b"]
    assert found["metrics"]["loss/total"] == {"final": [3.0, 3.0], "best": [2.0, 1.0]}


def test_runs_of_one_name_are_told_apart() -> None:
    assert distinct_names({"a" * 32: "x", "b" * 32: "y"}) == ["x", "y"]
    assert distinct_names({"a" * 32: "x", "b" * 32: "x"}) == ["x (aaaaaaaa)", "x (bbbbbbbb)"]


def test_the_running_mean_is_not_late_and_keeps_both_ends() -> None:
    assert smooth([8.0, 4.0, 2.0, 1.0, 3.0], share=0.4) == [8.0, 14 / 3, 7 / 3, 2.0, 3.0]
