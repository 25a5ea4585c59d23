"""A recipe's language is one that Whisper knows, and what hangs on it follows from its code."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers.models.whisper.tokenization_whisper import LANGUAGES as OF_WHISPER

from echox.builders.setup import TextTools
from echox.config.languages import LANGUAGES, full_stop
from echox.config.load import load_recipe
from echox.config.schema import Change, change_of
from echox.errors import RecipeError
from tests.builders import tiny_run
from tests.builders.test_prompt import tokenizer


def test_the_languages_are_those_of_whisper() -> None:
    assert OF_WHISPER.keys() == LANGUAGES


def test_english_is_the_default_and_others_are_named_by_their_code() -> None:
    assert load_recipe("demo/t2c").language == "en"
    assert load_recipe("demo/t2c", ["language=ru"]).language == "ru"
    assert load_recipe("demo/t2c", ["language=no"]).language == "no", "YAML reads Norwegian as false"
    assert change_of("language") is Change.REFUSED, "Stage III cuts where its full stop is"


@pytest.mark.parametrize(("given", "fix"), [("rus", 'did you mean "ru"?'), ("german", "known languages: af, am,")])
def test_another_language_is_a_mistake_with_its_fix(given: str, fix: str) -> None:
    with pytest.raises(RecipeError) as raised:
        load_recipe("demo/t2c", [f"language={given}"])
    assert f'language="{given}": must be the code of a language that Whisper knows' in str(raised.value)
    assert fix in str(raised.value)


@pytest.mark.parametrize("given", ["3", "[ru]", "true", "null"])
def test_what_is_no_text_is_no_language(given: str) -> None:
    with pytest.raises(RecipeError, match="language="):
        load_recipe("demo/t2c", [f"language={given}"])


@pytest.mark.parametrize(
    ("language", "mark"), [("en", "."), ("ru", "."), ("th", "."), ("zh", "。"), ("ja", "。"), ("hi", "।"), ("ur", "۔")]
)
def test_the_trigger_waits_for_the_full_stop_of_the_language(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, language: str, mark: str
) -> None:
    assert full_stop(language) == mark
    tiny_run.write_models(tmp_path)
    made = tokenizer(None)
    monkeypatch.setattr("echox.builders.setup.load_tokenizer", lambda path, random_init: made)
    recipe = tiny_run.make_recipe(tmp_path, "echo", random_init=True).model_copy(update={"language": language})
    last_byte = made(mark, add_special_tokens=False).input_ids[-1]
    assert TextTools.load(recipe).stop == last_byte
