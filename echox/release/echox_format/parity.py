"""Writes the recipe with which our modules compute what the released ones do."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from echox.config.schema import Recipe
from echox.engine.checkpoint.recorded import LANGUAGE

if TYPE_CHECKING:
    from echox.release.echox_format.shape import ReleaseShape

B, TURN, HEAD_END, END = "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"


def header(role: str) -> str:
    """A turn's header: every call of the released code's tokenizer begins with B."""
    return f"{TURN}{B}{role}{HEAD_END}{B}\n"


def before(system: str) -> str:
    """What stands before the speech, with a message in the system turn."""
    return f"{B}{header('system')}{B}{system}{END}{header('user')}"


AFTER = f"{B}{END}{header('assistant')}"
PREFIX = f"{header('speaker')} arrested"
UNIT_HEADER = f"{END}{header('speaker')}"
"""Between text and units; the released T2C then says B of itself."""
SPOKEN_HEADER = f"{UNIT_HEADER}{B}"
"""The same with the B that it always says first."""
SEGMENTS = {"mode": "trigger", "min_tokens": 20, "max_wait": 50, "threshold": 0.1, "look_ahead": 5}
WORDS_A_TOKEN, POSITIONS = 128, 4096
"""So wide that no segment of the released code meets them: it stops at 2,048 words."""


def model(
    shape: ReleaseShape, *, encoder: str, text_table: str | None, system: str, unseen: str | None
) -> dict[str, Any]:
    """The `model` section."""
    return {
        "llm": {
            "path": "imported",
            "prompt": {"before": before(system), "after": AFTER, "end": END, "begin": B, "unseen": unseen},
        },
        "speech_encoder": {"path": encoder, "input": "all_30s", "max_audio_s": 30.0},
        "alignment": {"attention": "frame_local"},
        "shrink": {"keys": "kept", "blanks": "keep", "ctc_embedding": False},
        "t2c": {
            "layers": shape.t2c.layers,
            "width": shape.t2c.width,
            "heads": shape.t2c.heads,
            "ffn": shape.t2c.ffn,
            "max_positions": POSITIONS,
            "text_table": text_table,
            "body": "llm",
            "head": "full_vocab",
            "prefix": PREFIX,
            "unit_header": SPOKEN_HEADER,
            "unit_language": LANGUAGE,
        },
        "echo": {"segmentation": SEGMENTS, "units_per_token": WORDS_A_TOKEN},
    }


def recipe(
    shape: ReleaseShape, *, name: str, encoder: str, text_table: str | None, system: str, unseen: str | None
) -> Recipe:
    """The recipe of an imported release; of data and training it says nothing."""
    return Recipe.model_validate(
        {
            "name": name,
            "stage": "echo",
            "scale": "imported",
            "model": model(shape, encoder=encoder, text_table=text_table, system=system, unseen=unseen),
            "init": {"s2t": ".", "t2c": "."},
            "data": {"train": [{"path": "unknown", "task": "sqa"}], "history_tokens": 0},
            "optim": {"steps": 1},
            "engine": {"deepspeed": "ds_configs/zero3_3b.json"},
        }
    )


def write_finetune(imported: Recipe, out: Path, folder: Path) -> None:
    """Write `finetune.yaml`: Stage III from the folder `out`, complete but for the data."""
    import yaml

    content = imported.model_dump(mode="json", include={"model", "stage", "scale"}, exclude_defaults=True)
    place = str(out.absolute())
    content["model"]["llm"]["path"] = place
    content["model"]["t2c"]["unit_language"] = f"{place}/{LANGUAGE}"
    whole = {
        "name": f"{imported.name}-echo",
        **content,
        "init": {"s2t": place, "t2c": place},
        "data": {"train": [{"path": "your-data/train", "task": "sqa"}], "history_tokens": 0},
        "optim": {"steps": 1000, "warmup_steps": 10},
        "engine": {"deepspeed": imported.engine.deepspeed},
    }
    said = (
        f"# Stage III from {imported.name}, whose Echo decoder stands in for the T2C teacher. Name your data below.\n"
    )
    text = said + yaml.safe_dump(whole, sort_keys=False, allow_unicode=True)
    (folder / "finetune.yaml").write_text(text, encoding="utf-8")
