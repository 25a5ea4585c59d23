"""The dialogue before a spoken turn: token for token what the chat template writes, and a written prompt repeated."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from echox.builders.dialogue import DialogueTemplate
from echox.builders.prompt import prompt_of, rendered_prompt
from echox.builders.setup import TextTools, build_speech_collate
from echox.config.model_schema import PromptConfig
from echox.errors import RecipeError
from echox.stream.dialogue import Turn
from tests.builders import tiny_run
from tests.builders.test_prompt import CHATML, DATED, INST, OPEN, THINKING, WITH_BOS, tokenizer

HEARD = np.zeros(1600, np.float32)
TALK = [Turn("user", "Where is Lima?"), Turn("assistant", "In Peru."), Turn("user", "And Oslo?"),
        Turn("assistant", "In Norway.")]  # fmt: skip
TOLD = [Turn("system", "Be brief."), *TALK]
STRICT = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "<|{{ m.role }}|>\n{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
"""As Gemma's: no system turn, and user and assistant by turns."""


def auto(template: str | None) -> tuple[DialogueTemplate, Any]:
    made = tokenizer(template)
    return DialogueTemplate(prompt_of(PromptConfig(), made, "m"), made, "m"), made


def ids(made: Any, text: str) -> list[int]:
    return list(made(text, add_special_tokens=False).input_ids)


@pytest.mark.parametrize("turns", [[], TALK[:2], TALK, TOLD, TALK[:3]], ids=len)
@pytest.mark.parametrize("template", [CHATML, WITH_BOS, THINKING, INST, OPEN], ids=lambda text: text[:20])
def test_its_tokens_are_those_of_the_template_split_at_the_question(template: str, turns: list[Turn]) -> None:
    dialogue, made = auto(template)
    (before,), after = dialogue(turns)
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    whole = made.apply_chat_template(
        [*messages, {"role": "user", "content": "PLACEHOLDER"}],
        add_generation_prompt=True,
        enable_thinking=False,
        return_dict=False,
    )
    gap = ids(made, "PLACEHOLDER")
    (at,) = [start for start in range(len(whole)) if whole[start : start + len(gap)] == gap]
    assert (ids(made, before), ids(made, after)) == (whole[:at], whole[at + len(gap) :])
    assert whole.count(made.bos_token_id) <= 1


def test_without_turns_it_is_the_prompt_of_one_spoken_turn() -> None:
    for template in (CHATML, WITH_BOS, THINKING, INST, DATED):
        dialogue, made = auto(template)
        prompt = rendered_prompt(made, "m")
        assert dialogue([]) == ([prompt.before], prompt.after)


def test_a_turn_that_is_heard_leaves_a_gap_in_its_place() -> None:
    dialogue, _ = auto(CHATML)
    turns = [Turn("system", "Be brief."), Turn("user", "not read", clip=HEARD), *TALK[1:3]]
    before, after = dialogue([*turns, Turn("assistant", "In Norway."), Turn("user", "", clip=HEARD), TALK[1]])
    assert before == [
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\nIn Peru.<|im_end|>\n<|im_start|>user\nAnd Oslo?<|im_end|>\n"
        "<|im_start|>assistant\nIn Norway.<|im_end|>\n<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\nIn Peru.<|im_end|>\n<|im_start|>user\n",
    ]
    assert after == "<|im_end|>\n<|im_start|>assistant\n"


def test_where_the_template_has_no_system_turn_its_text_begins_the_next_user_turn() -> None:
    dialogue, _ = auto(STRICT)
    assert dialogue(TOLD[:3]).before == [
        "<s><|user|>\nBe brief.\n\nWhere is Lima?<|end|><|assistant|>\nIn Peru.<|end|><|user|>\n"
    ]
    assert dialogue([Turn("system", "Be brief.")]).before == ["<s><|user|>\nBe brief.\n\n"]
    with pytest.raises(RecipeError, match="roles must alternate"):
        dialogue(TALK[:1])


def written(made: Any, **parts: str) -> DialogueTemplate:
    return DialogueTemplate(prompt_of(PromptConfig(**parts), made, "m"), made, "m")


PLAIN = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"
REPEATED = (
    "{before}Where is Lima?<|im_end|>\n<|im_start|>assistant\nIn Peru.<|im_end|>\n"
    "<|im_start|>user\nAnd Oslo?<|im_end|>\n<|im_start|>assistant\nIn Norway.<|im_end|>\n<|im_start|>user\n"
)


@pytest.mark.parametrize("before", [PLAIN[0], "<|im_start|>system\nBe rude.<|im_end|>\n<|im_start|>user\n"])
def test_a_written_prompt_is_repeated_with_what_the_template_puts_between(before: str) -> None:
    dialogue = written(tokenizer(CHATML), before=before, after=PLAIN[1], end=PLAIN[2])
    assert dialogue(TALK) == ([REPEATED.format(before=before)], PLAIN[1])


def test_a_written_prompt_of_another_kind_is_repeated_as_it_is() -> None:
    for template in (None, CHATML):
        dialogue = written(tokenizer(template), before="<s>Q: ", after="\nA: ", end="</s>")
        assert dialogue(TALK[:2]) == (["<s>Q: Where is Lima?\nA: In Peru.</s>Q: "], "\nA: ")
        assert dialogue(TALK[:1]) == (["<s>Q: Where is Lima?\nA: </s>Q: "], "\nA: "), "nobody answered"
        told = [Turn("system", "Be brief."), Turn("user", "", clip=HEARD), TALK[1]]
        assert dialogue(told) == (["<s>Q: Be brief.\n\n", "\nA: In Peru.</s>Q: "], "\nA: ")
        assert dialogue([]) == (["<s>Q: "], "\nA: ")


def test_random_weights_have_a_dialogue_too() -> None:
    made = tokenizer(None)
    dialogue = DialogueTemplate(prompt_of(PromptConfig(), made, "m", random_init=True), made, "m")
    said: Sequence[str] = dialogue(TALK[:2]).before
    assert said == ["user: Where is Lima?\nassistant: In Peru.\nuser: "]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny_run.write_models(folder)
    return folder


@pytest.mark.parametrize(
    ("data", "expected"),
    [({}, (1024, False)), ({"history_tokens": 0}, None), ({"history": "speech", "history_tokens": 7}, (7, True))],
)
def test_the_recipe_says_how_much_of_it_is_read_or_heard(
    folder: Path, data: dict[str, Any], expected: tuple[int, bool] | None
) -> None:
    recipe = tiny_run.make_recipe(folder, "s2t")
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update=data)})
    text = TextTools.load(recipe)
    history = build_speech_collate(recipe, text).history
    assert (None if history is None else (history.tokens, history.spoken)) == expected
    assert history is None or history.render is text.dialogue
