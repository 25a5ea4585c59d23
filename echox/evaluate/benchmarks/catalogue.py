"""Lists the benchmarks known by name, where they are published, and scores that others published on them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from echox.config.paths import cache_dir

PUBLISHED_JUDGE = "openai/whisper-large-v3"
"""The recogniser behind every published number below."""


@dataclass(frozen=True)
class Known:
    """A published benchmark.

    Attributes:
        title: for people.
        repository: the data set on the Hugging Face hub that UltraEval-Audio reads.
        size: its questions.
    """

    title: str
    repository: str
    size: str


BENCHMARKS = {
    "llama-questions": Known("Llama Questions", "TwinkStart/llama-questions", "300 questions"),
    "web-questions": Known("Web Questions", "TwinkStart/speech-web-questions", "about 2,030 questions"),
    "trivia-qa": Known("TriviaQA", "TwinkStart/speech-triavia-qa", "about 1,020 questions"),
}


@dataclass(frozen=True)
class Published:
    """Shares of right spoken answers (S2S) that a paper gives, 0 to 1, by benchmark.

    Attributes:
        system: what was measured.
        scores: by benchmark; those that are not given are left out.
        source: where the numbers stand.
    """

    system: str
    scores: dict[str, float]
    source: str


def _row(system: str, *percent: float | None, tested: str = "") -> Published:
    scores = {name: round(value / 100, 6) for name, value in zip(BENCHMARKS, percent, strict=True) if value is not None}
    return Published(system, scores, f"EchoX, arXiv 2509.09174, Table 2{tested}")


PUBLISHED = (
    _row("EchoX-3B", 54.0, 31.6, 25.8),
    _row("EchoX-8B", 63.3, 40.6, 35.0),
    _row("LLaMA-Omni2-3B", 55.7, 28.0, None),
    _row("LLaMA-Omni2-7B", 60.7, 31.3, None),
    _row("Freeze-Omni", 46.0, 26.1, 25.7, tested=", tested by its authors"),
    _row("VITA-Audio", 68.0, 41.7, 41.7),
    _row("MinMo", 64.1, 39.9, 37.5),
    _row("MiniCPM-o 2.6", 61.0, 40.0, 40.2),
    _row("GLM-4-Voice", 50.0, 32.0, 36.4, tested="; as in UltraEval-Audio's leaderboard"),
    _row("Moshi", 43.7, 23.8, 16.7, tested="; as in UltraEval-Audio's leaderboard"),
    _row("GPT-4o-Realtime", 71.7, 51.6, 69.7, tested="; as in UltraEval-Audio's leaderboard"),
)
PROTOCOL = "UltraEval-Audio, task s2s-aqa: audio alone as the prompt, transcript matched by tokens (qa-exist-match)"


def default_place(name: str) -> Path:
    """Where a benchmark is looked for when no place is given."""
    return cache_dir() / "data" / name


def how_to_get(name: str) -> str:
    """One sentence that says how a benchmark comes to its place."""
    known = BENCHMARKS.get(name)
    if known is None:
        return f"give its place by --data {name}=PATH"
    place = default_place(name)
    return f"`hf download {known.repository} --repo-type dataset --local-dir {place}`, or --data {name}=PATH"
