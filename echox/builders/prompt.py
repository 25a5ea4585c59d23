"""Renders the prompt around a spoken turn from the chat template of the LLM's tokenizer (`model.llm.prompt: auto`).

The template sees one user turn that says a placeholder; what it writes before and after it is the prompt. What it
writes after an answer gives the token that ends a response.
"""

from __future__ import annotations

from typing import Any

from echox.config.model_schema import PromptConfig
from echox.errors import RecipeError

SPOKEN, ANSWERED = "SPOKENTURN", "ANSWEREDTURN"
"""Placeholders without anything that a template would trim or change."""
NO_THINKING = {"enable_thinking": False, "thinking": False, "reasoning": False}
"""What templates call the switch that lets an answer begin without a chain of thought."""
PARTS = ("before", "after", "end")
_WITHOUT_TEMPLATE = PromptConfig(before="user: ", after="\nassistant: ", end="\n")
"""For random weights on the byte-level stand-in of a tokenizer."""
_ONE_DATE = (
    "{% macro strftime_now(format) %}{{ format | replace('%d', '26') | replace('%-d', '26') | replace('%b', 'Jul')"
    " | replace('%B', 'July') | replace('%m', '07') | replace('%Y', '2024') | replace('%y', '24')"
    " | replace('%A', 'Friday') | replace('%a', 'Fri') | replace('%H', '00') | replace('%M', '00')"
    " | replace('%S', '00') }}{% endmacro %}\n"
)
"""Stands before a template that would write today's date: a prompt must be the same on every day of a run and after
it. The day is the one that Llama 3.1's template writes where it knows no other."""


def prompt_of(written: PromptConfig, tokenizer: Any, model: str, *, random_init: bool = False) -> PromptConfig:
    """The prompt with every part there: as written in the recipe, the others as the tokenizer's template has them.

    Raises:
        RecipeError: a part is not written, and the tokenizer has no template, or one that gives no such part.
    """
    if all(getattr(written, part) is not None for part in PARTS):
        return written
    stands_in = random_init and not tokenizer.chat_template
    rendered = _WITHOUT_TEMPLATE if stands_in else rendered_prompt(tokenizer, model)
    return rendered.model_copy(update={part: text for part, text in written if text is not None})


def rendered_prompt(tokenizer: Any, model: str) -> PromptConfig:
    """What the chat template of a tokenizer writes around one user turn, and the token it ends an answer with.

    Raises:
        RecipeError: there is no template, or what it renders cannot be split at the turn.
    """
    if not tokenizer.chat_template:
        raise _error(f"the tokenizer of {model} has no chat template", "use an instruction-tuned LLM, or write")
    question, answer = {"role": "user", "content": SPOKEN}, {"role": "assistant", "content": ANSWERED}
    before, after = split(render(tokenizer, model, [question], add_generation_prompt=True), SPOKEN, model)
    _, tail = split(render(tokenizer, model, [question, answer], add_generation_prompt=False), ANSWERED, model)
    return PromptConfig(before=before, after=after, end=_end_token(tokenizer, tail, model))


def difference(written: PromptConfig, tokenizer: Any, model: str) -> str | None:
    """One line that shows each written part of a prompt beside what the chat template has; None where they agree.

    None too where there is no template that could be rendered.
    """
    try:
        rendered = rendered_prompt(tokenizer, model)
    except RecipeError:
        return None
    pairs = [(part, getattr(written, part), getattr(rendered, part)) for part in PARTS]
    odd = [f"{part} is {mine!r}, there {its!r}" for part, mine, its in pairs if mine is not None and mine != its]
    return f"model.llm.prompt is not the chat template of {model}: {'; '.join(odd)}" if odd else None


def render(tokenizer: Any, model: str, turns: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
    """Turns as the chat template writes them, the same on every day, without thinking.

    Raises:
        RecipeError: the template fails, whatever it says.
    """
    try:
        text = tokenizer.apply_chat_template(
            turns,
            chat_template=_ONE_DATE + tokenizer.get_chat_template(),
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **NO_THINKING,
        )
    except Exception as error:  # whatever the template, a program of somebody else's, ends with
        raise _error(f"the chat template of {model} does not render a turn of text: {error}", "write") from error
    return str(text)


def split(text: str, placeholder: str, model: str) -> tuple[str, str]:
    """What stands before and after the one place where the placeholder is.

    Raises:
        RecipeError: there is no such place, or several.
    """
    before, *rest = text.split(placeholder)
    if len(rest) != 1:
        raise _error(f"the chat template of {model} writes what a turn says {len(rest)} times", "write")
    return before, rest[0]


def _end_token(tokenizer: Any, tail: str, model: str) -> str:
    """The special token that begins what follows an answer; the tokenizer's end token where none does."""
    ids = tokenizer(tail.lstrip(), add_special_tokens=False).input_ids[:1]
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    if ids and ids[0] in special:
        return str(tokenizer.convert_ids_to_tokens(ids[0]))
    if not tokenizer.eos_token:
        raise _error(f"the chat template of {model} ends an answer with no special token", "write")
    return str(tokenizer.eos_token)


def _error(what: str, fix: str) -> RecipeError:
    return RecipeError(f"model.llm.prompt: {what}", fix=f"{fix} model.llm.prompt.before, after and end in the recipe")
