"""A run of our own in the released format: what is written, that it comes back, and all that cannot be expressed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file

from echox import cli
from echox.builders.setup import TextTools, build_stage
from echox.config.schema import Recipe
from echox.release.echox_format.importing import import_release
from echox.release.export import export
from echox.speak.pipeline import SpeechToSpeech
from echox.units.language import UnitLanguage
from tests.builders import tiny_run
from tests.release import released
from tests.release.released import EOT, PATCH, H, V
from tests.speak.echo_run import write_echo_run


def language() -> UnitLanguage:
    random = np.random.default_rng(3)
    corpus = [random.integers(0, 5, 40) for _ in range(10)]
    return UnitLanguage.fit(corpus, 5, vocab_size=9)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`whisper`, stock `llm` of 128,256 tokens, and the Echo run `runs/echo` on a recipe that an import has written."""
    from transformers import LlamaConfig, LlamaForCausalLM

    root = tmp_path_factory.mktemp("own")
    released.whisper(root / "whisper")
    rope = {**released.ROPE, "rope_theta": 500_000.0}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=PATCH, hidden_size=H, intermediate_size=released.FFN, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=4, rms_norm_eps=1e-5, rope_parameters=rope,
                         max_position_embeddings=131072, bos_token_id=128_000, eos_token_id=EOT,
                         initializer_range=0.3)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(root / "llm")
    released.tokenizer(root / "llm", None)
    language().save(root / "language.json")
    released.write(root / "release", tied=False)
    import_release(root / "release", root / "imported", encoder=str(root / "whisper"))
    init: dict[str, str] = {}
    for number, stage in enumerate(("s2t", "t2c", "echo")):
        recipe = own_recipe(root, stage, init)
        module = build_stage(recipe, TextTools.load(recipe))
        tiny_run.randomise(module, number)
        init[stage] = str(tiny_run.write_run(root / "runs" / stage, recipe, tiny_run.trained(module), language()))
    return root


def own_recipe(root: Path, stage: str, init: dict[str, str]) -> Recipe:
    content = yaml.safe_load((root / "imported" / "finetune.yaml").read_text())
    content |= {"stage": stage, "init": init if stage == "echo" else {}, "optim": {"steps": 1}}
    content["model"]["llm"] |= {"path": str(root / "llm"), "lora": {"r": 4, "alpha": 6, "dropout": 0.0}}
    content["model"]["t2c"] |= {"head": "units", "unit_language": str(root / "language.json")}
    content["model"]["t2c"].pop("text_table")
    content["data"]["train"] = [{"path": "nowhere", "task": "tts" if stage == "t2c" else "sqa"}]
    content["engine"]["precision"] = "fp32"
    return Recipe.model_validate(content)


def test_a_run_is_written_as_a_release(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(world / "runs" / "echo", out, "echox")
    found = load_file(out / "model.safetensors")
    assert {value.dtype for value in found.values()} == {torch.float16}
    with safe_open(next((world / "runs" / "echo").rglob("trainable.safetensors")), "pt") as run:
        echo = {name: run.get_tensor(name) for name in run.keys()}  # noqa: SIM118
    llm = load_file(world / "llm" / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight", "unit_translator.model.embed_tokens.weight"):
        source = "model.embed_tokens.weight" if name.startswith("unit") else name
        assert torch.equal(found[name][:PATCH], llm[source].half()) and not bool(found[name][PATCH].any())
    name = "model.layers.1.self_attn.k_proj"
    a, b = (echo[f"s2t.llm.base_model.model.{name}.lora_{part}.default.weight"] for part in "AB")
    assert torch.equal(found[f"{name}.weight"], (llm[f"{name}.weight"] + 6 / 4 * b @ a).half())

    head, own = found["unit_translator.lm_head.weight"], echo["echo.head.weight"]
    assert torch.equal(head[V:], own[:-2].half()) and torch.equal(head[EOT], own[-2].half())
    states = torch.randn(500, H, generator=torch.Generator().manual_seed(1))
    # And a state under which every word and the end are improbable, where zeros would win.
    low = torch.linalg.pinv(torch.cat([head[V:], head[EOT, None]]).float()) @ -torch.linspace(1, 2, 10)
    logits = torch.cat([states, low[None]]) @ head.float().T
    assert -1.1 < float(logits[-1, V:].max()) < -0.9
    assert set(logits.argmax(1).tolist()) <= {EOT, *range(V, V + 9)}, "a text token cannot win"
    assert torch.equal(found["unit_translator.unit_embedding.weight"], echo["echo.unit_embedding.weight"][:-2].half())

    config = json.loads((out / "config.json").read_text())
    wanted = {"model_type": "EchoX", "vocab_size": V, "unit_vocab_size": 9, "unit_model": "large", "adapter_size": 16,
              "rope_theta": 500_000.0, "rope_scaling": released.ROPE, "torch_dtype": "float16"}  # fmt: skip
    assert {key: config.get(key) for key in wanted} == wanted
    from tokenizers import Tokenizer

    tokens = Tokenizer.from_file(str(out / "tokenizer.json"))
    assert tokens.id_to_token(PATCH) == "<audio_patch>"
    assert [tokens.id_to_token(V + word) for word in range(9)] == [language().token(word) for word in range(9)]
    assert json.loads((out / "tokenizer_config.json").read_text())["pad_token"] == "<|eot_id|>"


def test_what_was_written_comes_back_and_says_the_same_units(world: Path, tmp_path: Path) -> None:
    export(world / "runs" / "echo", tmp_path / "out", "echox")
    import_release(tmp_path / "out", tmp_path / "back", encoder=str(world / "whisper"))
    run: Any = SpeechToSpeech.load(world / "runs" / "echo", device="cpu")
    back: Any = SpeechToSpeech.load(tmp_path / "back", device="cpu")
    assert back._text.language.words == language().words and back._text.language.separable
    tokens = torch.arange(3, 15)[None]
    rows_of = torch.zeros_like(tokens)
    from echox.models.echo import segment_rows

    logits = []
    for model in (run, back):
        stage = model.stage
        rows = segment_rows(rows_of, torch.ones_like(tokens, dtype=torch.bool))
        with torch.no_grad():
            states = stage.s2t.decoder(input_ids=tokens).last_hidden_state
            prefix, header = stage.embed_text(stage.prefix_P), stage.embed_text(stage.header_Q)
            text = stage.text_part(prefix, stage.adapt(states), header, tokens, rows)
            forced = stage.echo(text, torch.tensor([[1, 6, 3]]), torch.ones(1, 3, dtype=torch.bool))
        logits.append(forced[..., -11:-1])
    torch.testing.assert_close(logits[0], logits[1], rtol=0.02, atol=0.05)
    assert logits[0].std() > 1, "rounding to float16 must not be all there is"


def test_all_that_cannot_be_expressed_is_said_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_echo_run(tmp_path)
    assert cli.main(["export", str(tmp_path / "echo"), str(tmp_path / "out"), "--format", "echox"]) == 2
    error = capsys.readouterr().err
    for said in (
        "the LLM has 48 tokens, not Llama 3's 128256",
        "model.speech_encoder.input=trim",
        "model.alignment.attention=time",
        "model.shrink.keys=all",
        "made 49 classes",
        "model.t2c: 2 layers of width 16",
        "model.t2c.body=null",
        "model.echo.denoising.ffn=24",
        "model.echo.segmentation",
        "model.llm.prompt.before, model.llm.prompt.after, model.llm.prompt.end",
        "model.t2c.prefix, model.t2c.unit_header",
        "the released code takes it for '<|eot_id|>'",
        "Nothing was written",
    ):
        assert said in error, said
    assert not (tmp_path / "out").exists() and error.count("echox: ") == 1


@pytest.mark.parametrize(
    ("section", "change", "said"),
    [
        ("alignment", {"heads": 2}, "model.alignment.heads=2: the released code takes the LLM's 4"),
        ("alignment", {"stack": 4}, "model.alignment.stack=4 and ffn_multiple=2"),
        ("shrink", {"blanks": "drop"}, "model.shrink.blanks=drop"),
        ("shrink", {"ctc_embedding": True}, "model.shrink.ctc_embedding=true"),
        ("t2c", {"text_stride": 2.0}, "model.t2c.text_stride=2"),
        ("t2c", {"text_embeddings": "centred"}, "model.t2c.text_embeddings=centred"),
        ("echo", {"state": "own"}, "model.echo.state=own"),
    ],
)
def test_each_option_beside_the_released_ones_is_refused(
    world: Path, section: str, change: dict[str, Any], said: str
) -> None:
    from dataclasses import replace

    from echox.release.echox_format.refusals import reasons
    from echox.release.echox_format.vocabulary import open_tokenizer
    from echox.release.trained import read_trained

    trained = read_trained(world / "runs" / "echo")
    llm = json.loads((world / "llm" / "config.json").read_text())
    tokenizer = open_tokenizer(world / "llm")
    assert reasons(trained, llm, tokenizer, language()) == []
    model = trained.recipe.model
    other = getattr(model, section).model_copy(update=change)
    recipe = trained.recipe.model_copy(update={"model": model.model_copy(update={section: other})})
    (found,) = reasons(replace(trained, recipe=recipe), llm, tokenizer, language())
    assert said in found


def test_units_beyond_the_released_ones_and_numbers_beyond_float16_are_refused(world: Path, tmp_path: Path) -> None:
    import shutil

    from echox.engine.checkpoint.manifest import read_manifest, write_manifest
    from echox.errors import RecipeError
    from echox.files import sha256_file
    from echox.release.echox_format.refusals import _units

    many = UnitLanguage.fit([np.arange(1001)], 1001, vocab_size=1001)
    assert list(_units(many)) == ["1001 units: the released code drops those from 1000 on"]
    shutil.copytree(world / "runs", tmp_path / "runs")
    path = next((tmp_path / "runs" / "echo").rglob("trainable.safetensors"))
    tensors = load_file(path)
    tensors["denoising.inner.bias"][3] = 70_000.0
    from safetensors.torch import save_file

    save_file(tensors, path)
    contents: Any = dict(read_manifest(path.parent))
    contents.pop("files")
    write_manifest(path.parent, contents, {path.name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)}})
    with pytest.raises(RecipeError, match=r"beyond 65,504.*aligner_MLP.0.bias"):
        export(tmp_path / "runs" / "echo", tmp_path / "out", "echox")
