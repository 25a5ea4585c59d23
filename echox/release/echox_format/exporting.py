"""Exports a run of Stage III in the released format: float16, released names, a tokenizer with unit tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echox.config.paths import resolve_data_file, resolve_model
from echox.errors import MissingModelError, RecipeError
from echox.files import read_json
from echox.release.echox_format.names import TEXT_TABLE, to_released, with_rows
from echox.release.echox_format.refusals import reasons, unit_model
from echox.release.echox_format.shape import END_OF_TURN, LLAMA_3, PLACEHOLDER, ReleaseShape, T2cShape, parse
from echox.release.echox_format.vocabulary import FILES, open_tokenizer, unit_bodies
from echox.release.exported import OWN_TABLE
from echox.release.folders import copy_own
from echox.release.llm import merged_llm
from echox.release.trained import Trained
from echox.units.language import UnitLanguage

if TYPE_CHECKING:
    from torch import Tensor

LARGEST = 65_504.0
"""The largest number of float16."""
_PLAIN = ("echox", "torch_dtype", "dtype", "rope_parameters", "transformers_version")
_SHOWN = 5


def write_release(trained: Trained, folder: Path) -> None:
    """Write the release.

    Raises:
        RecipeError: the format cannot express the run, names all reasons; or a weight is too large for float16.
        MissingModelError: the LLM's configuration or tokenizer cannot be read.
    """
    from huggingface_hub import save_torch_state_dict

    place = resolve_model(trained.recipe.model.llm.path)
    llm, tokenizer, language = _config_of(place), open_tokenizer(place), _language(trained)
    found = reasons(trained, llm, tokenizer, language)
    if found:
        lines = "\n".join(f"  - {reason}" for reason in found)
        raise RecipeError(
            f"{trained.checkpoint} cannot be expressed in the released format, for {len(found)} "
            f"reason{'s' if len(found) > 1 else ''}:\n{lines}\nNothing was written.",
            fix="train with the recipe that `echox import` writes, or export as hf",
        )
    assert language is not None
    config = release_config(trained, llm, language.size)
    shape, problems = parse(config)
    if shape is None or problems:
        raise RecipeError(f"the released code cannot build this model: {'; '.join(problems)}", fix="export as hf")
    tensors = _tensors(trained, shape)
    large = [name for name, value in tensors.items() if not bool((value.abs() <= LARGEST).all())]
    if large:
        rest = f" and {len(large) - _SHOWN} more" if len(large) > _SHOWN else ""
        what = f"float16 has no numbers beyond {LARGEST:,.0f}, and there are such in {', '.join(large[:_SHOWN])}{rest}"
        raise RecipeError(what, fix="export as hf, in float32 or bfloat16")
    # Copies: what shares memory is written once, and the released code wants both.
    save_torch_state_dict({name: value.half().clone() for name, value in tensors.items()}, folder, max_shard_size="5GB")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    _write_tokenizer(place, folder, tokenizer, language, shape)


def release_config(trained: Trained, llm: Mapping[str, Any], units: int) -> dict[str, Any]:
    """`config.json` of the release, with the keys of transformers 4, in which the released code runs."""
    t2c, speech = trained.recipe.model.t2c, trained.recipe.model.speech_encoder
    assert t2c is not None and speech is not None
    plain = {key: value for key, value in llm.items() if key not in _PLAIN}
    rope = dict(llm.get("rope_parameters") or {})
    if rope:
        plain["rope_theta"] = rope.pop("rope_theta", 10_000.0)
        plain["rope_scaling"] = rope if rope.get("rope_type", "default") != "default" else None
    shape = T2cShape(t2c.layers, t2c.width, t2c.heads, t2c.heads, t2c.ffn)
    name = unit_model(shape, dict(llm))[1]
    own: dict[str, Any] = {
        "audio_tower": speech.path,
        "unit_output": "finetune_kd_online",
        "audio_token_len": 1,
        **trained.manifest.get("imported", {}).get("config", {}),
        "adapter_size": trained.tensors["s2t.front_end.alignment.projection.weight"].shape[1] // 2,
        "unit_vocab_size": units,
    }
    own |= {} if name is None else {"unit_model": name}
    return {
        **plain,
        **own,
        "architectures": ["EchoXForCausalLM"],
        "model_type": "EchoX",
        "vocab_size": LLAMA_3 + 1,
        "torch_dtype": "float16",
    }


def _tensors(trained: Trained, shape: ReleaseShape) -> dict[str, Tensor]:
    """All tensors of the release, in float32."""
    import torch

    model = merged_llm(trained, torch.float32)
    state: dict[str, Tensor] = model.state_dict()
    llm = {name: state[name] for name in shape.llm()}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in llm:
            llm[name] = with_rows(llm[name], shape.vocabulary)
    t2c = trained.recipe.model.t2c
    assert t2c is not None
    tables = {None: state["model.embed_tokens.weight"], "head": model.get_output_embeddings().weight.detach()}
    table = trained.tensors[OWN_TABLE] if t2c.text_table == "own" else tables[t2c.text_table]
    speech = {name: value.float() for name, value in trained.speech.items() if value.is_floating_point()}
    return {**llm, **to_released(speech, shape), TEXT_TABLE: with_rows(table.float(), shape.vocabulary)}


def _write_tokenizer(place: Path, folder: Path, tokenizer: Any, language: UnitLanguage, shape: ReleaseShape) -> None:
    """The LLM's tokenizer with the placeholder and the unit tokens, in the order of the unit language."""
    from tokenizers import AddedToken

    copy_own(place, FILES, folder)
    tokens = [language.token(number) for number in range(language.size)]
    bodies, wrong = unit_bodies(tokenizer, shape)
    if not wrong and [f"<|unit_{body}|>" for body in bodies] == tokens:
        return
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in (PLACEHOLDER, *tokens)])
    bodies, wrong = unit_bodies(tokenizer, shape)
    if wrong:
        raise RecipeError(f"the LLM's tokenizer cannot take the unit tokens: {'; '.join(wrong)}", fix="export as hf")
    tokenizer.save(str(folder / "tokenizer.json"))
    _set_pad(folder / "tokenizer_config.json", tokenizer.id_to_token(END_OF_TURN))


def _set_pad(path: Path, pad: str) -> None:
    """Stock Llama 3 names no pad token; the released code's is the end of a turn."""
    content = read_json(path) if path.is_file() else {}
    path.write_text(json.dumps({**content, "pad_token": pad}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _config_of(place: Path) -> dict[str, Any]:
    try:
        found = read_json(place / "config.json")
        if not isinstance(found, dict):
            raise TypeError("no JSON object")
    except (OSError, ValueError, TypeError) as error:
        fix = "put the LLM of the run back"
        raise MissingModelError(f"its config.json cannot be read: {error}", where=str(place), fix=fix) from error
    return found


def _language(trained: Trained) -> UnitLanguage | None:
    t2c = trained.recipe.model.t2c
    return (
        None
        if t2c is None or trained.recipe.stage != "echo"
        else UnitLanguage.load(resolve_data_file(t2c.unit_language))
    )
