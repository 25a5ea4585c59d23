"""Imports a release: a folder that speaks as a run does, and that Stage III goes on from.

The released T2C teacher is not public. The imported Echo decoder stands in for it, which is said.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echox.config.paths import cache_dir, resolve_model
from echox.config.schema import Recipe
from echox.engine.checkpoint.recorded import LANGUAGE
from echox.engine.frozen import identify
from echox.errors import MissingModelError
from echox.files import read_json, read_record
from echox.release.echox_format import parity
from echox.release.echox_format.names import ECHO, TEXT_TABLE, to_ours
from echox.release.echox_format.reading import TYPES, Header, compare, read_all, read_headers, refused
from echox.release.echox_format.shape import END_OF_TURN, OWN_KEYS, ReleaseShape, parse
from echox.release.echox_format.vocabulary import FILES, fixed_problems, kind_of, open_tokenizer, unit_bodies
from echox.release.echox_format.vocoder import FOLDER, is_there, read_vocoder, write_vocoder
from echox.release.exported import OWN_TABLE, TEACHER
from echox.release.folders import belongs, check_free, copy_own, new_folder
from echox.release.speech_folder import seal, write_speech
from echox.units.pieces import PieceLanguage

if TYPE_CHECKING:
    from torch import Tensor

TIED_HEAD = "lm_head.weight"
_INPUT_TABLE = "model.embed_tokens.weight"
Findings = dict[str, str]
"""What only the files of a release can tell, by subject."""


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A release whose files fit together; no tensor is read yet.

    Attributes:
        shape: its sizes.
        headers: of its tensors.
        bodies: of its unit tokens.
        unknown: tensors that belong to no release.
    """

    shape: ReleaseShape
    headers: dict[str, Header]
    bodies: list[str]
    unknown: list[str]


def import_release(release: Path, out: Path, *, encoder: str, system: str = "", drop_unknown: bool = False) -> Findings:
    """Import a release into a new folder.

    Args:
        release: its folder.
        out: new folder.
        encoder: the Whisper model that it was trained with, which is not part of it.
        system: what the system turn of the prompt says.
        drop_unknown: leave tensors out that belong to no release, rather than refuse them.

    Returns:
        What only its files could tell.

    Raises:
        CheckpointError: files that are damaged or do not fit together; names all that is wrong.
        MissingModelError: the release, its tokenizer or the encoder is missing.
        DataError: `out` is no new folder, or cannot be written.
    """
    check_free(out)
    opened = open_release(release, drop_unknown=drop_unknown)
    _check_encoder(encoder, opened.shape)
    names = [*opened.shape.llm(), *opened.shape.speech()]
    names += [TIED_HEAD] if opened.shape.tied and TIED_HEAD in opened.headers else []
    tensors = read_all(opened.headers, names)
    if opened.shape.tied and TIED_HEAD in tensors and not tensors[TIED_HEAD].equal(tensors[_INPUT_TABLE]):
        raise refused(release, [f"tie_word_embeddings is on, but {TIED_HEAD} is another table than {_INPUT_TABLE}"])
    table, said = text_table(tensors, opened.shape)
    voice = _vocoder(release)
    pad = _pad_token(release)
    findings = _findings(release, opened, said, pad) | {"vocoder": FOLDER if voice else "not in the release"}
    with new_folder(out) as folder:
        recipe = parity.recipe(
            opened.shape,
            name=_name(out),
            encoder=encoder,
            text_table=table,
            system=system,
            unseen=pad if pad == parity.END else None,
        )
        _write_llm(release, folder, {name: tensors[name] for name in opened.shape.llm()}, opened.shape)
        write_speech(_speech(tensors, opened.shape, table), folder)
        PieceLanguage(opened.bodies).save(folder / LANGUAGE)
        if voice:
            write_vocoder(*voice, folder / FOLDER)
        seal(folder, recipe, _contents(opened, encoder, findings))
        parity.write_finetune(recipe, out, folder)
        _write_card(out, folder, recipe, findings)
    return findings


def open_release(release: Path, *, drop_unknown: bool = False) -> Opened:
    """Compare configuration, tokenizer and tensors of a release.

    Raises:
        CheckpointError: they do not fit together; names all that is wrong.
        MissingModelError: the folder, its `config.json`, weights or tokenizer is not there.
    """
    path = release / "config.json"
    strays = [name for name in ("config.json", "tokenizer.json") if not belongs(release, release / name)]
    if strays:
        raise refused(release, [f"{name} leads out of the folder" for name in strays])
    try:
        config = read_json(path)
    except FileNotFoundError:
        raise MissingModelError(
            "there is no config.json", where=str(release), fix="name the folder of a release"
        ) from None
    except (OSError, ValueError) as error:
        raise refused(release, [f"config.json cannot be read: {error}"]) from error
    shape, problems = parse(config)
    headers, damaged = read_headers(release)
    tokenizer = open_tokenizer(release)
    problems += [*damaged, *fixed_problems(tokenizer)]
    bodies: list[str] = []
    unknown: list[str] = []
    if shape is not None:
        bodies, wrong = unit_bodies(tokenizer, shape)
        expected = {**shape.llm(), **shape.speech()}
        if shape.tied and TIED_HEAD in headers:
            expected[TIED_HEAD] = (shape.vocabulary, shape.width)
        unfit, unknown = compare(headers, expected)
        if damaged:  # what a damaged file holds is not missing
            unfit = [problem for problem in unfit if not problem.endswith(" is missing")]
        problems += [*wrong, *unfit]
        if not drop_unknown:
            problems += [f"{name} is no tensor of a release (leave it out with --drop-unknown)" for name in unknown]
    if problems or shape is None:
        raise refused(release, problems)
    return Opened(shape=shape, headers=headers, bodies=bodies, unknown=unknown)


def text_table(tensors: Mapping[str, Tensor], shape: ReleaseShape) -> tuple[str | None, str]:
    """Which table T2C reads its text from, as `model.t2c.text_table` has it, and a sentence about it."""
    own = tensors[TEXT_TABLE]
    tables: dict[str, tuple[str | None, str]] = {"the LLM's input table": (None, _INPUT_TABLE)}
    if not shape.tied:
        tables["the LLM's head"] = ("head", TIED_HEAD)
    nearest, fewest = "", len(own)
    for said, (value, name) in tables.items():
        differing = (own != tensors[name]).any(1).nonzero()[:, 0].tolist()
        if not differing:
            return value, said
        if len(differing) < fewest:
            rows = f"row {differing[0]}" if len(differing) == 1 else f"{len(differing):,} rows"
            zero = " (zeros)" if differing == [END_OF_TURN] and not bool(own[END_OF_TURN].any()) else ""
            nearest, fewest = f"{said} but for {rows}{zero}", len(differing)
    return "own", f"its own: {nearest}" if fewest < len(own) else "its own"


def _speech(tensors: Mapping[str, Tensor], shape: ReleaseShape, table: str | None) -> dict[str, Tensor]:
    ours = to_ours(tensors, shape)
    if table == "own":
        ours[OWN_TABLE] = tensors[TEXT_TABLE]
    echo = {name.removeprefix(ECHO): value for name, value in ours.items() if name.startswith(ECHO)}
    return {**ours, **{TEACHER + name: value.clone() for name, value in echo.items()}}


def _write_llm(release: Path, folder: Path, tensors: dict[str, Tensor], shape: ReleaseShape) -> None:
    """A plain Llama folder, with the tokenizer of the release."""
    from huggingface_hub import save_torch_state_dict

    save_torch_state_dict(tensors, folder, max_shard_size="5GB")
    plain = {key: value for key, value in shape.config.items() if key not in OWN_KEYS and key != "auto_map"}
    plain |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")
    copy_own(release, FILES, folder)


def _contents(opened: Opened, encoder: str, findings: Findings) -> dict[str, Any]:
    own = {key: value for key, value in opened.shape.config.items() if key in OWN_KEYS}
    return {
        "step": 0,
        "updates": 0,
        "attempt": 0,
        "world_size": 0,
        "metrics": {},
        "precision": "fp32",
        "frozen": identify({"speech_encoder": resolve_model(encoder)}, cache_dir() / "sha256.json"),
        "run_files": {LANGUAGE: {"sha256": PieceLanguage(opened.bodies).sha256, "about": {"unit_set": None}}},
        "imported": {"config": own, "findings": findings},
    }


def _vocoder(release: Path) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    if not is_there(release):
        return None
    config, tensors, problems = read_vocoder(release)
    if problems:
        raise refused(release, problems)
    return config, tensors


def _check_encoder(encoder: str, shape: ReleaseShape) -> None:
    from echox.release.pretrained import encoder_width

    width = encoder_width(str(resolve_model(encoder)))
    if width != shape.encoder_width:
        raise MissingModelError(
            f"the speech encoder has width {width}, the release was trained with one of {shape.encoder_width}",
            where=encoder,
            fix="name it with --encoder; of the published models it is openai/whisper-large-v3",
        )


def _pad_token(release: Path) -> str:
    """What pads: the released code lets nothing attend to it in a prompt, where it is the end of a turn too."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        pad = read_record(release, name).get("pad_token")
        if pad:
            return str(pad.get("content") if isinstance(pad, dict) else pad)[:60]
    return parity.END  # as the released class has it fixed


def _findings(release: Path, opened: Opened, table: str, pad: str) -> Findings:
    """Everything that only the real files can tell."""
    config, headers = opened.shape.config, opened.headers
    generation = read_record(release, "generation_config.json")
    types = Counter(TYPES.get(header.dtype, header.dtype) for header in headers.values())
    known = OWN_KEYS | _llama_keys()
    extra = sorted(key for key in config if key not in known)
    kind, bodies = kind_of(opened.bodies), opened.bodies
    stored = "stored" if TIED_HEAD in headers else "not stored"
    return {
        "pad token": f"{pad}, number {config.get('pad_token_id', generation.get('pad_token_id'))}",
        "unit tokens": f"{len(bodies)}, bodies are {kind}: {', '.join(bodies[:3])} … {bodies[-1]}",
        "T2C text table": table,
        "head": f"tie_word_embeddings is {'on' if opened.shape.tied else 'off'}, lm_head.weight is {stored}",
        "unit_output": str(config.get("unit_output")),
        "unit_model": f"{config.get('unit_model')}: T2C of {opened.shape.t2c.layers} layers of width "
        f"{opened.shape.t2c.width}, {opened.shape.t2c.heads} heads",
        "other keys of config.json": ", ".join(extra) or "none",
        "other tensors": ", ".join(opened.unknown) or "none",
        "number formats": ", ".join(f"{count} tensors {name}" for name, count in sorted(types.items())),
        "eos_token_id": str(generation.get("eos_token_id", config.get("eos_token_id"))),
        "use_cache": str(config.get("use_cache", "not said")),
        "teacher": "the released T2C teacher is not public; the Echo decoder stands in for it",
    }


def _llama_keys() -> frozenset[str]:
    from transformers import LlamaConfig

    return frozenset(LlamaConfig().to_dict()) | {"rope_theta", "rope_scaling", "torch_dtype", "auto_map"}


def _name(out: Path) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", out.name).strip("-._") or "imported"


def _write_card(out: Path, folder: Path, recipe: Recipe, findings: Findings) -> None:
    rows = "\n".join(f"| {subject} | {said.replace('|', chr(92) + '|')} |" for subject, said in findings.items())
    encoder = "" if recipe.model.speech_encoder is None else Path(recipe.model.speech_encoder.path).name
    text = f"""# {recipe.name}

An EchoX release, imported by `echox import`. The language model is what `transformers` loads from this folder;
`speech.safetensors` holds the speech parts, `vocoder/` the vocoder, if the release had one. The speech encoder is
`{encoder}`, a folder of its own.

```bash
echox speak --run {out.name} --question question.wav --out answer.wav --vocoder {out.name}/vocoder
echox respond {out.name}/finetune.yaml
echox train {out.name}/finetune.yaml
```

`finetune.yaml` goes on with Stage III; name your data in it. The released T2C teacher is not public: the Echo decoder
stands in for it.

| what the files say | |
|---|---|
{rows}
"""
    (folder / "README.md").write_text(text, encoding="utf-8")
