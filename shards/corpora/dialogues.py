"""Reads spoken dialogues in the layouts of the EchoX authors and the VITA project, and makes utterances of them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards.corpora.archives import archived_list, is_archive, json_list, stem
from shards.corpus import Audio, FileAudio, MemberAudio, Request, Utterance, clean, sorted_paths, wrong_source

LIST_NAME = "data.json"
_PLACEHOLDER = "<|audio|>"
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


@dataclass(frozen=True)
class Turn:
    """One turn of a dialogue.

    Attributes:
        role: user, assistant or system.
        text: what is said; None where only the sound is given.
        audio: path of the sound, as the corpus writes it.
        wer: word error rate of an ASR transcript against the text, where the corpus measured it.
    """

    role: str
    text: str | None
    audio: str | None
    wer: float | None


def read_turns(example: Mapping[str, Any]) -> list[Turn]:
    """Turns of one example, whichever of the known spellings it has.

    They are `conversations` or `messages`; each with `from` or `role`, `value` or `content`, `audio` or `wavpath`,
    `asr`, `wer`; or with a placeholder in the text for the next path of the example's `audios`. Of a preference pair,
    the dialogue that was `chosen`: what was rejected is no answer to learn.

    Raises:
        ValueError: something else.
    """
    turns = next((example[name] for name in ("conversations", "messages", "chosen") if name in example), None)
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise ValueError(f"no list of turns among {', '.join(sorted(example)) or 'no fields'}")
    listed = example.get("audios")
    audios = iter(listed if isinstance(listed, list) else ())
    found: list[Turn] = []
    for turn in turns:
        role = _ROLES.get(str(turn.get("from", turn.get("role"))).lower())
        if role is None:
            raise ValueError(f"unknown role {turn.get('from', turn.get('role'))!r}")
        text = clean(turn.get("value", turn.get("content"))) or ""
        audio = clean(turn.get("audio") or turn.get("wavpath"))
        if _PLACEHOLDER in text:
            text, audio = text.replace(_PLACEHOLDER, ""), audio or clean(next(audios, None))
        wer = turn.get("wer")
        measured = float(wer) if isinstance(wer, int | float | str) else None
        found.append(Turn(role, clean(text) or clean(turn.get("asr")), audio, measured))
    return found


def dialogue_utterances(
    example: Any, name: str, source: str, request: Request, locate: Callable[[str], Audio], split: str = "train"
) -> Iterator[Utterance]:
    """Utterances of one dialogue.

    For task "sqa" every spoken user turn and the answer to it, with the dialogue before it in `turns`; for task "tts"
    every spoken assistant turn.

    Args:
        example: as the corpus has it.
        name: of the dialogue; utterances after the first add their number to it.
        source: the corpus.
        request: what is wanted.
        locate: the corpus's path of a sound to where it is.
        split: of the corpus.
    """
    try:
        turns = read_turns(example if isinstance(example, Mapping) else {})
    except ValueError as error:
        yield Utterance(id=name, task=request.task, source=source, split=split, problem=str(error))
        return
    count = 0
    for at, answer in enumerate(turns):
        asked = turns[at - 1] if at and turns[at - 1].role == "user" else None
        wanted = asked if request.task == "sqa" else answer
        if answer.role != "assistant" or wanted is None or wanted.audio is None:
            continue
        spoken = answer.audio if request.task == "tts" or request.answers else None
        earlier = turns[: at - 1 if asked is not None else at]
        extra = {"question_wer": asked.wer if asked else None, "answer_wer": answer.wer}
        yield Utterance(
            id=name if not count else f"{name}-{count}",
            task=request.task,
            source=source,
            split=split,
            question=locate(asked.audio) if request.task == "sqa" and asked and asked.audio else None,
            question_text=asked.text if asked else None,
            answer=locate(spoken) if spoken else None,
            answer_text=answer.text,
            turns=tuple({"role": turn.role, "text": turn.text or ""} for turn in earlier),
            turn_audio=_heard(earlier, locate) if request.history and request.task == "sqa" else (),
            extra={key: value for key, value in extra.items() if value is not None},
        )
        count += 1
    if not count:
        missing = "spoken question with an answer" if request.task == "sqa" else "spoken answer"
        yield Utterance(id=name, task=request.task, source=source, split=split, problem=f"no {missing}")


def _heard(turns: Sequence[Turn], locate: Callable[[str], Audio]) -> tuple[Audio | None, ...]:
    return tuple(locate(turn.audio) if turn.audio and turn.role == "user" else None for turn in turns)


def subset(corpus: str, names: set[str], title: str) -> Callable[[Path, Request], Iterator[Utterance]]:
    """A recipe for one subset of EchoX-Dialogues or EchoX-Dialogues-Plus.

    Args:
        corpus: name of the recipe.
        names: names of the subset's folder, in small letters and digits only.
        title: the folder's name as one would look for it.

    Returns:
        Utterances below the whole download, or below the subset's own folder.
    """

    def discover(source: Path, request: Request) -> Iterator[Utterance]:
        lists = find_lists(source, names)
        if not lists:
            raise wrong_source(corpus, source, f"{title}/*.tar.gz with a {LIST_NAME} in each")
        yield from listed_utterances(lists, corpus, request)

    return discover


def find_lists(source: Path, names: set[str]) -> list[Path]:
    """Archives, and `data.json` files of unpacked ones: those lying in `source`, or below a folder of the subset.

    An archive that was unpacked into a folder of its name beside it counts once.
    """
    if not source.is_dir():
        return [source] if is_archive(source) and source.is_file() else []
    found = {path for path in source.rglob("*") if (is_archive(path) or path.name == LIST_NAME) and path.is_file()}

    def belongs(path: Path) -> bool:
        if is_archive(path) and path.parent / stem(path) / LIST_NAME in found:
            return False
        folders = (source.absolute().name, *path.parent.relative_to(source).parts)
        return path.parent == source or any(re.sub(r"[^a-z0-9]", "", part.lower()) in names for part in folders)

    return sorted_paths(path for path in found if belongs(path))


def listed_utterances(lists: Sequence[Path], corpus: str, request: Request) -> Iterator[Utterance]:
    """Utterances of archives and of unpacked ones; named, unless they have an id, by archive and number in it."""
    common = os.path.commonpath([path.parent for path in lists])
    for path in lists:
        folders = path.parent.relative_to(common).parts
        unpacked = path.name == LIST_NAME
        prefix = "-".join(folders or (path.parent.name,)) if unpacked else "-".join((*folders, stem(path)))
        yield from _list_utterances(path, prefix, corpus, request)


def _list_utterances(path: Path, prefix: str, corpus: str, request: Request) -> Iterator[Utterance]:
    if path.name == LIST_NAME:

        def locate(name: str) -> Audio:
            return FileAudio(path.parent / name, path.parent)

        def examples() -> Iterator[Any]:
            with path.open("rb") as stream:
                yield from json_list(stream, str(path))
    else:

        def locate(name: str) -> Audio:
            return MemberAudio(path, name.removeprefix("./"))

        def examples() -> Iterator[Any]:
            yield from archived_list(path, LIST_NAME)

    for number, example in enumerate(examples()):
        own = clean(example.get("id")) if isinstance(example, Mapping) else None
        yield from dialogue_utterances(example, own or f"{prefix}-{number:06d}", corpus, request, locate)
