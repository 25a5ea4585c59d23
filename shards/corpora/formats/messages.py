"""Reads chats with sounds: messages of ms-swift and LLaMA-Factory, and the speech lists of LLaMA-Omni and VocalNet.

The former name their sounds apart, in the order of the placeholders `<audio>` in the texts; the latter have one sound
a sample, `speech`, and beside its placeholder an instruction that is the same everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from shards.corpora.formats.rows import Line, Row, Unusable, expanded

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_SOUND = re.compile(r"<audio>|<speech>|<\|audio\|>")


def is_chat(row: Row) -> bool:
    """Whether a JSON object is a list of messages."""
    return isinstance(row.get("messages", row.get("conversations")), list)


def rows(lines: Iterable[Line]) -> Iterator[Line]:
    """A row for each answer to something spoken, with the turns before it."""
    return expanded(lines, _of_chat)


def _of_chat(chat: Row) -> Iterator[Row]:
    messages = [_message(each) for each in chat.get("messages", chat.get("conversations")) or ()]
    one = chat.get("speech")
    sounds = [one] if isinstance(one, str) else list(_listed(chat))
    turns: list[dict[str, str]] = []
    asked: dict[str, Any] | None = None
    found = 0
    for role, content in messages:
        spoken = len(_SOUND.findall(content))
        text = _SOUND.sub("", content).strip()
        if spoken > 1 or spoken and role != "user":
            raise Unusable(f"{spoken} sounds in a message of the {role}; one in a question is what can be used")
        if spoken:
            if not sounds:
                raise Unusable("more placeholders than sounds")
            if text and one is None:
                raise Unusable(f"text beside the sound, which nobody says: {text[:40]!r}")
            asked = {"audio": sounds.pop(0), "text": _written(chat)}
        elif role == "assistant" and asked is not None:
            named = chat.get("id")
            name = {} if named is None else {"id": str(named) if not found else f"{named}-{found}"}
            yield {**asked, "answer_text": text, "turns": list(turns), **name}
            found += 1
            turns += [{"role": "user", "text": asked["text"] or ""}, {"role": role, "text": text}]
            asked = None
        else:
            turns.append({"role": role, "text": text})
    if not found:
        raise Unusable("no answer to anything spoken")


def _message(message: Any) -> tuple[str, str]:
    if not isinstance(message, Mapping):
        raise Unusable("a message that is no object")
    role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
    if _ROLES.get(str(role)) is None or not isinstance(content, str):
        raise Unusable(f"a message of {str(role)[:20]!r} without text")
    return _ROLES[str(role)], content


def _listed(chat: Row) -> Iterator[str]:
    for sound in chat.get("audios") or ():
        path = sound.get("path") if isinstance(sound, Mapping) else sound
        if not isinstance(path, str):
            raise Unusable("a sound that is no path")
        yield path


def _written(chat: Row) -> str | None:
    """What the question says, where the list has it beside the messages."""
    found = (chat.get(name) for name in ("question_text", "transcript", "source_text"))
    return next((each for each in found if isinstance(each, str)), None)
