"""Writes the model card of an exported folder: what it is made of, how it was trained, and how to use it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from echox.config.schema import Recipe
from echox.release.trained import Trained

USES = {
    "peft": """```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "this folder")
```

The speech side is not here: in `peft` and `merged` exports the language model reads and writes text.""",
    "merged": """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("this folder")
tokenizer = AutoTokenizer.from_pretrained("this folder")
```

The speech side is not here: in `peft` and `merged` exports the language model reads and writes text.""",
    "echox": """The folder is in the layout of the published EchoX weights, for their released inference code;
`echox import` reads it back. Its `config.audio_tower` names the speech encoder, `{encoder}`; a vocoder is a folder of
its own.""",
    "hf": """```bash
echox speak --run FOLDER --question question.wav --out answer.wav --vocoder VOCODER
echox serve FOLDER --vocoder VOCODER
echox train RECIPE model.llm.path=FOLDER init.s2t=FOLDER init.t2c=FOLDER
```

The language model alone is what `transformers` loads from this folder. `speech.safetensors` holds the adapters, and of
a Stage III run the Denoising Adapter, the Echo decoder and the T2C teacher. The speech encoder is `{encoder}`{where}; a
vocoder for the units is a folder of its own.""",
}
"""How a folder of each format is used."""


def write_card(trained: Trained, out: Path, folder: Path, form: str) -> None:
    """Write `README.md` into `folder`, which will be `out`."""
    recipe = trained.recipe
    base, encoder = _name(recipe.model.llm.path), recipe.model.speech_encoder
    where = ", in `speech_encoder/`" if (folder / "speech_encoder").is_dir() else ""
    use = USES[form].format(base=base, encoder="" if encoder is None else _name(encoder.path), where=where)
    rows = [
        ("language model", base),
        ("speech encoder", "" if encoder is None else _name(encoder.path)),
        ("stages", ", ".join(f"{stage} (`{name}`)" for stage, name in _stages(trained).items())),
        ("steps of the last stage", f"{trained.manifest.get('step', 0):,}"),
        ("data", ", ".join(f"{_name(source.path)} ({source.task})" for source in recipe.data.train)),
        ("LoRA", _lora(recipe) if not trained.exported else "merged"),
        ("T2C", _t2c(recipe)),
    ]
    table = "\n".join(f"| {what} | {value} |" for what, value in rows if value)
    metrics = _metrics(trained.manifest.get("metrics", {}))
    text = f"""---
library_name: {"peft" if form == "peft" else "transformers"}
base_model: {base}
tags: [echox, speech-to-speech]
---

# {recipe.name}

A language model that hears speech{" and answers in speech" if recipe.stage == "echo" else ""}, trained with the EchoX
training system (method: arXiv 2509.09174). Format: `{form}`, written by
`echox export RUN {out.name} --format {form}`.

| | |
|---|---|
{table}
{metrics}
## Use

{use}

## Training

```bash
{_commands(trained)}
```
"""
    (folder / "README.md").write_text(text, encoding="utf-8")


def _name(path: str) -> str:
    """A model or dataset without the folders of the machine it lay on."""
    return Path(path).name if Path(path).expanduser().is_absolute() else path


def _stages(trained: Trained) -> dict[str, str]:
    recipe = trained.recipe
    if trained.exported:
        return {recipe.stage: recipe.name}
    earlier = {"s2t": recipe.init.s2t, "t2c": recipe.init.t2c} if recipe.stage == "echo" else {}
    return {**{stage: _name(ref) for stage, ref in earlier.items() if ref}, recipe.stage: recipe.name}


def _lora(recipe: Recipe) -> str:
    lora = recipe.model.llm.lora
    return f"rank {lora.r}, alpha {lora.alpha:g}, on {', '.join(lora.targets)}"


def _t2c(recipe: Recipe) -> str:
    t2c = recipe.model.t2c
    if recipe.stage != "echo" or t2c is None:
        return ""
    return f"{t2c.layers} layers of width {t2c.width}, {t2c.heads} heads"


def _metrics(last: Mapping[str, Any]) -> str:
    losses = [f"| {name} | {value:.4f} |" for name, value in sorted(last.items()) if name.startswith("loss/")]
    return "\n".join(["", "| last losses | |", "|---|---|", *losses, ""]) if losses else ""


def _commands(trained: Trained) -> str:
    scale, recipe = trained.recipe.scale, trained.recipe
    stages = ("s2t", "t2c") if recipe.stage == "echo" else ()
    earlier = [f"echox train {scale}/{stage}" for stage in stages]
    own = recipe.model.echo.pseudo_text == "generated" and recipe.stage == "echo"
    respond = [f"echox respond {scale}/{recipe.stage}"] if own else []
    return "\n".join([*earlier, *respond, f"echox train {scale}/{recipe.stage}"])
