"""An Echo run of random weights and a benchmark on disk, with stand-ins for vocoder and judge, which take most time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from echox.evaluate.judges import NamedJudge
from echox.evaluate.quality import Dnsmos, Quality

COUNT = 7
GOLDS = [[f"w{word}" for word in range(number, 48, 6)] for number in range(COUNT)]
"""Some of the tiny model's words for each question, so that some answers are right."""


class Mouth:
    """A vocoder: forty samples a unit, whose level is the unit."""

    sample_rate = 16_000

    def __call__(self, units: list[Any], durations: Any = None) -> list[Any]:
        return [np.repeat(each.astype(np.float32) / 10, 40) for each in units]


class Ears:
    """Hears words that depend on the clip and, as a quantised judge does, on the loudest clip of its batch."""

    def transcribe(self, audio: list[Any]) -> list[str]:
        loudest = max((len(wave) for wave in audio), default=0)
        return [f"w{len(wave) // 40 % 48} w{loudest // 40 % 48}, <b>x</b>" if len(wave) else "" for wave in audio]


def write_world(folder: Path) -> Path:
    """`runs/echo`, `vocoder`, `judge` and `questions` in a folder."""
    from tests.speak.echo_run import clips, write_echo_run

    write_echo_run(folder / "runs")
    for part in ("vocoder", "judge"):
        (folder / part).mkdir()
        for name in ("config.json", "model.safetensors"):
            (folder / part / name).write_text("{}")
    (folder / "questions").mkdir()
    lines = []
    for number in range(COUNT):
        noise = clips()[number % 5]
        soundfile.write(folder / "questions" / f"{number}.wav", np.roll(noise, 100 * number), 16_000)
        golds = ", ".join(f'"{gold}"' for gold in GOLDS[number])
        lines.append(f'{{"id": {number}, "audio": "{number}.wav", "question": "<i>{number}?", "answers": [{golds}]}}\n')
    (folder / "questions" / "list.jsonl").write_text("".join(lines))
    return folder


def command(world: Path, out: Path, *more: str) -> list[str]:
    """`echox evaluate` of the run on the questions, three at a time."""
    return [
        *("evaluate", str(world / "runs" / "echo"), "--benchmark", "mine", "--data", f"mine={world / 'questions'}"),
        *("--vocoder", str(world / "vocoder"), "--judge", str(world / "judge"), "--out", str(out)),
        *("--max-new", "8", "--batch", "3", *more),
    ]


class Rater:
    """In the place of DNSMOS: opinions that follow the length of the clip, none of a clip without a sound."""

    def identity(self) -> dict[str, str]:
        return {"model": "stand-in"}

    def rate(self, clips: list[Any]) -> list[Quality | None]:
        return [Quality(len(clip) / 1e4, 2.0, 3.0, 1 / 3) if len(clip) else None for clip in clips]


def _open(self: NamedJudge, language: str | None) -> Ears:
    assert language is None, "the protocol does not name the language"
    return Ears()


def stand_in(patch: pytest.MonkeyPatch) -> None:
    """Put the stand-ins in their places."""
    patch.setattr(NamedJudge, "open", _open)
    patch.setattr(Dnsmos, "find", Rater)
    patch.setattr("echox.speak.vocoder.load_vocoder", lambda folder, speaker=None: Mouth())
