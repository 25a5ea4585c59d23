"""Prompts from chat templates: split at the spoken turn, the same every day, and refused where they cannot be."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from echox.builders import setup
from echox.builders.prompt import difference, prompt_of, rendered_prompt
from echox.builders.setup import TextTools, build_setup
from echox.config.load import load_recipe
from echox.config.model_schema import PromptConfig
from echox.errors import DataError, RecipeError

CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WITH_BOS = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content | trim }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)
DATED = "{% set day = strftime_now('%d %b %Y') %}Today: {{ day }}\n" + CHATML
OPEN = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>", "<|end|>", "<unk>"]


def tokenizer(template: str | None, **more: Any) -> Any:
    """Byte-level, with special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(SPECIAL)
    made = PreTrainedTokenizerFast(tokenizer_object=bpe, **{"bos_token": "<s>", "eos_token": "</s>", **more})
    made.chat_template = template
    return made


EXPECTED = {
    "chatml": (
        CHATML,
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>",
    ),
    "with_bos": (WITH_BOS, "<s><|user|>\n", "<|end|><|assistant|>\n", "<|end|>"),
    "thinking": (
        THINKING,
        "<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        "<|im_end|>",
    ),
    "inst": (INST, "<s>[INST] ", " [/INST]", "</s>"),
    "open": (OPEN, "user: ", "\nassistant:", "</s>"),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_template_is_split_at_the_spoken_turn(name: str) -> None:
    template, before, after, end = EXPECTED[name]
    assert rendered_prompt(tokenizer(template), "m") == PromptConfig(before=before, after=after, end=end)


@pytest.mark.parametrize("name", EXPECTED)
def test_its_tokens_are_those_of_the_whole_template(name: str) -> None:
    made = tokenizer(EXPECTED[name][0])
    prompt = rendered_prompt(made, "m")
    question = "Where is Lima?"
    pieces = [made(text, add_special_tokens=False).input_ids for text in (prompt.before, question, prompt.after)]
    whole = made.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, enable_thinking=False, return_dict=False
    )
    assert sum(pieces, []) == whole
    assert whole.count(made.bos_token_id) <= 1


def test_a_template_that_writes_the_date_gives_the_same_prompt_every_day() -> None:
    assert rendered_prompt(tokenizer(DATED), "m").before.startswith("Today: 26 Jul 2024\n<|im_start|>system")  # type: ignore[union-attr]
    other = tokenizer(DATED.replace("%d %b %Y", "%B %d, %Y"))
    assert rendered_prompt(other, "m").before.startswith("Today: July 26, 2024\n")  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("template", "more", "message"),
    [
        (None, {}, "the tokenizer of m has no chat template. Fix: use an instruction-tuned LLM, or write"),
        ("{{ raise_exception('no text, please') }}", {}, "does not render a turn of text: no text, please"),
        ("nothing", {}, "writes what a turn says 0 times"),
        ("{{ messages[0].content }} {{ messages[0].content }}", {}, "writes what a turn says 2 times"),
        (OPEN, {"eos_token": None}, "ends an answer with no special token"),
    ],
)
def test_what_gives_no_prompt_is_refused_with_the_way_out(
    template: str | None, more: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=rf"model\.llm\.prompt: .*{message}.*before, after and end in the recipe"):
        rendered_prompt(tokenizer(template, **more), "m")


def test_written_parts_stay_and_the_template_gives_the_others() -> None:
    whole = PromptConfig(before="a", after="b", end="c")
    assert prompt_of(whole, object(), "m") is whole, "a prompt that is written needs no template"
    mixed = prompt_of(PromptConfig(end="<|end|>"), tokenizer(CHATML), "m")
    assert mixed == rendered_prompt(tokenizer(CHATML), "m").model_copy(update={"end": "<|end|>"})


def test_random_weights_need_no_template() -> None:
    found = prompt_of(PromptConfig(), tokenizer(None), "m", random_init=True)
    assert None not in (found.before, found.after, found.end)
    with pytest.raises(RecipeError):
        prompt_of(PromptConfig(), tokenizer(None), "m")


def test_a_written_prompt_is_shown_beside_the_template_in_one_line() -> None:
    made = tokenizer(CHATML)
    rendered = rendered_prompt(made, "m")
    assert difference(PromptConfig(), made, "m") is None and difference(rendered, made, "m") is None
    line = difference(rendered.model_copy(update={"before": "<|im_start|>user\n"}), made, "m")
    assert line == (
        r"model.llm.prompt is not the chat template of m: before is '<|im_start|>user\n', "
        r"there '<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n'"
    )
    assert difference(rendered, tokenizer(None), "m") is None


def saved(folder: Path, template: str | None) -> str:
    """A model folder with a tokenizer, and without weights."""
    from transformers import AutoConfig

    tokenizer(template).save_pretrained(folder)
    AutoConfig.for_model("llama").save_pretrained(folder)
    (folder / "model.safetensors").touch()
    return str(folder)


def test_a_recipe_that_says_auto_gets_the_template(tmp_path: Path) -> None:
    path = saved(tmp_path, CHATML)
    text = TextTools.load(load_recipe("demo/s2t", [f"model.llm.path={path}", "model.llm.prompt=auto"]))
    decoded = text.tokenizer.decode
    assert decoded(text.prompt.before) == EXPECTED["chatml"][1]
    assert decoded(text.prompt.after) == EXPECTED["chatml"][2]
    assert decoded(text.prompt.after_asr).endswith(EXPECTED["chatml"][2]) and text.prompt.after_asr != text.prompt.after
    assert decoded([text.prompt.end]) == "<|im_end|>"
    written = TextTools.load(load_recipe("demo/s2t", [f"model.llm.path={path}"]))
    assert decoded(written.prompt.before) == "<|im_start|>user\n"
    path = saved(tmp_path / "base", None)
    with pytest.raises(RecipeError, match="has no chat template"):
        TextTools.load(load_recipe("demo/s2t", [f"model.llm.path={path}", "model.llm.prompt=auto"]))


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_rank_says_once_that_the_prompt_is_another(
    tmp_path: Path, rank: int, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = load_recipe("demo/s2t", [f"model.llm.path={saved(tmp_path, CHATML)}", "data.train.0.path=none/there"])
    with caplog.at_level(logging.WARNING, setup.__name__), pytest.raises(DataError):
        build_setup(recipe, rank, 2)
    said = [record.message for record in caplog.records if "is not the chat template of" in record.message]
    assert len(said) == (rank == 0)
