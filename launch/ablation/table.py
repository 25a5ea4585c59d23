"""Compares arms: pools their items over seeds, pairs them with the base arm by question, and writes the table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from echox.evaluate.columns import percent
from echox.evaluate.scores import share, wilson
from echox.evaluate.text import wer
from launch.ablation.arms import BASE, CASCADE, Arm, Sign
from launch.ablation.scoring import Scores

ALL = "all"
"""The sets together, where there are several."""
RESAMPLES, AT_ONCE, SEED = 10_000, 500, 0
_ZERO = 1e-12
"""Means of differences that are nothing but rounding."""

Items = Sequence[Mapping[str, Any]]
ArmScores = Mapping[str, Mapping[int, Scores]]
"""Arm, then seed, to scores."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One arm on one held-out set; shares are 0 to 1.

    Attributes:
        arm, set: which; `ALL` for the sets together.
        seeds: of its runs.
        n: items of all seeds.
        s2t_strict_acc, s2s_strict_acc: entity and gold answer in the text, and heard in the speech.
        interval_95: Wilson interval of `s2s_strict_acc` on the pooled items.
        over_seeds: least and most `s2s_strict_acc` of a seed; None with one seed.
        cascade_acc: the same when the frozen teacher speaks the arm's text.
        retention_paired: of the items strictly right in text, the share strictly right in speech.
        wer: what is heard against the text.
        difference, difference_95: `s2s_strict_acc` minus the base arm's, and its interval over questions; None for the
            base.
        paper: sign of the difference that the paper's claims imply; None where they imply none.
        here: its sign here, 0 where the interval spans 0.
    """

    arm: str
    set: str
    seeds: list[int]
    n: int
    s2t_strict_acc: float | None
    s2s_strict_acc: float | None
    interval_95: list[float] | None
    over_seeds: list[float] | None
    cascade_acc: float | None
    retention_paired: float | None
    wer: float
    difference: float | None = None
    difference_95: list[float] | None = None
    paper: Sign | None = None
    here: Sign | None = None


def compare(arms: Sequence[Arm], scores: ArmScores) -> list[Row]:
    """One row a set and arm, in the order of the base arm's sets and of the arms, behind those of all sets together.

    Args:
        arms: those to compare; the base among them.
        scores: of the trained arms; the cascade is made from the base arm's.
    """
    spoken = {**scores, CASCADE: {seed: spoken_by_teacher(found) for seed, found in scores[BASE].items()}}
    sets = list(next(iter(scores[BASE].values())))
    known = {arm: {seed: together(found) for seed, found in by_seed.items()} for arm, by_seed in spoken.items()}
    return [_row(arm, name, known) for name in ([ALL] if len(sets) > 1 else []) + sets for arm in arms]


def together(scores: Scores) -> Scores:
    """The scores of every set, and of all of them as one, in which a question bears the name of its set."""
    items = [{**item, "id": f"{name}/{item['id']}"} for name, row in scores.items() for item in row["items"]]
    return {**scores, ALL: {"items": items}}


def spoken_by_teacher(scores: Scores) -> Scores:
    """Scores as if the cascade's speech had been the run's; its items are those that the teacher has spoken."""
    return {
        name: {
            **row,
            "items": [
                {**item, "heard": item["cascade_heard"], "speech_right_strict": item["cascade_right_strict"]}
                for item in row["items"]
                if item["cascade_heard"] is not None
            ],
        }
        for name, row in scores.items()
    }


def _row(arm: Arm, name: str, known: ArmScores) -> Row:
    by_seed = {seed: found[name]["items"] for seed, found in known[arm.name].items()}
    items = [item for one in by_seed.values() for item in one]
    right = [bool(item["speech_right_strict"]) for item in items]
    each = [
        found
        for found in (share(item["speech_right_strict"] for item in one) for one in by_seed.values())
        if found is not None
    ]
    difference, interval = None, None
    if arm.name != BASE:
        base = [found[name]["items"] for found in known[BASE].values()]
        difference, interval = paired_difference(by_question(by_seed.values()), by_question(base))
    return Row(
        arm=arm.name,
        set=name,
        seeds=list(by_seed),
        n=len(items),
        s2t_strict_acc=share(item["text_right_strict"] for item in items),
        s2s_strict_acc=share(right),
        interval_95=wilson(sum(right), len(right)),
        over_seeds=[min(each), max(each)] if len(each) > 1 else None,
        cascade_acc=share(item["cascade_right_strict"] for item in items),
        retention_paired=share(item["speech_right_strict"] for item in items if item["text_right_strict"]),
        wer=wer([item["text"] for item in items], [item["heard"] for item in items]),
        difference=difference,
        difference_95=interval,
        paper=arm.paper,
        here=None if interval is None else sign(interval),
    )


def by_question(runs: Iterable[Items]) -> dict[str, float]:
    """Share of the runs of an arm in which each question was answered strictly right in speech."""
    outcomes: dict[str, list[bool]] = {}
    for items in runs:
        for item in items:
            outcomes.setdefault(item["id"], []).append(bool(item["speech_right_strict"]))
    return {question: sum(found) / len(found) for question, found in outcomes.items()}


def paired_difference(arm: Mapping[str, float], base: Mapping[str, float]) -> tuple[float | None, list[float] | None]:
    """Mean difference over the questions that both have, and its 95 % interval: a paired percentile bootstrap.

    Questions are drawn, not items: the same question in another run is no new evidence about questions.

    Args:
        arm, base: question to its share of right answers.
    """
    both = sorted(arm.keys() & base.keys())
    if not both:
        return None, None
    difference_N = np.array([arm[question] - base[question] for question in both])
    rng, count = np.random.default_rng(SEED), len(both)
    drawn = [difference_N[rng.integers(0, count, (AT_ONCE, count))].mean(1) for _ in range(RESAMPLES // AT_ONCE)]
    low, high = np.percentile(np.concatenate(drawn), [2.5, 97.5])
    return float(difference_N.mean()), [float(low), float(high)]


def sign(interval: Sequence[float]) -> Sign:
    """Sign of a difference by its interval; 0 where it spans 0."""
    low, high = interval
    return "+" if low > _ZERO else "-" if high < -_ZERO else "0"


HEADINGS = (
    *("arm", "n", "S2T strict", "S2S strict [95 %]", "over seeds", "cascade", "retention", "WER"),
    *("minus echo [95 %]", "paper", "here"),
)
MEANINGS = (
    "n: questions of all seeds together.",
    "S2S strict: an independent recogniser hears the accepted answer and what the question is about; with the Wilson "
    "interval of the pooled items. over seeds: least and most of one seed.",
    "cascade: S2S strict when the frozen teacher speaks the arm's own text. retention: of the answers right in text, "
    "the share right in speech. WER: what is heard against the text.",
    "minus echo: points of S2S strict above the base arm, with a paired bootstrap interval over questions. paper: the "
    "sign that the paper's claims imply (· none). here: the sign found, 0 where the interval spans 0.",
)


def markdown(scale: str, arms: Sequence[Arm], rows: Sequence[Row]) -> str:
    """The table of every set, what its columns mean, and what the arms are; columns are aligned for a terminal."""
    seeds = ", ".join(map(str, rows[0].seeds)) if rows else ""
    lines = [f"# Ablation at scale {scale}, seed {seeds}", ""]
    for name in dict.fromkeys(row.set for row in rows):
        table = [HEADINGS, *(_cells(row) for row in rows if row.set == name)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        bars = [tuple("-" * width for width in widths)]
        lines += [f"## {name}", "", *(_line(words, widths) for words in [*table[:1], *bars, *table[1:]]), ""]
    lines += [*MEANINGS, ""]
    lines += [f"- {arm.name}: {arm.asks}. Claim: {arm.claim}." for arm in arms]
    return "\n".join(lines) + "\n"


def _line(words: Sequence[str], widths: Sequence[int]) -> str:
    return f"| {' | '.join(f'{word:{width}}' for word, width in zip(words, widths, strict=True))} |"


def _cells(row: Row) -> tuple[str, ...]:
    spread = "" if row.over_seeds is None else "–".join(f"{100 * end:.0f}" for end in row.over_seeds)
    points = "" if row.difference is None else f"{100 * row.difference:+.1f}{_interval(row.difference_95, '+.1f')}"
    return (
        row.arm,
        str(row.n),
        _percent(row.s2t_strict_acc),
        f"{_percent(row.s2s_strict_acc)}{_interval(row.interval_95, '.0f')}",
        spread,
        _percent(row.cascade_acc),
        "" if row.retention_paired is None else f"{row.retention_paired:.2f}",
        percent(row.wer),
        points,
        "" if row.arm == BASE else row.paper or "·",
        row.here or "",
    )


def _percent(value: float | None) -> str:
    return "" if value is None else percent(value)


def _interval(ends: Sequence[float] | None, form: str) -> str:
    return "" if ends is None else f" [{' '.join(f'{100 * end:{form}}' for end in ends)}]"
