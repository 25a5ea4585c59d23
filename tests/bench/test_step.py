from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from echox.bench import step
from echox.builders.stages import build_s2t_stage, build_t2c_stage
from echox.cli import main
from echox.config.load import load_recipe
from echox.stream.collate import PromptTokens
from tests import tiny

LOAD = step.Load(rows=6, question_s=0.5, response=5, words=8)


def _tiny(recipe: Any, *_: Any, **__: Any) -> nn.Module:
    config = tiny.model_config()
    config = config.model_copy(update={"speech_encoder": recipe.model.speech_encoder})
    if recipe.stage == "t2c":
        return build_t2c_stage(tiny.t2c_decoder(), nn.Embedding(tiny.VOCABULARY, 32), tiny.PREFIX, tiny.HEADER)
    return build_s2t_stage(config, tiny.s2t_model(config))


@pytest.mark.parametrize("name", ["t2c", "s2t", "s2t-trim", "s2t-pad_30s"])
def test_both_layouts_are_timed_on_the_same_weights_and_agree(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = SimpleNamespace(
        tokenizer=range(tiny.VOCABULARY), words=tiny.WORDS, prompt=PromptTokens([1], [2, 3], [4, 3], tiny.END)
    )
    monkeypatch.setattr(step.TextTools, "load", lambda recipe: text)
    monkeypatch.setattr(step, "build_stage", _tiny)
    monkeypatch.setattr(step, "encoder_width", lambda ref: 16)
    monkeypatch.setattr(step, "mel_bins", lambda ref, *, random_init: 8)
    stage, _, heard = name.partition("-")
    encoder = ["model.speech_encoder.precomputed=false", f"model.speech_encoder.input={heard}"] if heard else []
    overrides = ["engine.precision=fp32", *encoder]
    result = step.run(load_recipe(f"demo/{stage}", overrides), LOAD, repeats=2)
    assert 0.1 < result.padding_share < 0.8
    assert result.loss_gap < 1e-5
    assert len(result.speedups) == 2 and all(ratio > 0 for ratio in result.speedups)
    assert set(result.ms) == {"packed", "padded"}


def test_the_command_measures_each_recipe_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[str, step.Load, int]] = []

    def run(recipe: Any, load: step.Load, *, repeats: int) -> step.StepResult:
        asked.append((recipe.name, load, repeats))
        return step.StepResult(
            name=recipe.name, padding_share=0.3, ms={"packed": 1.0, "padded": 2.0}, speedups=[2.0], loss_gap=0.0
        )

    monkeypatch.setattr(step, "run", run)
    assert main(["bench", "step", "demo/t2c", "demo/s2t", "--rows", "4", "--repeats", "2"]) == 0
    assert asked == [(name, step.Load(rows=4), 2) for name in ("demo-t2c", "demo-s2t")]
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_the_table_has_a_line_for_each_result() -> None:
    result = step.StepResult(
        name="demo-t2c", padding_share=0.3, ms={"packed": 10.0, "padded": 15.0}, speedups=[1.4, 1.5, 1.9], loss_gap=2e-7
    )
    lines = step.table([result, replace(result, name="demo-s2t")]).splitlines()
    assert lines[2] == "| demo-t2c | 30% | 10 | 15 | 1.50× (1.40 to 1.90) | 2e-07 |"
    assert len({len(re.findall(r"\|", line)) for line in lines}) == 1 and len(lines) == 4


@pytest.mark.parametrize("stage", ["s2t", "echo"])
def test_what_is_measured_is_the_stage_and_not_its_alignment(stage: str) -> None:
    recipe = load_recipe(f"demo/{stage}")
    assert recipe.align_steps > 0 and step.without_alignment(recipe).align_steps == 0
