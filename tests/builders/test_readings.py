"""Options of Stage III that a builder must heed: which texts and units are read, and where labels are kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from echox.builders.labels import LabelFile, keep_labels, teacher_identity
from echox.builders.setup import TextTools, build_speech_collate, build_stage
from echox.config.model_schema import T2cConfig
from echox.config.schema import Recipe
from echox.errors import RecipeError
from echox.stages.labels import Label
from tests.builders import tiny_run

ANNOTATED = {"labels": "annotated", "pseudo_text": "reference", "segmentation": {"mode": "none"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny_run.write_models(folder)
    return folder


def echo_recipe(folder: Path, **echo: Any) -> Recipe:
    return tiny_run.make_recipe(folder, "echo", echo=echo, random_init=True)


def test_transcripts_are_needed_where_stage_three_keeps_ctc(folder: Path) -> None:
    for weight in (0.0, 0.3):
        recipe = echo_recipe(folder, ctc_weight=weight)
        collate = build_speech_collate(recipe, TextTools.load(recipe))
        assert collate.needs_transcript is (weight > 0)


def test_units_are_read_where_they_are_the_labels(folder: Path) -> None:
    plain, annotated = echo_recipe(folder), echo_recipe(folder, **ANNOTATED)
    text = TextTools.load(annotated)
    assert build_speech_collate(plain, text).labels is None
    assert build_speech_collate(annotated, text).labels is text.language is not None
    assert build_speech_collate(annotated.model_copy(update={"stage": "s2t"}), text).labels is None
    (folder / "language.json").rename(folder / "away.json")
    try:
        with pytest.raises(RecipeError, match="labels=annotated needs a fitted unit language"):
            build_speech_collate(annotated, TextTools.load(annotated))
    finally:
        (folder / "away.json").rename(folder / "language.json")


def test_labels_are_kept_below_the_storage_where_the_recipe_says_so(folder: Path, tmp_path: Path) -> None:
    for labels in ("teacher", "drafted", "cached"):
        recipe = echo_recipe(folder, labels=labels, pseudo_text="reference")
        recipe = recipe.model_copy(update={"storage": str(tmp_path)})
        stage: Any = build_stage(recipe, TextTools.load(recipe))
        keep_labels(recipe, stage, 3)
        assert (stage.label_store is None) is (labels == "teacher")
    assert isinstance(stage.label_store, LabelFile)
    stage.label_store.add({(1,): Label([2], True)})
    place = tmp_path / "labels" / teacher_identity(stage) / "tiny-echo" / "rank-00003.jsonl"
    assert place.read_text() == "[[1], [2], true]\n"


def llama3(folder: Path) -> str:
    """A tokenizer with the ids of Llama 3 for the words of the released template."""
    from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, PreTrainedTokenizerFast

    special = {"<|begin_of_text|>": 128000, "<|start_header_id|>": 128006, "<|end_header_id|>": 128007,
               "<|eot_id|>": 128009}  # fmt: skip
    vocab = {"speaker": 65576, "\n": 198, " arrested": 12800, ".": 13, "x": 0, **special}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="x"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n| arrested|speaker"), "isolated")
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="x").save_pretrained(folder)
    AutoConfig.for_model("llama").save_pretrained(folder)
    return str(folder)


def test_the_released_template_is_two_values_of_the_recipe(folder: Path, tmp_path: Path) -> None:
    block = (T2cConfig.__doc__ or "").split("```yaml")[1].split("```")[0]
    released = yaml.safe_load(block)
    assert set(released) == {"prefix", "unit_header"}
    recipe = tiny_run.make_recipe(folder, "t2c", random_init=True)
    model = recipe.model
    assert model.t2c is not None
    update = {
        "llm": model.llm.model_copy(update={"path": llama3(tmp_path)}),
        "t2c": model.t2c.model_copy(update=released),
    }
    text = TextTools.load(recipe.model_copy(update={"model": model.model_copy(update=update)}))
    speaker = [128006, 128000, 65576, 128007, 128000, 198]
    assert text.prefix == [*speaker, 12800] and text.header == [128009, *speaker]
