"""A stage built from a recipe: whose weights are where, what trains, and that no key of the recipe is passed over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from echox.builders.setup import TextTools, build_stage, check_inits, frozen_models
from echox.config.model_schema import LoraConfig
from echox.errors import CheckpointError
from echox.models.lora import FusedForward
from echox.release.pretrained import add_lora
from tests import tiny
from tests.builders import tiny_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, and a run each of Stages I and II whose weights no builder makes."""
    folder = tmp_path_factory.mktemp("models")
    tiny_run.write_models(folder)
    for number, stage in enumerate(("s2t", "t2c")):
        recipe = tiny_run.make_recipe(folder, stage, ctc={"vocabulary": "corpus"})
        module = build_stage(recipe, TextTools.load(recipe), transcripts=iter([30, 13, 30, 21]))
        tiny_run.randomise(module, number)
        tiny_run.write_run(folder / stage, recipe, tiny_run.trained(module))
    return folder


def built(folder: Path, stage: str, **changes: Any) -> Any:
    init = {"s2t": str(folder / "s2t"), "t2c": str(folder / "t2c")} if stage == "echo" else {}
    recipe = tiny_run.make_recipe(folder, stage, **{"init": init, **changes})
    torch.manual_seed(0)
    return build_stage(recipe, TextTools.load(recipe))


def weights(folder: Path, run: str) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(next((folder / run).rglob("*.safetensors")))


def test_stage_three_starts_from_both_earlier_stages_teacher_and_echo_decoder_alike(folder: Path) -> None:
    init = {"s2t": str(folder / "s2t"), "t2c": str(folder / "t2c")}
    stage = built(folder, "echo")
    have = {**dict(stage.named_parameters()), **dict(stage.named_buffers())}
    t2c, s2t = weights(folder, "t2c"), weights(folder, "s2t")
    assert len(t2c) > 10 and all(name.startswith("t2c.") for name in t2c)
    for name, value in t2c.items():
        for part in ("teacher.decoder.", "echo."):
            assert torch.equal(have[part + name.removeprefix("t2c.")], value), part + name
    assert any("lora_B" in name for name in s2t) and any("shrink" in name for name in s2t)
    for name, value in s2t.items():
        assert torch.equal(have[name], value), name
    assert stage.s2t.front_end.ctc_head.tokens.tolist() == [tiny.VOCABULARY, 13, 21, 30]
    assert not any(p.requires_grad for p in stage.teacher.parameters())
    assert all(p.requires_grad for p in stage.echo.parameters())
    assert all(a is not b for a, b in zip(stage.teacher.parameters(), stage.echo.parameters(), strict=True))
    places = frozen_models(tiny_run.make_recipe(folder, "echo", init=init))
    assert set(places) == {"llm", "speech_encoder", "init.s2t", "init.t2c"}
    assert places["init.t2c"].is_relative_to(folder / "t2c") and places["llm"] == folder / "llm"


def test_a_run_that_goes_on_is_no_start_unless_its_checkpoint_is_named(folder: Path, tmp_path: Path) -> None:
    s2t = tiny_run.make_recipe(folder, "s2t")
    s2t = s2t.model_copy(update={"optim": s2t.optim.model_copy(update={"steps": 9100})})
    run = tiny_run.write_run(tmp_path / "s2t", s2t, weights(folder, "s2t"), step=5)
    ready = {"t2c": str(folder / "t2c")}
    echo = tiny_run.make_recipe(folder, "echo", init={"s2t": str(run), **ready})
    with pytest.raises(CheckpointError, match=r"init.s2t names a run that has come to step 5 of 9,100") as refused:
        check_inits(echo)
    (checkpoint,) = (run / "checkpoints").iterdir()
    assert f"init.s2t={checkpoint}" in str(refused.value)
    check_inits(tiny_run.make_recipe(folder, "echo", init={"s2t": str(checkpoint), **ready}))
    tiny_run.write_run(tmp_path / "done", s2t, weights(folder, "s2t"))
    check_inits(tiny_run.make_recipe(folder, "echo", init={"s2t": str(tmp_path / "done"), **ready}))


def test_without_an_earlier_t2c_the_echo_decoder_still_starts_as_the_teacher(folder: Path) -> None:
    stage = built(folder, "echo", init={}, random_init=True)
    for (name, a), (_, b) in zip(stage.echo.named_parameters(), stage.teacher.decoder.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_stage_takes_template_trigger_and_end_from_its_recipe(folder: Path) -> None:
    stage = built(folder, "echo")
    assert stage.prefix_P.tolist() == [3, 4] and stage.header_Q.tolist() == [9, 10, 1]
    assert stage.end_token == 2
    assert torch.equal(stage.stop_row_h, stage.s2t.causal_lm.lm_head.weight[tiny_run.STOP])
    assert stage.config.s2t_weight == 0.6 and stage.config.segmentation.min_tokens == 2
    assert stage.most_words(torch.tensor([1, 5])).tolist() == [34, 42]
    assert stage.denoising.inner.out_features == 24
    assert stage.echo.layout == stage.s2t.layout == "packed"
    t2c = built(folder, "t2c")
    assert t2c.prefix_P.tolist() == [3, 4] and t2c.header_Q.tolist() == [9, 10, 1]
    assert not t2c.text_table.weight.requires_grad
    text = TextTools.load(tiny_run.make_recipe(folder, "t2c"))
    assert text.prompt.before == [5, 6] and text.prompt.after == [7, 8] and text.stop == tiny_run.STOP
    assert text.language is not None and t2c.t2c.words == text.words == text.language.size


def test_stage_one_has_its_ctc_weight_and_what_an_earlier_run_learned(folder: Path) -> None:
    fresh = built(folder, "s2t")
    assert fresh.loss_weights({}, 0) == {"s2t": 1.0, "ctc": 0.4}
    assert len(fresh.s2t.front_end.ctc_head.tokens) == tiny.VOCABULARY + 1
    resumed = built(folder, "s2t", init={"s2t": str(folder / "s2t")})
    have = dict(resumed.named_parameters())
    for name, value in weights(folder, "s2t").items():
        if name in have:
            assert torch.equal(have[name], value), name


def test_only_lora_of_the_llm_trains(folder: Path) -> None:
    for stage in (built(folder, "s2t"), built(folder, "echo")):
        for name, parameter in stage.s2t.llm.named_parameters():
            assert parameter.requires_grad is ("lora_" in name), name
        assert not any(p.requires_grad for p in stage.s2t.front_end.encoder.parameters())


def test_weights_of_another_shape_are_refused(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="do not fit"):
        built(folder, "echo", lora={"r": 2})


@pytest.mark.parametrize(("r", "alpha"), [(4, 6.0), (2, 5.0), (8, 2.5)])
def test_lora_adds_alpha_over_r_times_the_product_of_its_maps(r: int, alpha: float) -> None:
    model = tiny.causal_lm()
    wrapped = add_lora(model, LoraConfig(r=r, alpha=alpha, dropout=0.0)).eval()
    layers = [part for part in wrapped.modules() if isinstance(part, FusedForward)]
    assert len(layers) == 7 * model.config.num_hidden_layers
    torch.manual_seed(1)
    for layer in layers:
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert a.shape[0] == r and a.requires_grad and b.requires_grad
        torch.nn.init.normal_(b, std=0.3)
        x = torch.randn(5, a.shape[1])
        expected = x @ layer.base_layer.weight.T + alpha / r * (x @ a.T @ b.T)
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_lora_of_the_recipe_reaches_the_llm(folder: Path) -> None:
    stage = built(folder, "s2t", init={"s2t": str(folder / "s2t")})
    layer = next(part for part in stage.s2t.llm.modules() if isinstance(part, FusedForward))
    x = torch.randn(3, layer.base_layer.in_features)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.testing.assert_close(layer(x) - layer.base_layer(x), 1.5 * (x @ a.T @ b.T), rtol=1e-4, atol=1e-5)
