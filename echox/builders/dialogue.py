"""Renders the dialogue before a spoken turn: through the LLM's chat template, or in the manner of a written prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from echox.builders.plain_text import PlainText
from echox.builders.prompt import ANSWERED, PARTS, SPOKEN, render, rendered_prompt, split
from echox.config.model_schema import PromptConfig
from echox.errors import RecipeError
from echox.stream.dialogue import RenderedTurns, Turn


class _Message(NamedTuple):
    """Role, text, and whether the speech vectors of a clip follow the text."""

    role: str
    text: str
    heard: bool = False


class DialogueTemplate:
    """Renders earlier turns into the text before and after a spoken one; a turn with a clip leaves a gap for it.

    A prompt that is the chat template's own is rendered by the template; where that refuses a system turn, the system's
    text begins the next user turn. A prompt that was written otherwise is repeated: `before`, text and `after` of a
    user turn, text and `end` of an answer, and what the template puts between an answer and the next user turn. There,
    too, the system's text begins the next user turn.

    Args:
        prompt: with every part there, see `prompt_of`.
        tokenizer: the LLM's.
        model: its name, for errors.
    """

    def __init__(self, prompt: PromptConfig, tokenizer: Any, model: str) -> None:
        self._tokenizer = tokenizer
        self._plain = PlainText(tokenizer)
        self._model = model
        self._before, self._after, self._end = (str(getattr(prompt, part)) for part in PARTS)
        self._by_template = False
        self._again = self._before.removeprefix(tokenizer.bos_token or "")
        try:
            template = rendered_prompt(tokenizer, model)
        except RecipeError:
            return  # the prompt is written, and all there is
        self._by_template = prompt == template
        self._again = self._later(str(template.end)) or self._again

    def __call__(self, turns: Sequence[Turn]) -> RenderedTurns:
        """Texts around the clips, and after the question's audio.

        Raises:
            RecipeError: the chat template does not render these turns.
        """
        said = [
            _Message(turn.role, "" if turn.clip is not None else self._plain(turn.text), turn.clip is not None)
            for turn in turns
        ]
        said.append(_Message("user", "", heard=True))
        if not self._by_template:
            return self._repeated(_without_system(said))
        try:
            return self._rendered(said)
        except RecipeError:
            if all(message.role != "system" for message in said):
                raise
            return self._rendered(_without_system(said))

    def _rendered(self, said: Sequence[_Message]) -> RenderedTurns:
        gaps = [f"{SPOKEN}{number}X" for number in range(len(said))]
        messages = [
            {"role": message.role, "content": message.text + gap * message.heard}
            for message, gap in zip(said, gaps, strict=True)
        ]
        rest, before = render(self._tokenizer, self._model, messages, add_generation_prompt=True), []
        for message, gap in zip(said, gaps, strict=True):
            if message.heard:
                piece, rest = split(rest, gap, self._model)
                before.append(piece)
        return RenderedTurns(before, rest)

    def _repeated(self, said: Sequence[_Message]) -> RenderedTurns:
        pieces, asked = [""], False
        for number, message in enumerate(said):
            if message.role == "assistant":
                pieces[-1] += message.text + self._end
            else:
                # A question that nobody answered gets an empty answer: the template has opened one.
                pieces[-1] += self._end if asked else ""
                pieces[-1] += (self._again if number else self._before) + message.text
                if message.heard:
                    pieces.append("")
                pieces[-1] += self._after
            asked = message.role == "user"
        *before, after = pieces
        return RenderedTurns(before, after)

    def _later(self, end: str) -> str | None:
        """What stands between the end of an answer and the next question; None where the prompt is another's.

        It is the template's, if the written prompt begins a question as the template does, with or without what the
        template puts before the first one.
        """
        turns = [
            {"role": "user", "content": "Q"},
            {"role": "assistant", "content": ANSWERED},
            {"role": "user", "content": SPOKEN},
        ]
        try:
            text = render(self._tokenizer, self._model, turns, add_generation_prompt=True)
            between, _ = split(split(text, ANSWERED, self._model)[1], SPOKEN, self._model)
        except RecipeError:
            return None
        _, ended, following = between.partition(end)
        opening = following if ended else between
        same = opening.strip() and (opening.endswith(self._before) or self._before.endswith(opening.lstrip()))
        return opening if same else None


def _without_system(said: Sequence[_Message]) -> list[_Message]:
    """The same with the text of system turns at the beginning of the user turn after them."""
    kept: list[_Message] = []
    told = ""
    for message in said:
        if message.role == "system":
            told += f"{message.text}\n\n"
        elif message.role == "user":
            kept.append(message._replace(text=told + message.text))
            told = ""
        else:
            kept.append(message)
    return kept
