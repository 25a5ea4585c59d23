"""`echox bench step` and `echox bench teacher`: who is timed, what is compared before, and what the tables say."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from echox.bench import micro_batch, step, teacher
from echox.bench.micro_batch import Load
from echox.bench.techniques import TECHNIQUES
from echox.builders.stages import build_echo_stage, build_s2t_stage, build_t2c_stage
from echox.cli import main
from echox.config.load import load_recipe
from echox.errors import EchoXError
from echox.models.greedy import DecodedUnits
from echox.stream.collate import PromptTokens
from tests import tiny
from tests.models.test_greedy import decoder_of_layers

LOAD = Load(rows=4, question_s=0.5, response=9, least_response=7, words=8)


def _tiny(recipe: Any, *_: Any, **__: Any) -> nn.Module:
    config = tiny.model_config()
    config = config.model_copy(update={"speech_encoder": recipe.model.speech_encoder, "echo": recipe.model.echo})
    if recipe.stage == "t2c":
        return build_t2c_stage(tiny.t2c_decoder(), nn.Embedding(tiny.VOCABULARY, 32), tiny.PREFIX, tiny.HEADER)
    s2t = tiny.s2t_model(config)
    if recipe.stage == "s2t":
        return build_s2t_stage(config, s2t)
    return build_echo_stage(
        config.echo, s2t=s2t, teacher=tiny.t2c_decoder(), echo=tiny.t2c_decoder(), prefix=tiny.PREFIX,
        header=tiny.HEADER, stop_token=11, end_token=tiny.END,
    )  # fmt: skip


@pytest.fixture
def tiny_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    text = SimpleNamespace(
        tokenizer=range(tiny.VOCABULARY), words=tiny.WORDS, prompt=PromptTokens([1], [2, 3], [4, 3], tiny.END)
    )
    monkeypatch.setattr(step.TextTools, "load", lambda recipe: text)
    monkeypatch.setattr(step, "build_stage", _tiny)
    monkeypatch.setattr(micro_batch, "encoder_width", lambda ref: 16)
    monkeypatch.setattr(micro_batch, "mel_bins", lambda ref, *, random_init: 8)


@pytest.mark.parametrize("name", ["t2c", "s2t", "s2t-trim", "s2t-pad_30s", "echo"])
@pytest.mark.usefixtures("tiny_stages")
def test_engine_and_naive_loop_are_timed_on_the_same_weights_and_agree(name: str) -> None:
    stage, _, heard = name.partition("-")
    encoder = ["model.speech_encoder.precomputed=false", f"model.speech_encoder.input={heard}"] if heard else []
    report = step.run(load_recipe(f"demo/{stage}", ["engine.precision=fp32", *encoder]), LOAD, repeats=2)
    rows = {row.name: row for row in report.rows}
    assert list(rows)[:2] == ["engine", "naive loop"]
    expected = {"logits of all positions", "every row padded to the longest"}
    expected |= {"30 s of every clip encoded"} if heard == "trim" else set()
    if stage == "echo":
        expected |= {"a cache that grows, and a host sync a word", "all rows decoded until the last has ended"}
    assert set(rows) == {"engine", "naive loop", *(f"engine, {each}" for each in expected)}
    for row in report.rows:
        assert len(row.times) == 2 and min(row.times) > 0 and row.ms > 0 and row.gflop > 0 and row.predicted_ms > 0
        assert (row.loss_gap is None) is ("30 s" in row.name) and (row.loss_gap or 0) < 1e-5
        assert (row.teacher_share is not None) is (stage == "echo")
    assert rows["engine"].times == [1, 1] and rows["naive loop"].gflop > rows["engine"].gflop
    assert report.padding_share == pytest.approx(0, abs=1e-6) and report.tokens > 50
    assert (report.audio_s > 0) is (stage != "t2c") and report.samples == 4


@pytest.mark.usefixtures("tiny_stages")
def test_a_baseline_that_computes_something_else_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = step.naive_losses

    def shifted(stage: Any, batch: Any, **others: Any) -> Any:
        terms = wrong(stage, batch, **others)
        return {name: replace(term, total=term.total * 1.001) for name, term in terms.items()}

    monkeypatch.setattr(step, "naive_losses", shifted)
    with pytest.raises(EchoXError, match="losses of 'naive loop' differ"):
        step.run(load_recipe("demo/t2c", ["engine.precision=fp32"]), LOAD, repeats=1)


def _result(name: str, **others: Any) -> step.StepResult:
    values: dict[str, Any] = {
        "ms": 1000.0, "cpu_s": 2.0, "predicted_ms": 900.0, "gflop": 40.0, "times": [1.0], "teacher_share": None,
        "loss_gap": 0.0,
    }  # fmt: skip
    return step.StepResult(name=name, **{**values, **others})


def test_the_command_measures_each_recipe_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []

    def run(recipe: Any, load: Load, *, repeats: int, techniques: Any) -> step.StepReport:
        speech = recipe.model.speech_encoder
        asked.append((recipe.name, load, repeats, len(techniques), speech is not None and speech.precomputed))
        rows = [_result("engine"), _result("naive loop")]
        return step.StepReport(recipe=recipe.name, samples=4, audio_s=3.0, tokens=100, padding_share=0.0, rows=rows)

    monkeypatch.setattr(step, "run", run)
    assert main(["bench", "step", "demo/t2c", "demo/s2t", "--rows", "4", "--repeats", "2"]) == 0
    assert len(re.findall("^### demo", capsys.readouterr().out, flags=re.M)) == 2
    assert main(["bench", "step", "demo/echo", "--encode", "--naive-only", "--least-response", "60", "--json"]) == 0
    every = len(TECHNIQUES)
    assert asked == [
        ("demo-t2c", Load(rows=4), 2, every, False),
        ("demo-s2t", Load(rows=4), 2, every, True),
        ("demo-echo", Load(least_response=60), 5, 0, False),
    ]


def test_the_table_has_a_line_for_each_contender() -> None:
    naive = _result("naive loop", times=[2.0, 3.0, 4.0], teacher_share=0.25, loss_gap=2e-7)
    rows = [_result("engine"), naive, _result("engine, 30 s of every clip encoded", loss_gap=None)]
    report = step.StepReport(recipe="demo-echo", samples=4, audio_s=3.0, tokens=100, padding_share=0.5, rows=rows)
    lines = step.table([report]).splitlines()
    assert lines[0] == "### demo-echo: 4 samples a step"
    assert lines[2] == "The engine: 4 samples/s, 3 audio-s/s, 100 useful tokens/s, padding 50%."
    assert lines[7] == "| naive loop | 2.00 | 1,000 | 900 | 40 | 25% | 3.00 (2.00 to 4.00) | 2e-07 |"
    assert lines[8].endswith("| other losses |")
    assert len({len(re.findall(r"\|", line)) for line in lines[4:]}) == 1 and len(lines) == 9


@pytest.mark.parametrize("stage", ["s2t", "echo"])
def test_what_is_measured_is_the_stage_and_not_its_alignment(stage: str) -> None:
    recipe = load_recipe(f"demo/{stage}")
    assert recipe.align_steps > 0 and step.without_alignment(recipe).align_steps == 0


def test_no_answer_is_shorter_than_the_least() -> None:
    vocabulary = micro_batch.Vocabulary(50, 12, [1], [2])
    recipe = load_recipe("demo/echo")
    for least in (1, 19):
        batch: Any = micro_batch.micro_batch(
            recipe, vocabulary, replace(LOAD, rows=40, response=12, least_response=least, sigma=1.0), torch.float32
        )
        for mask in (batch.response_mask_BR, batch.own_mask_BR):
            assert (int(mask.sum(1).min()) >= 19) is (least == 19)


def test_ways_to_decode_are_counted_and_say_the_same_words() -> None:
    torch.manual_seed(0)
    decoder = decoder_of_layers(2)
    nn.init.zeros_(decoder.head.weight[decoder.end])
    text, tokens_N = teacher.random_text(decoder, 5, 6)
    rows = {row.name: row for row in teacher.measure_teacher(decoder, text, tokens_N, 3.0, repeats=1)}
    assert len(rows) == 4 and all(row.same_words and row.words_s > 0 for row in rows.values())
    assert rows["a cache that grows, all rows"].syncs == pytest.approx(2, abs=0.1)
    fast = rows["static steps"]
    assert fast.syncs is not None and 0 < fast.syncs <= 3 / 16 and fast.kernels is not None
    assert fast.kernels < 0.7 * (rows["a cache that grows, all rows"].kernels or 0)
    assert "| static steps |" in teacher.table("toy", list(rows.values()))


def test_a_way_that_says_other_words_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = decoder_of_layers(1)
    text, tokens_N = teacher.random_text(decoder, 3, 6)
    greedy = type(decoder).greedy

    def other(self: Any, *args: Any, **kwargs: Any) -> DecodedUnits:
        said = greedy(self, *args, **kwargs)
        return said._replace(words_NM=said.words_NM.roll(1, 1))

    monkeypatch.setattr(type(decoder), "greedy", other)
    with pytest.raises(EchoXError, match="'static steps, all rows to the end' does not say the words"):
        teacher.measure_teacher(decoder, text, tokens_N, 3.0, repeats=1)


def test_the_command_times_the_teacher_of_a_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "teacher", "demo/t2c", "--rows", "2", "--text", "4", "--repeats", "1"]
    assert main(words) == 0
    assert "| static steps |" in capsys.readouterr().out
    assert main(["bench", "teacher", "demo/s2t"]) == 2
