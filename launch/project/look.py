"""Looks at what a project begins with: recordings, questions, and the LLM."""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import soundfile

from echox.config.paths import resolve_model
from echox.errors import DataError, MissingModelError
from echox.files import open_regular
from shards.corpora.formats.registry import recognised
from shards.corpora.registry import CORPORA
from shards.corpus import FileAudio, Request

if TYPE_CHECKING:
    from shards.corpus import Audio

LOOKED_AT = 2000
"""Recordings whose headers are read; the hours of more are estimated."""
_LONGEST_S = 24 * 3600
"""Of a recording: a header may claim anything."""
HOLDS_SOUND = (".parquet", ".tar")
SHOWN = 10
"""Broken ones that are named."""


@dataclass
class Recordings:
    """A list of recordings.

    Attributes:
        place: as it was given.
        format: in which it is.
        count: utterances in it.
        hours: of sound, of those that can be decoded; estimated where there are very many.
        rates: how many files have which sample rate.
        speakers: named ones.
        untold: without text.
        unanswered: without an answer, of questions.
        silent: without sound.
        characters: of the texts that are to be spoken.
        broken: names of those that cannot be used, and why.
    """

    place: Path
    format: str
    count: int = 0
    hours: float = 0.0
    rates: Counter[int] = field(default_factory=Counter)
    speakers: set[str] = field(default_factory=set)
    untold: int = 0
    unanswered: int = 0
    silent: int = 0
    characters: int = 0
    broken: dict[str, str] = field(default_factory=dict)

    @property
    def usable(self) -> int:
        """Utterances that are not broken."""
        return self.count - len(self.broken)


@dataclass(frozen=True)
class Llm:
    """A causal LM.

    Attributes:
        place: as it was given.
        layers, width, vocabulary: of its configuration.
        parameters: about how many, by its configuration.
        has_template: whether its tokenizer has a chat template.
        begin, end: special tokens around a text.
    """

    place: str
    layers: int
    width: int
    vocabulary: int
    parameters: float
    has_template: bool
    begin: str
    end: str


def look_at(place: Path, task: str) -> Recordings:
    """Read a list of recordings, and the headers of its files.

    Args:
        place: file or folder in any format that `echox shards build manifest` reads.
        task: "tts" for a voice, "sqa" for questions.

    Raises:
        DataError: it is no such list, or names nothing.
    """
    kind = recognised(place)
    found = Recordings(place, "" if kind is None else kind.name)
    seconds = looked = 0.0
    for each in CORPORA["manifest"].discover(place, Request(task=task, answers=True)):
        found.count += 1
        sound, text = (each.answer, each.answer_text) if task == "tts" else (each.question, each.question_text)
        found.speakers |= {str(each.extra.get("fields", {}).get("speaker", ""))} - {""}
        found.untold += sound is not None and not text
        found.silent += sound is None
        found.characters += len(each.answer_text or "")
        found.unanswered += task == "sqa" and not each.answer_text
        if each.problem:
            found.broken[each.id] = each.problem
        elif sound is not None and looked < LOOKED_AT:
            looked += 1
            try:
                rate, length = _header(sound)
                found.rates[rate] += 1
                seconds += length
            except (DataError, OSError, ValueError, soundfile.LibsndfileError) as error:
                found.broken[each.id] = getattr(error, "error_string", None) or str(error)
    if not found.count:
        raise DataError("there is no recording", where=str(place), fix="name a list or a folder of recordings")
    spoken = found.count - found.silent
    found.hours = seconds / 3600 * (spoken / looked if looked > 0 and spoken > looked else 1)
    return found


def sounds(place: Path, task: str) -> tuple[Path, ...]:
    """Audio files that a list names; none of a folder, whose files are all seen, or of a file that holds them itself.

    Args:
        place: as of `look_at`.
        task: as of `look_at`.

    Raises:
        DataError: it is no such list.
    """
    if place.is_dir() or place.suffix in HOLDS_SOUND:
        return ()
    found: list[Path] = []
    for each in CORPORA["manifest"].discover(place, Request(task=task, answers=True)):
        sound = each.answer if task == "tts" else each.question
        if isinstance(sound, FileAudio) and not each.problem:
            with contextlib.suppress(ValueError):  # of one outside, nothing is read
                found.append(sound.inside())
    return tuple(dict.fromkeys(found))


def _header(sound: Audio) -> tuple[int, float]:
    """Sample rate and seconds of a sound, by its header."""
    if not isinstance(sound, FileAudio):
        info = soundfile.info(io.BytesIO(sound.read()))
        return info.samplerate, info.duration
    # A pipe would never be opened.
    with open_regular(sound.inside()) as file, soundfile.SoundFile(file, closefd=False) as opened:
        return opened.samplerate, sound.seconds or min(opened.frames / opened.samplerate, _LONGEST_S)


def look_at_llm(place: str) -> Llm:
    """Read the configuration and the tokenizer of an LLM.

    Raises:
        MissingModelError: it is not there, or is none.
    """
    from transformers import AutoConfig, AutoTokenizer

    folder = resolve_model(place, weights=False)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        text = config.get_text_config()
        layers, width, vocabulary = text.num_hidden_layers, text.hidden_size, text.vocab_size
        ffn = text.intermediate_size
    except (OSError, ValueError, KeyError, AttributeError) as error:
        what = f"this is no causal LM of transformers: {str(error).splitlines()[0]}"
        raise MissingModelError(what, where=str(folder), fix="name a folder with config.json and tokenizer") from error
    end = tokenizer.eos_token or ""
    return Llm(
        place=place,
        layers=layers,
        width=width,
        vocabulary=vocabulary,
        parameters=float(vocabulary * width + layers * (4 * width * width + 3 * width * ffn)),
        has_template=bool(tokenizer.chat_template),
        begin=tokenizer.bos_token or end,
        end=end,
    )
