"""Reads and splits real recordings: the Asterisk voice prompts of one speaker, with their transcripts."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

import soundfile

MAX_SECONDS = 5.0
"""Longer prompts are menus read in one breath; they would set the padding of every batch they are in."""
_MIN_SECONDS = 0.3
_HELDOUT_WORDS = 3
_HELDOUT_SECONDS = 6.0


@dataclass(frozen=True)
class Prompt:
    """One recording.

    Attributes:
        name: its name among the prompts, such as "digits/one".
        text: what is said.
        path: the audio file.
        seconds: its length.
    """

    name: str
    text: str
    path: Path
    seconds: float


def words(text: str) -> str:
    """Lower-case words with single spaces: what two sentences must share to count as the same."""
    return " ".join(re.findall(r"[\w']+", text.lower()))


def read_prompts(folder: Path) -> list[Prompt]:
    """The usable prompts of a fetched folder, by name.

    Left out: tones, silence and sound effects (their transcripts stand in brackets), clips shorter than 0.3 s or longer
    than 5 s, and lines without a recording.

    Args:
        folder: holds `transcripts.txt` ("name: text" lines) and `wav/`.
    """
    found: list[Prompt] = []
    for line in (folder / "transcripts.txt").read_text(encoding="utf-8", errors="replace").splitlines():
        name, separator, text = line.partition(": ")
        text = " ".join(text.split())
        path = folder / "wav" / f"{name.strip()}.wav"
        if line.startswith(";") or not separator or re.search(r"[\[\]<>()]", text) or not words(text):
            continue
        if not path.is_file():
            continue
        seconds = soundfile.info(path).duration
        if _MIN_SECONDS <= seconds <= MAX_SECONDS:
            found.append(Prompt(name.strip(), text, path, round(seconds, 3)))
    return sorted(found, key=lambda prompt: prompt.name)


def split_prompts(prompts: list[Prompt], heldout: int) -> tuple[list[Prompt], list[Prompt]]:
    """Training and held-out prompts; no held-out sentence is said in a training prompt.

    Args:
        prompts: every usable prompt.
        heldout: how many to hold out at most; sentences of at least three words and at most 6 s.

    Returns:
        (training, held out), each by name.
    """
    order = sorted(prompts, key=lambda prompt: hashlib.sha256(prompt.name.encode()).digest())
    chosen: dict[str, Prompt] = {}
    for prompt in order:
        text = words(prompt.text)
        if len(chosen) < heldout and len(text.split()) >= _HELDOUT_WORDS and prompt.seconds <= _HELDOUT_SECONDS:
            chosen.setdefault(text, prompt)
    held = sorted(chosen.values(), key=lambda prompt: prompt.name)
    return [prompt for prompt in prompts if words(prompt.text) not in chosen], held
