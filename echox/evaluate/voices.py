"""Compares vocoders on held-out clips of their voice: what a recogniser hears of each, and how it sounds."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from echox.audio.io import SAMPLE_RATE, encode_wav, resample
from echox.config.languages import ENGLISH
from echox.errors import DataError
from echox.evaluate.normalization import normalize
from echox.evaluate.quality import Dnsmos, mean_quality, spread_over
from echox.evaluate.resampling import drawn_rates, interval_95
from echox.evaluate.text import wer
from echox.html import player, write_page
from echox.stream.collate import Item, text_of
from echox.vocoder.data import MEMBERS, Clip, VoiceCollate

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from echox.evaluate.listening import Speaker, Transcriber
    from echox.stream.storage.store import Sample

    Wave = NDArray[np.float32]

ORIGINAL, TRUE = "original", "true durations"
"""Rows beside those of the vocoders: the recording, and a vocoder that is told how long each unit lasts."""
TEXT = "answer_text"
ANY_UNIT = 1 << 16
"""Vocoders refuse what they do not know; the clips do not."""
PLAYED = 12
"""Clips of the page."""

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class VoiceScore:
    """One row.

    Attributes:
        name: of it.
        wer: of what is heard against the text, over all clips; `wer_95` is its interval over clips (bootstrap).
        seconds: of sound.
        quality: see `mean_quality`; None where nothing was rated.
    """

    name: str
    wer: float
    wer_95: list[float]
    seconds: float
    quality: dict[str, float] | None


@dataclass(frozen=True)
class Comparison:
    """All rows, and what was heard of each clip.

    Attributes:
        scores: of the original, and of each vocoder with true durations and with its own.
        better: vocoder that is to be preferred, see `preferred`.
        texts: of the clips.
        heard: row to transcripts.
        waves: row to sounds, 16 kHz.
    """

    scores: list[VoiceScore]
    better: str
    texts: list[str]
    heard: dict[str, list[str]]
    waves: dict[str, list[Wave]]

    def to_json(self) -> dict[str, Any]:
        """Everything but the sounds."""
        return {
            "scores": [asdict(score) for score in self.scores],
            "better": self.better,
            "clips": len(self.texts),
            "heard": [
                {"text": text, **{name: said[index] for name, said in self.heard.items()}}
                for index, text in enumerate(self.texts)
            ],
        }


@dataclass(frozen=True)
class Recording:
    """A clip and its text."""

    text: str
    clip: Clip


def recordings(samples: Sequence[Sample]) -> list[Recording]:
    """Clips that can be compared: with `answer.flac`, `answer.units`, `answer.durations`, and a word in `answer_text`.

    Raises:
        DataError: there is none, or one cannot be decoded.
    """
    read = VoiceCollate(ANY_UNIT, 1, 0, SAMPLE_RATE)
    found = [
        Recording(text_of(each, TEXT), read.decode(Item(each, "tts")))
        for each in samples
        if each.members.keys() >= MEMBERS and normalize(text_of(each, TEXT))
    ]
    if not found:
        fix = "name a dataset that was built with --units and --keep-answer-audio, of recordings with texts"
        raise DataError(f"no sample has {', '.join(sorted(MEMBERS))} and a text with a word", fix=fix)
    return found


def compare_voices(
    spoken: Sequence[Recording],
    vocoders: Mapping[str, Speaker],
    judge: Transcriber,
    rater: Dnsmos | None = None,
    *,
    language: str = ENGLISH,
    rated: int = 12,
    progress: Progress | None = None,
) -> Comparison:
    """Let each vocoder speak the units of recordings, let the judge listen to them and to the recordings.

    Args:
        spoken: recordings, their units, and what is said.
        vocoders: by name.
        judge: writes down 16 kHz clips.
        language: by whose rules transcripts are compared.
        rater: rates how they sound; None leaves that out.
        rated: clips that are rated, the same of each row, at even distances.
        progress: called with a row, rows done and rows in all.

    Raises:
        DataError: a vocoder does not know a unit.
    """
    texts = [each.text for each in spoken]
    waves = {ORIGINAL: [each.clip.wave for each in spoken]}
    units = [each.clip.units.astype(np.uint16) for each in spoken]
    durations = [each.clip.durations.astype(np.uint16) for each in spoken]
    for name, vocoder in vocoders.items():
        for row, given in ((f"{name}, {TRUE}", durations), (name, None)):
            waves[row] = [resample(wave, vocoder.sample_rate) for wave in vocoder(units, given)]
    heard: dict[str, list[str]] = {}
    scores, chosen = [], spread_over(len(spoken), rated)
    for row, sounds in waves.items():
        heard[row] = judge.transcribe(sounds)
        quality = mean_quality(rater.rate([sounds[index] for index in chosen])) if rater and rated else None
        interval = interval_95(drawn_rates(texts, heard[row], language))
        seconds = sum(len(wave) for wave in sounds) / SAMPLE_RATE
        scores.append(VoiceScore(row, wer(texts, heard[row], language), interval, seconds, quality))
        if progress:
            progress(row, len(scores), len(waves))
    return Comparison(scores, preferred(list(vocoders), texts, heard, scores, language), texts, heard, waves)


def preferred(
    names: Sequence[str],
    texts: Sequence[str],
    heard: Mapping[str, Sequence[str]],
    scores: Sequence[VoiceScore],
    language: str = ENGLISH,
) -> str:
    """The vocoder with fewer words wrong, where that is no chance; of the others the one that sounds best.

    A vocoder is worse in words where the 95 % interval of its word error rate minus that of the best, over the same
    clips, is above 0 (paired bootstrap). Without ratings the fewest words wrong decide.
    """
    found = {score.name: score for score in scores}
    best = min(names, key=lambda name: found[name].wer)
    rates = {name: drawn_rates(texts, heard[name], language) for name in names}
    close = [name for name in names if interval_95(rates[name] - rates[best])[0] <= 0]
    sounds = {name: (found[name].quality or {}).get("ovrl", -found[name].wer) for name in close}
    return max(sounds, key=lambda name: sounds[name])


def table(found: Comparison) -> list[list[str]]:
    """Rows of text, headings first."""
    rows = [["", "WER", "95 %", "seconds", "DNSMOS ovrl", "sig", "bak", "p808"]]
    for score in found.scores:
        low, high = score.wer_95
        sounds = score.quality or {}
        rated = [f"{sounds[part]:.2f}" if part in sounds else "" for part in ("ovrl", "sig", "bak", "p808")]
        span = f"{100 * low:.1f} to {100 * high:.1f}"
        rows.append([score.name, f"{100 * score.wer:.1f} %", span, f"{score.seconds:.1f}", *rated])
    return rows


def write_voices_page(path: Path, found: Comparison) -> Path:
    """The table, and the first clips to listen to with what was heard."""
    head, *rows = table(found)
    cells = [f"<tr>{''.join(f'<th>{html.escape(cell)}</th>' for cell in head)}</tr>"]
    cells += [f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows]
    parts = ["<h1>Vocoders side by side</h1>", f"<table>{''.join(cells)}</table>"]
    for index, text in enumerate(found.texts[:PLAYED]):
        sounds = "".join(
            f"<div><h4>{html.escape(row)}</h4>{player(encode_wav(waves[index]))}"
            f"<p>{html.escape(found.heard[row][index])}</p></div>"
            for row, waves in found.waves.items()
        )
        parts.append(f"<h3>{html.escape(text)}</h3><div class='five'>{sounds}</div>")
    return write_page(path, "EchoX: vocoders", parts)
