"""Imports and exports of the released format, on releases that `released` writes and by the layers that it names."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from echox import cli
from echox.builders.setup import TextTools, build_stage
from echox.config.load import load_recipe
from echox.models.echo import segment_rows
from echox.release.echox_format.importing import import_release
from echox.release.export import export
from echox.speak.events import Units
from echox.speak.pipeline import SpeechToSpeech
from tests.release import released
from tests.release.released import EOT, FFN, HEADS, PATCH, A, H, V

B = 128_000
HEADER = [128_006, B, 65_576, 128_007, B, 198]


@dataclass(frozen=True)
class World:
    """Folders: the Whisper model, a release without a tied head, its import, and the release's tensors."""

    root: Path
    whisper: Path
    release: Path
    imported: Path
    weights: dict[str, Tensor]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("released")
    released.whisper(root / "whisper")
    weights = released.write(root / "release", tied=False, shards=2)
    import_release(root / "release", root / "imported", encoder=str(root / "whisper"))
    return World(root, root / "whisper", root / "release", root / "imported", weights)


def files_of(folder: Path) -> dict[str, Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def zero_end_of_turn(weights: dict[str, Tensor]) -> None:
    weights["unit_translator.model.embed_tokens.weight"][EOT] = 0


@pytest.mark.parametrize(
    ("tied", "text_table", "change", "said"),
    [
        (False, "head", None, "the LLM's head"),
        (True, "input", None, "the LLM's input table"),
        (False, "head", zero_end_of_turn, "its own: the LLM's head but for row 128009 (zeros)"),
        (True, "own", None, "its own"),
    ],
)
def test_export_gives_the_release_back_bit_by_bit(
    world: World, tmp_path: Path, tied: bool, text_table: str, change: Any, said: str
) -> None:
    release = tmp_path / "release"
    weights = released.write(
        release, tied=tied, text_table=text_table, change=change or (lambda _: None), tokenizer_from=world.release
    )
    findings = import_release(release, tmp_path / "imported", encoder=str(world.whisper))
    assert findings["T2C text table"] == said
    export(tmp_path / "imported", tmp_path / "back", "echox")
    found = files_of(tmp_path / "back")
    assert found.keys() == weights.keys() and ("lm_head.weight" in found) is not tied
    for name, tensor in weights.items():
        assert found[name].dtype == torch.float16 and torch.equal(found[name], tensor), name
    configs = [json.loads((folder / "config.json").read_text()) for folder in (release, tmp_path / "back")]
    assert configs[0] == configs[1]
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == (release / "tokenizer.json").read_bytes()


def test_what_only_the_files_tell_is_printed(world: World, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["import", str(world.release), str(tmp_path / "out"), "--encoder", str(world.whisper)]
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    for line in (
        "pad token: <|eot_id|>, number 128009",
        "unit tokens: 7, bodies are pieces: ▁0, ▁1_2, ▁3 … ▁2",
        "T2C text table: the LLM's head",
        "tie_word_embeddings is off, lm_head.weight is stored",
        "unit_output: finetune_kd_online",
        "unit_model: large: T2C of 2 layers of width 32, 4 heads",
        "other keys of config.json: none",
        "72 tensors float16",
        "eos_token_id: [128001, 128008, 128009]",
        "use_cache: False",
        "the Echo decoder stands in",
    ):
        assert line in said, line


# The released layers, put together by hand -----------------------------------------------------------------------


def of(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value.float() for name, value in weights.items() if name.startswith(prefix)}


def llama(weights: dict[str, Tensor], prefix: str, layers: int) -> Any:
    from transformers import LlamaConfig, LlamaModel

    rope = {**released.ROPE, "rope_theta": 500_000.0}
    model = LlamaModel(
        LlamaConfig(vocab_size=V, hidden_size=H, intermediate_size=FFN, num_hidden_layers=layers,
                    num_attention_heads=HEADS, num_key_value_heads=HEADS, rms_norm_eps=1e-5, rope_parameters=rope,
                    max_position_embeddings=131072)
    ).eval()  # fmt: skip
    model.load_state_dict(of(weights, prefix))
    return model


@torch.no_grad()
def speech_vectors(weights: dict[str, Tensor], whisper: Path, mel_1MT: Tensor) -> Tensor:
    from transformers import WhisperModel

    features = WhisperModel.from_pretrained(whisper).encoder.eval()(mel_1MT).last_hidden_state
    x = F.linear(features.reshape(1, 750, 2 * A), *of(weights, "model.mm_projector1.").values())
    layer = nn.TransformerEncoderLayer(H, HEADS, 2 * H, norm_first=True).eval()  # the first axis is time to it
    layer.load_state_dict(of(weights, "model.asr_transformer_encoder.layers.0."))
    norm = nn.LayerNorm(H)
    norm.load_state_dict(of(weights, "model.out_norm."))
    x = norm(layer(x))[0]
    labels = (x @ weights["model.audio_feature_head.weight"].float().T).argmax(-1)
    kept = x[[0, *(n for n in range(1, 750) if labels[n] != labels[n - 1])]]
    look_back = nn.MultiheadAttention(H, HEADS).eval()
    look_back.load_state_dict(of(weights, "model.lbm.encoder_attn."))
    norm.load_state_dict(of(weights, "model.lbm.atten_layer_norm."))
    found: Tensor = norm(kept + look_back(kept, kept, kept)[0])
    return found


@torch.no_grad()
def answer(weights: dict[str, Tensor], speech_Vh: Tensor, tokens: int) -> tuple[list[int], Tensor]:
    """Greedy text and the state that predicts each token; the end of a turn is a key for nobody in the prompt."""
    model = _llm(weights)
    before = [B, 128_006, B, 9125, 128_007, B, 198, B, EOT, 128_006, B, 882, 128_007, B, 198]
    after = [B, EOT, 128_006, B, 78_191, 128_007, B, 198]
    table = weights["model.embed_tokens.weight"].float()
    said: list[int] = []
    states = []
    for _ in range(tokens):
        ids = torch.tensor([*before, *[PATCH] * len(speech_Vh), *after])
        row = torch.cat([table[before], speech_Vh, table[after], table[said]])[None]
        mask = torch.cat([ids != EOT, torch.ones(len(said), dtype=torch.bool)])[None]
        hidden = model(inputs_embeds=row, attention_mask=mask.long(), position_ids=torch.arange(row.shape[1])[None],
                       use_cache=False).last_hidden_state[0, -1]  # fmt: skip
        states.append(hidden)
        said.append(int((weights["lm_head.weight"].float() @ hidden).argmax()))
    return said, torch.stack(states)


def _llm(weights: dict[str, Tensor]) -> Any:
    names = ("model.embed_tokens.", "model.layers.", "model.norm.")
    return llama({name: value for name, value in weights.items() if name.startswith(names)}, "model.", released.LAYERS)


@torch.no_grad()
def spoken(weights: dict[str, Tensor], hidden_Rh: Tensor, words: int) -> tuple[list[int], Tensor]:
    """Greedy unit words of one segment and the logits of words and end that chose them."""
    part = "unit_translator."
    model = llama(weights, f"{part}model.", 2)
    table, units = (weights[f"{part}{name}.weight"].float() for name in ("model.embed_tokens", "unit_embedding"))
    mlp = of(weights, f"{part}aligner_MLP.")
    adapted = F.linear(F.relu(F.linear(hidden_Rh, mlp["0.weight"], mlp["0.bias"])), mlp["3.weight"], mlp["3.bias"])
    row = torch.cat([table[[*HEADER, 12_800]], adapted, table[[EOT, *HEADER, B]]])
    said: list[int] = []
    logits = []
    for _ in range(words):
        inputs = F.linear(torch.cat([row, units[said]]), *of(weights, f"{part}adapter.").values())[None]
        ones = torch.ones(1, inputs.shape[1], dtype=torch.long)
        state = model(inputs_embeds=inputs, attention_mask=ones, use_cache=False).last_hidden_state[0, -1]
        classes = weights[f"{part}lm_head.weight"].float() @ state
        logits.append(torch.cat([classes[V:], classes[EOT, None]]))
        best = int(classes.argmax())
        if best == EOT:
            break
        assert best >= V, "no text is said"
        said.append(best - V)
    return said, torch.stack(logits)


def clip() -> Any:
    random = np.random.default_rng(0)
    return (random.standard_normal(30_000) * np.sin(np.arange(30_000) * 0.003) * 0.3).astype(np.float32)


def test_an_imported_release_computes_what_the_released_layers_compute(world: World) -> None:
    model: Any = SpeechToSpeech.load(world.imported, device="cpu")
    stage, batch = model.stage, model._batch([clip()], "sqa")
    head = stage.s2t.front_end.ctc_head
    assert torch.equal(head.linear.weight, world.weights["model.audio_feature_head.weight"].float()[head.tokens])
    assert int(head.tokens[0]) == PATCH, "the placeholder is the blank"
    heard = stage.s2t.encode_speech(batch)
    vectors = speech_vectors(world.weights, world.whisper, batch.mel_BMT)
    assert 20 < len(vectors) < 750 and heard.rows.lengths_N.tolist() == [len(vectors)]
    torch.testing.assert_close(heard.padded()[0][0], vectors, rtol=0, atol=1e-4)

    model.max_new = 14
    written = model.generate([clip()])
    said, states = answer(world.weights, vectors, 14)
    assert written.tokens_BR[0].tolist() == said and EOT not in said
    torch.testing.assert_close(written.hidden_BRh[0], states, rtol=0, atol=2e-4)
    again = stage.s2t.response_states(heard, batch, written.tokens_BR, written.mask_BR)
    torch.testing.assert_close(again.response.to_padded(again.hidden)[0], states, rtol=0, atol=2e-4)

    words, logits = spoken(world.weights, states, 40)
    assert len(set(words)) > 2
    rows = segment_rows(torch.zeros_like(written.tokens_BR), written.mask_BR)
    prefix, header = stage.embed_text(stage.prefix_P), stage.embed_text(stage.header_Q)
    text = stage.text_part(prefix, stage.adapt(written.hidden_BRh), header, written.tokens_BR, rows)
    units = stage.echo.greedy(text.left_padded(), torch.tensor([len(words)]))
    assert units.words_NM[0].tolist()[: len(words)] == words
    forced = stage.echo(text, torch.tensor([words]), torch.ones(1, len(words), dtype=torch.bool))
    ours = forced[0, : len(logits), V : V + len(released.WORDS) + 1]
    torch.testing.assert_close(ours, logits, rtol=0, atol=5e-4)


def test_units_are_read_as_the_released_code_reads_them_and_streamed_alike(world: World) -> None:
    model: Any = SpeechToSpeech.load(world.imported, device="cpu")
    model.max_new = 3
    model.stage.config = model.stage.config.model_copy(update={"units_per_token": 4})
    head = model.stage.echo.head.weight
    with torch.no_grad():
        head[-2] = head[V:-2].mean(0)  # no end before the limit
    (whole,) = model.answer([clip()])
    streamed = [event.units for event in model.stream(clip(), max_new=3) if isinstance(event, Units)]
    assert np.concatenate(streamed).tolist() == whole.units.tolist() and len(whole.units) > 4
    language = model._text.language
    assert language.decode([1, 4, 3, 5]) == [1, 25, 4, 6, 1], "a piece may go on with a number"


# Going on with training -------------------------------------------------------------------------------------------


def test_stage_iii_goes_on_from_an_import(world: World) -> None:
    changes = ["pseudo_text=free_run", "free_run_tokens=4", "units_per_token=2"]
    changes = [*(f"model.echo.{change}" for change in changes), "engine.precision=fp32"]
    recipe = load_recipe(str(world.imported / "finetune.yaml"), changes)
    text = TextTools.load(recipe)
    stage: Any = build_stage(recipe, text).train()
    ours = dict(stage.named_parameters())
    for name, value in ours.items():
        if name.startswith("teacher.decoder."):
            assert torch.equal(value, ours[name.replace("teacher.decoder.", "echo.")]) and not value.requires_grad
    assert torch.equal(stage.t2c_text.own_Vh, world.weights["lm_head.weight"].float())
    from echox.builders.setup import build_speech_collate

    batch = build_speech_collate(recipe, text).from_audio(
        [clip(), clip()[:9000]], ["sqa"] * 2, ["w1 w2", "w3"], ["w5 w6 w7", "w9"], ids=["a", "b"], weights=[1.0, 1.0]
    )
    assert batch.response_BR[:, 0].tolist() == [B, B]
    terms = stage(batch)
    assert terms.keys() == {"s2t", "echo", "denoising"}
    # Of random weights the teacher may say nothing that ends: what it says is not what is tested here.
    means = {name: term.total / term.count.clamp(min=1) for name, term in terms.items()}
    assert all(bool(mean.isfinite()) for mean in means.values())
    sum(means.values(), torch.zeros(())).backward()
    moved = [name for name, value in ours.items() if value.grad is not None and bool(value.grad.abs().sum() > 0)]
    assert any(".lora_B" in name for name in moved) and any(name.startswith("denoising.") for name in moved)


def test_a_run_that_went_on_from_an_import_is_a_release_again(world: World, tmp_path: Path) -> None:
    from tests.builders import tiny_run

    release, imported = tmp_path / "release", tmp_path / "imported"
    weights = released.write(release, tied=False, text_table="own", tokenizer_from=world.release)
    import_release(release, imported, encoder=str(world.whisper))
    recipe = load_recipe(str(imported / "finetune.yaml"), ["engine.precision=fp32"])
    stage: Any = build_stage(recipe, TextTools.load(recipe))
    table = "unit_translator.model.embed_tokens.weight"
    assert torch.equal(stage.t2c_text.own_Vh, weights[table].float())
    with torch.no_grad():
        stage.denoising.inner.bias += 1
        stage.echo.head.weight[-2] += 1
    tiny_run.write_run(tmp_path / "run", recipe, tiny_run.trained(stage), stage_language(imported))
    export(tmp_path / "run", tmp_path / "back", "echox")
    found = files_of(tmp_path / "back")
    moved = {"unit_translator.aligner_MLP.0.bias", "unit_translator.lm_head.weight"}
    assert {name for name in weights if not torch.equal(found[name], weights[name])} == moved
    head = "unit_translator.lm_head.weight"
    assert (found[head] != weights[head]).any(1).nonzero()[:, 0].tolist() == [EOT]
    export(tmp_path / "run", tmp_path / "hf", "hf")
    again: Any = SpeechToSpeech.load(tmp_path / "hf", device="cpu").stage
    assert torch.equal(again.t2c_text.own_Vh, weights[table].float())
    assert torch.equal(again.denoising.inner.bias, stage.denoising.inner.bias)


def stage_language(folder: Path) -> Any:
    from echox.units.language import UnitLanguage

    return UnitLanguage.load(folder / "unit_language.json")


# Bad releases ------------------------------------------------------------------------------------------------------


def drop(name: str) -> Callable[[Path], None]:
    return lambda folder: change(folder, lambda tensors: tensors.pop(name))


def change(folder: Path, how: Callable[[dict[str, Tensor]], object]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    how(tensors)
    save_file(tensors, path)


def put(name: str, value: Tensor) -> Callable[[Path], None]:
    return lambda folder: change(folder, lambda tensors: tensors.update({name: value}))


def key(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**content, **changes}))

    return edit


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


class Bomb:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("ran"),))


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(pickle.dumps({"model.norm.weight": Bomb()}))


def outside(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "../../secret.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def unit_token_away(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"].pop()
    (folder / "tokenizer.json").write_text(json.dumps(content))


NORM = "model.norm.weight"
DAMAGES: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "cut": (cut, ["model.safetensors cannot be read, it is damaged or cut short"]),
    "missing": (drop(NORM), ["model.norm.weight is missing"]),
    "shape": (put(NORM, torch.ones(H + 1).half()), ["model.norm.weight is 33, config.json makes it 32"]),
    "nan": (put(NORM, torch.full((H,), torch.nan).half()), ["model.norm.weight holds numbers that are not finite"]),
    "type": (put(NORM, torch.ones(H, dtype=torch.int32)), ["model.norm.weight is of type I32, not one of float16"]),
    "unknown": (put("perturb.weight", torch.ones(2)), ["perturb.weight is no tensor of a release"]),
    "pickled": (pickled, ["model.safetensors cannot be read"]),
    "outside": (outside, ["names a file outside of the folder"]),
    "no config": (lambda folder: (folder / "config.json").unlink(), ["there is no config.json"]),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").write_text("{}"), ["the tokenizer cannot be read"]),
    "token": (unit_token_away, ["the tokenizer has 6 unit tokens, config.json 7 (unit_vocab_size)"]),
    "stage": (key(unit_output="pretrain"), ["unit_output is 'pretrain'; only finetune"]),
    "size": (key(hidden_size="big"), ["hidden_size is 'big', not a size"]),
    "grouped": (key(num_key_value_heads=2), ["T2C has 4 heads and, as the LLM, 2 of keys: grouped attention"]),
    "tied": (key(tie_word_embeddings=True), ["tie_word_embeddings is on, but lm_head.weight is another table"]),
    "encoder": (key(adapter_size=32), ["mm_projector1.weight is 32x32, config.json makes it 32x64"]),
}


@pytest.mark.parametrize("name", sorted(DAMAGES))
def test_a_bad_release_is_refused_in_one_sentence(
    world: World, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    damage, said = DAMAGES[name]
    whole(world, tmp_path / "bad")
    damage(tmp_path / "bad")
    code = cli.main(["import", str(tmp_path / "bad"), str(tmp_path / "out"), "--encoder", str(world.whisper)])
    error = capsys.readouterr().err
    assert code in (3, 5) and all(part in error for part in said), error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad"], "nothing was written, and nothing ran"
    assert error.count("echox: ") == 1


def whole(world: World, folder: Path) -> None:
    """The release in one file, which is written once and linked to otherwise."""
    import shutil

    one = world.root / "one"
    if not one.is_dir():
        released.write(one, tied=False, tokenizer_from=world.release)
    shutil.copytree(one, folder)


def test_all_that_is_wrong_is_said_at_once(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole(world, tmp_path / "bad")
    for name in ("missing", "unknown", "stage", "token"):
        DAMAGES[name][0](tmp_path / "bad")
    words = ["import", str(tmp_path / "bad"), str(tmp_path / "out"), "--encoder", str(world.whisper)]
    assert cli.main(words) == 5
    error = capsys.readouterr().err
    assert "for 4 reasons" in error and "Nothing was written" in error
    for name in ("missing", "unknown", "stage", "token"):
        assert all(part in error for part in DAMAGES[name][1]), name


def test_unknown_tensors_are_left_out_where_asked(world: World, tmp_path: Path) -> None:
    whole(world, tmp_path / "odd")
    DAMAGES["unknown"][0](tmp_path / "odd")
    key(auto_map={"AutoModel": "evil.Model"}, extra_key=1)(tmp_path / "odd")
    findings = import_release(tmp_path / "odd", tmp_path / "out", encoder=str(world.whisper), drop_unknown=True)
    assert findings["other tensors"] == "perturb.weight" and findings["other keys of config.json"] == "extra_key"
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_what_pads_is_unseen_in_a_prompt_and_nothing_else_is(world: World, tmp_path: Path) -> None:
    whole(world, tmp_path / "other")
    path = tmp_path / "other" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "pad_token": {"content": "<|reserved_128004|>"}}))
    findings = import_release(tmp_path / "other", tmp_path / "out", encoder=str(world.whisper))
    assert findings["pad token"] == "<|reserved_128004|>, number 128009"
    prompts = [
        json.loads((folder / "manifest.json").read_text())["recipe"]["model"]["llm"]["prompt"]
        for folder in (world.imported, tmp_path / "out")
    ]
    assert [prompt["unseen"] for prompt in prompts] == ["<|eot_id|>", None]


def test_another_encoder_is_refused(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import WhisperConfig, WhisperModel

    WhisperModel(
        WhisperConfig(d_model=8, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=8, decoder_layers=1,
                      decoder_attention_heads=2, decoder_ffn_dim=8, num_mel_bins=8, vocab_size=60, pad_token_id=0,
                      bos_token_id=1, eos_token_id=2, decoder_start_token_id=1)
    ).save_pretrained(tmp_path / "narrow")  # fmt: skip
    words = ["import", str(world.release), str(tmp_path / "out"), "--encoder", str(tmp_path / "narrow")]
    assert cli.main(words) == 3
    assert "has width 8, the release was trained with one of 16" in capsys.readouterr().err
