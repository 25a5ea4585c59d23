"""Makes what a list of recordings lacks: transcripts by a speech recogniser, sound by a speech synthesiser.

What is made is kept beside the build, so that it is made once, and marked in the shards with what made it.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from echox.audio.io import write_audio
from echox.files import append_line, read_lines
from shards.builder.convert import Rejected, stamp, waveform
from shards.builder.records import digest
from shards.corpus import Audio, Corpus, FileAudio, Request, Utterance, clean

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from echox.evaluate.listening import Transcriber

    Waveform = NDArray[np.float32]

BATCH = 64
"""Utterances looked at together."""


class Synthesiser(Protocol):
    """Text to speech."""

    def speak(self, text: str) -> Waveform:
        """16 kHz mono samples."""
        ...


Model = TypeVar("Model", covariant=True)


@dataclass(frozen=True)
class Maker(Generic[Model]):
    """Something that makes what is missing.

    Attributes:
        name: marks what it made.
        identity: changes where it would make something else.
        open: loads it; called when the first thing is missing.
    """

    name: str
    identity: str
    open: Callable[[], Model]


@dataclass
class Missing:
    """Completes utterances.

    Attributes:
        folder: where what was made is kept.
        recogniser: writes down what has no text; None leaves it.
        synthesiser: speaks what has no sound; None leaves it.
    """

    folder: Path
    recogniser: Maker[Transcriber] | None = None
    synthesiser: Maker[Synthesiser] | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _hears: Transcriber | None = None
    _speaks: Synthesiser | None = None
    _known: dict[str, str] | None = None

    def completes(self, corpus: Corpus) -> Corpus:
        """The corpus with what it lacked."""
        return replace(corpus, discover=partial(self._discover, corpus))

    def _discover(self, corpus: Corpus, source: Path, request: Request) -> Iterator[Utterance]:
        found = corpus.discover(source, request)
        while batch := list(islice(found, BATCH)):
            # The build and what counts it ask at the same time.
            with self._lock:
                batch = self._with_texts(self._with_sounds(batch))
            yield from batch

    def _with_texts(self, batch: list[Utterance]) -> list[Utterance]:
        """Utterances whose recordings were written down where nobody had."""
        if self.recogniser is None:
            return batch
        untold = [_untold(each) for each in batch]
        keys = [None if found is None else self._key(found[1], self.recogniser.identity) for found in untold]
        known = self._transcripts()
        clips: dict[str, Waveform] = {}
        for key, found in zip(keys, untold, strict=True):
            if key is not None and found is not None and key not in known:
                # What cannot be decoded stays as it is: the build says what is wrong with it.
                with suppress(Rejected):
                    clips[key] = waveform(found[1])
        if clips:
            self._hears = self._hears or self.recogniser.open()
            for key, text in zip(clips, self._hears.transcribe(list(clips.values())), strict=True):
                known[key] = text
                append_line(self._journal, json.dumps([key, text]))
        return [
            each if key is None or found is None else _told(each, found[0], clean(known.get(key)), self.recogniser.name)
            for each, key, found in zip(batch, keys, untold, strict=True)
        ]

    def _with_sounds(self, batch: list[Utterance]) -> list[Utterance]:
        """Utterances whose texts were spoken where nobody had."""
        return batch if self.synthesiser is None else [self._spoken(each, self.synthesiser) for each in batch]

    def _spoken(self, each: Utterance, maker: Maker[Synthesiser]) -> Utterance:
        kind, text = _unspoken(each)
        if text is None:
            return each
        path = self.folder / f"{digest([maker.identity, text])[:24]}.flac"
        if not path.is_file():
            self._speaks = self._speaks or maker.open()
            samples = self._speaks.speak(text)
            if not len(samples):
                return each
            self.folder.mkdir(parents=True, exist_ok=True)
            half = path.with_name(f"half-{path.name}")
            write_audio(half, samples)
            half.rename(path)
        marked = {**each.extra, f"{kind}_spoken_by": maker.name}
        sound = FileAudio(path, self.folder)
        if kind == "question":
            return replace(each, question=sound, extra=marked)
        return replace(each, answer=sound, extra=marked)

    @staticmethod
    def _key(sound: Audio, identity: str) -> str:
        return digest([identity, *map(str, stamp(sound.stands_in())), repr(sound)])

    @property
    def _journal(self) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / "transcripts.jsonl"

    def _transcripts(self) -> dict[str, str]:
        if self._known is None:
            self._known = {}
            for line in read_lines(self._journal) if self._journal.is_file() else ():
                # One that a crash has cut short is made again.
                with suppress(ValueError, TypeError):
                    key, text = json.loads(line)
                    self._known[str(key)] = str(text)
        return self._known


def _untold(utterance: Utterance) -> tuple[str, Audio] | None:
    """What has sound and no text: a question of any task, and what is to be learned to be spoken."""
    if utterance.problem:
        return None
    if utterance.question is not None and not utterance.question_text:
        return "question", utterance.question
    if utterance.task == "tts" and utterance.answer is not None and not utterance.answer_text:
        return "answer", utterance.answer
    return None


def _told(utterance: Utterance, kind: str, text: str | None, by: str) -> Utterance:
    marked = {**utterance.extra, f"{kind}_text_by": by}
    if text is None:
        return utterance
    if kind == "question":
        return replace(utterance, question_text=text, extra=marked)
    return replace(utterance, answer_text=text, extra=marked)


def _unspoken(utterance: Utterance) -> tuple[str, str | None]:
    """What has text and no sound: a question, or what is to be learned to be spoken."""
    if utterance.problem:
        return "question", None
    if utterance.task == "tts":
        silent = utterance.answer is None and utterance.units is None
        return "answer", utterance.answer_text if silent else None
    return "question", utterance.question_text if utterance.question is None else None
