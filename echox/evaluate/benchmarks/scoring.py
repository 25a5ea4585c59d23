"""Computes the scores of a benchmark from its answers: right in text and in speech, and what these are measured by."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from echox.config.languages import ENGLISH
from echox.evaluate.benchmarks.records import Answered
from echox.evaluate.benchmarks.survey import Benchmark, Item
from echox.evaluate.normalization import normalize
from echox.evaluate.quality import PARTS, Quality, mean_quality
from echox.evaluate.scores import share, wilson
from echox.evaluate.text import answer_match, wer
from echox.stream.sampling.keyed_rng import permutation

CHANCE_SEED, CHANCE_SHIFTS = 17, 10


@dataclass(frozen=True)
class Judged:
    """One question, its answer, and what is right of it.

    Attributes:
        item, answer: the two.
        text_right: an accepted answer stands in the model's own text (S2T).
        speech_right: the judge hears one in its speech (S2S).
        cascade_right: the judge hears one when the frozen T2C teacher speaks the text.
        silent: nothing is heard, so the speech cannot be right.
    """

    item: Item
    answer: Answered
    text_right: bool
    speech_right: bool
    cascade_right: bool
    silent: bool

    @classmethod
    def of(cls, item: Item, answer: Answered, language: str = ENGLISH) -> Judged:
        """Judge an answer by the rule of UltraEval-Audio's `qa-exist-match`, see `answer_match`."""
        return cls(
            item=item,
            answer=answer,
            text_right=answer_match(answer.text, item.golds),
            speech_right=answer_match(answer.heard, item.golds),
            cascade_right=answer_match(answer.cascade_heard, item.golds),
            silent=not normalize(answer.heard, language),
        )


@dataclass(frozen=True)
class Score:
    """Scores of one decoding; shares are 0 to 1, None where there is nothing to take them of.

    Attributes:
        n: questions.
        s2t, s2s: right in the model's own text, and in its speech as the judge hears it.
        s2s_interval_95: Wilson interval of `s2s`.
        cascade: right when the frozen T2C teacher speaks the same text: the trivial way to speak.
        retention: `s2s` over `s2t`, under the same judge.
        retention_paired: of the answers right in text, the share right in speech.
        chance_s2t, chance_s2s: share right when the answers are given to other questions.
        wer: the judge's transcript against the model's own text, both normalised as elsewhere in the evaluation.
        silent: share of answers in which nothing is heard.
        seconds: of speech an answer.
        failed: share of answers with a segment that failed.
        dnsmos_ovrl, dnsmos_sig, dnsmos_bak, dnsmos_p808: mean predicted opinions of the speech, 1 to 5.
        dnsmos_n: answers that these are of.
    """

    n: int
    s2t: float | None
    s2s: float | None
    s2s_interval_95: list[float] | None
    cascade: float | None
    retention: float | None
    retention_paired: float | None
    chance_s2t: float | None
    chance_s2s: float | None
    wer: float
    silent: float | None
    seconds: float
    failed: float | None
    dnsmos_ovrl: float | None = None
    dnsmos_sig: float | None = None
    dnsmos_bak: float | None = None
    dnsmos_p808: float | None = None
    dnsmos_n: int = 0

    def row(self) -> dict[str, Any]:
        """The scores as JSON."""
        return asdict(self)


REPEATED = ("s2t", "s2s", "cascade", "retention", "wer", "silent", "seconds", "dnsmos_ovrl")
"""Scores of which repeated runs have a mean and a standard deviation."""


def judged(benchmark: Benchmark, answers: Mapping[int, Answered], language: str = ENGLISH) -> list[Judged]:
    """The questions of a benchmark that has an answer to each, in their order."""
    return [Judged.of(item, answers[number], language) for number, item in enumerate(benchmark.items)]


def score(items: Sequence[Judged], language: str = ENGLISH) -> Score:
    """The scores of one decoding, whose answers are in a language."""
    s2t, s2s = share(each.text_right for each in items), share(each.speech_right for each in items)
    golds = [each.item.golds for each in items]
    opinions = mean_quality(Quality(*each.answer.quality) if each.answer.quality else None for each in items) or {}
    return Score(
        n=len(items),
        s2t=s2t,
        s2s=s2s,
        s2s_interval_95=wilson(sum(each.speech_right for each in items), len(items)),
        cascade=share(each.cascade_right for each in items),
        retention=s2s / s2t if s2s is not None and s2t else None,
        retention_paired=share(each.speech_right for each in items if each.text_right),
        chance_s2t=chance([each.answer.text for each in items], golds),
        chance_s2s=chance([each.answer.heard for each in items], golds),
        wer=wer([each.answer.text for each in items], [each.answer.heard for each in items], language),
        silent=share(each.silent for each in items),
        seconds=statistics.fmean(each.answer.seconds for each in items),
        failed=share(each.answer.failed > 0 for each in items),
        **{f"dnsmos_{part}": opinions.get(part) for part in PARTS},
        dnsmos_n=int(opinions.get("n", 0)),
    )


def chance(predictions: Sequence[str], golds: Sequence[Sequence[str]]) -> float | None:
    """Share right when the answers are shuffled among the questions; None for fewer than two.

    The questions are put in a random order, the same each time, and each is given the answer of the one 1, 2, … 10
    places on: no question keeps its own answer, and ten shuffles vary less than one.
    """
    count = len(predictions)
    order = permutation(count, "benchmark-chance", CHANCE_SEED).tolist()
    return share(
        answer_match(predictions[order[(place + shift) % count]], golds[order[place]])
        for shift in range(1, min(CHANCE_SHIFTS, count - 1) + 1)
        for place in range(count)
    )


def repeated(scores: Sequence[Score]) -> dict[str, Any]:
    """Mean and sample standard deviation (None for one run) of the scores of runs with different seeds."""
    found: dict[str, Any] = {"runs": len(scores)}
    for name in REPEATED:
        values = [getattr(each, name) for each in scores if getattr(each, name) is not None]
        mean = statistics.fmean(values) if values else None
        found[name] = {"mean": mean, "sd": statistics.stdev(values) if len(values) > 1 else None}
    return found


def pooled(groups: Sequence[Sequence[Judged]]) -> dict[str, Any]:
    """All questions of several benchmarks as one, and the mean of their scores, as published averages are made."""
    items = [each for group in groups for each in group]
    right = sum(each.speech_right for each in items)
    shares = [share(each.speech_right for each in group) or 0.0 for group in groups]
    return {
        "n": len(items),
        "s2t": share(each.text_right for each in items),
        "s2s": share(each.speech_right for each in items),
        "s2s_interval_95": wilson(right, len(items)),
        "average_s2s": statistics.fmean(shares),
    }
