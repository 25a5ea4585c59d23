"""Computes the scores of a held-out set from its items: shares with an interval, ceilings, scores by relation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from echox.config.languages import ENGLISH
from echox.evaluate.normalization import normalize
from echox.evaluate.text import answer_match, strict_match, strictly_said, wer

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_Z_95 = 1.959963984540054
ENTITY_AND_ANSWER, ANSWER_ALONE, MIXED = "entity and answer", "answer alone", "entity and answer where there is one"


@dataclass(frozen=True)
class SpokenItem:
    """One question and what became of it; audio is 16 kHz mono.

    Attributes:
        id, question, question_audio: what was asked.
        golds: accepted answers.
        reference: the reference answer.
        text: the model's own text.
        units: what it said; None where it was asked to write only.
        cascade_units: the same text spoken by the frozen T2C teacher; None where it was not.
        copy_units: the true units of the reference answer; None where it was never spoken.
        heard, cascade_heard, copy_heard: the judge's transcripts of the three.
        entity: accepted forms of what the question is about; empty where that is not known.
        relation: what is asked of it; empty where that is not known.
        language: of all texts, by Whisper's code.
    """

    id: str
    question: str
    question_audio: NDArray[np.float32]
    golds: list[str]
    reference: str
    text: str
    units: NDArray[np.uint16] | None = None
    cascade_units: NDArray[np.uint16] | None = None
    copy_units: NDArray[np.uint16] | None = None
    heard: str = ""
    cascade_heard: str | None = None
    copy_heard: str | None = None
    entity: list[str] = field(default_factory=list)
    relation: str = ""
    language: str = ENGLISH

    @property
    def text_right(self) -> bool:
        """A gold answer stands in the model's text."""
        return answer_match(self.text, self.golds, self.language)

    @property
    def speech_right(self) -> bool:
        """A gold answer stands in the judge's transcript of the model's speech."""
        return answer_match(self.heard, self.golds, self.language)

    @property
    def text_strict(self) -> bool:
        """Entity and gold answer stand in the model's text."""
        return strict_match(self.text, self.golds, self.entity, self.language)

    @property
    def speech_strict(self) -> bool:
        """Entity and gold answer are heard in the model's speech."""
        return strictly_said(self.heard, self.text, self.golds, self.entity, self.language)

    @property
    def cascade_strict(self) -> bool | None:
        """The same of the teacher's speech; None without one."""
        return self._said(self.cascade_heard, self.text)

    @property
    def copy_strict(self) -> bool | None:
        """The same of the reference answer's units; None without them."""
        return self._said(self.copy_heard, self.reference)

    @property
    def exact(self) -> bool:
        """The judge's transcript is the model's text, both normalised."""
        return normalize(self.heard, self.language) == normalize(self.text, self.language)

    def _said(self, heard: str | None, text: str) -> bool | None:
        if heard is None:
            return None
        return strictly_said(heard, text, self.golds, self.entity, self.language)


@dataclass(frozen=True, kw_only=True)
class SetScore:
    """Scores of one held-out set; shares are 0 to 1, None where the set does not define them.

    Attributes:
        n: items.
        text_llm_acc: the text LLM alone, asked in writing: the ceiling.
        s2t_acc, s2s_acc: a gold answer in the model's text, and in its speech as the judge hears it.
        s2t_strict_acc, s2s_strict_acc: entity and gold answer in both.
        interval_95: Wilson interval of `s2s_strict_acc`.
        cascade_acc: strictly right when the frozen T2C teacher speaks the model's own text.
        copy_acc, copy_n: strictly right when the true units of the reference answer are spoken; items that have them.
        retention: s2s_acc over s2t_acc.
        retention_paired: of the items strictly right in text, the share strictly right in speech.
        retention_cascade: s2s_strict_acc over cascade_acc.
        exact: share of items whose transcript is the model's text, both normalised.
        wer: judge's transcript against the model's own text; for ASR sets, model's transcript against the reference.
        entity_n: items whose entity is known.
        strict_rule: what strict means here.
        relations: relation to `n`, `s2t_strict`, `s2s_strict`, `cascade`, `copy`, `copy_n` of its items.
        quality: voice to the mean predicted opinions of some of its clips, see `rate_voices`; empty where not rated.
        items: the single results.
    """

    n: int
    wer: float
    text_llm_acc: float | None = None
    s2t_acc: float | None = None
    s2s_acc: float | None = None
    s2t_strict_acc: float | None = None
    s2s_strict_acc: float | None = None
    interval_95: list[float] | None = None
    cascade_acc: float | None = None
    copy_acc: float | None = None
    copy_n: int = 0
    retention: float | None = None
    retention_paired: float | None = None
    retention_cascade: float | None = None
    exact: float | None = None
    entity_n: int = 0
    strict_rule: str | None = None
    relations: Mapping[str, Mapping[str, float | int | None]] = field(default_factory=dict)
    quality: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    items: list[SpokenItem] = field(repr=False, default_factory=list)

    def row(self) -> dict[str, Any]:
        """The scores without the items."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name != "items"}


def question_score(items: Sequence[SpokenItem], text_llm_acc: float | None = None) -> SetScore:
    """Scores of spoken answers."""
    s2t, s2s = share(item.text_right for item in items), share(item.speech_right for item in items)
    strict, cascade = share(item.speech_strict for item in items), share(item.cascade_strict for item in items)
    with_entity = sum(bool(item.entity) for item in items)
    rule = ENTITY_AND_ANSWER if with_entity == len(items) else MIXED if with_entity else ANSWER_ALONE
    return SetScore(
        n=len(items),
        wer=wer([item.text for item in items], [item.heard for item in items], _language(items)),
        text_llm_acc=text_llm_acc,
        s2t_acc=s2t,
        s2s_acc=s2s,
        s2t_strict_acc=share(item.text_strict for item in items),
        s2s_strict_acc=strict,
        interval_95=wilson(sum(item.speech_strict for item in items), len(items)),
        cascade_acc=cascade,
        copy_acc=share(item.copy_strict for item in items),
        copy_n=sum(item.copy_strict is not None for item in items),
        retention=_ratio(s2s, s2t),
        retention_paired=share(item.speech_strict for item in items if item.text_strict),
        retention_cascade=_ratio(strict, cascade),
        exact=share(item.exact for item in items),
        entity_n=with_entity,
        strict_rule=rule,
        relations=by_relation(items),
        items=list(items),
    )


def transcription_score(items: Sequence[SpokenItem]) -> SetScore:
    """Word error rate of transcripts against what was said."""
    rate = wer([item.reference for item in items], [item.text for item in items], _language(items))
    return SetScore(n=len(items), wer=rate, items=list(items))


def by_relation(items: Sequence[SpokenItem]) -> dict[str, dict[str, float | int | None]]:
    """Strict scores of the items of each relation; items without one are left out."""
    grouped: dict[str, list[SpokenItem]] = {}
    for item in items:
        if item.relation:
            grouped.setdefault(item.relation, []).append(item)
    return {
        relation: {
            "n": len(group),
            "s2t_strict": share(item.text_strict for item in group),
            "s2s_strict": share(item.speech_strict for item in group),
            "cascade": share(item.cascade_strict for item in group),
            "copy": share(item.copy_strict for item in group),
            "copy_n": sum(item.copy_strict is not None for item in group),
        }
        for relation, group in sorted(grouped.items())
    }


def share(outcomes: Iterable[bool | None]) -> float | None:
    """Share of the outcomes known that are True; None if none is known."""
    known = [outcome for outcome in outcomes if outcome is not None]
    return sum(known) / len(known) if known else None


def wilson(right: int, n: int) -> list[float] | None:
    """95 % score interval of a share, [low, high]; None without items.

    Unlike the normal approximation it is right for few items and for shares near 0 and 1 (Wilson, JASA 1927).
    """
    if n == 0:
        return None
    p, z2 = right / n, _Z_95**2
    middle = (p + z2 / (2 * n)) / (1 + z2 / n)
    reach = _Z_95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n**2)) / (1 + z2 / n)
    # Where all or none are right the bound is exact, and rounding must not take it past the share itself.
    return [middle - reach if right else 0.0, middle + reach if right < n else 1.0]


def _language(items: Sequence[SpokenItem]) -> str:
    return items[0].language if items else ENGLISH


def _ratio(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None
