"""Compares texts: word error rate, and whether a reply has the answer about the right thing."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from echox.config.languages import ENGLISH
from echox.errors import DataError
from echox.evaluate.normalization import SPACELESS, normalize

_SPACELESS = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff]"
)
"""Scripts without spaces between words: Thai, Lao, Burmese, Khmer, kana, Han."""


def wer(references: Sequence[str], hypotheses: Sequence[str], language: str = ENGLISH) -> float:
    """Word errors over reference words, both normalised, over the whole corpus; 1.0 is 100 %.

    In languages written without spaces it is the character error rate, see `error_rate_name`. References with no words
    left after normalisation count by what is inserted; without any reference word the result is 0.0 where nothing was
    heard either, else 1.0.

    Raises:
        DataError: the two have different lengths.
    """
    if len(references) != len(hypotheses):
        raise DataError(f"{len(references)} references cannot be compared with {len(hypotheses)} hypotheses")
    counted = [word_errors(*pair, language) for pair in zip(references, hypotheses, strict=True)]
    errors, words = (sum(column) for column in zip(*counted, strict=True)) if counted else (0, 0)
    return errors / words if words else float(errors > 0)


def word_errors(reference: str, hypothesis: str, language: str = ENGLISH) -> tuple[int, int]:
    """Word errors of one text, and words of its reference; characters in languages written without spaces."""
    import jiwer

    expected, heard = normalize(reference, language), normalize(hypothesis, language)
    if not expected:  # jiwer refuses it; all that was heard is inserted
        return len(heard.split()), 0
    found = jiwer.process_words([expected], [heard])
    return found.substitutions + found.deletions + found.insertions, len(expected.split())


def word_edits(wanted: str, heard: str, language: str = ENGLISH) -> list[tuple[str, str]]:
    """Two texts side by side as word error rates count them: both normalised, by the least number of edits.

    Returns:
        Words of the first and of the second, run by run: the same words, others in their place, or an empty text on
        the side that has none.
    """
    import jiwer

    first, second = normalize(wanted, language), normalize(heard, language)
    if not first or not second:  # jiwer refuses an empty reference
        return [(first, second)] if first or second else []
    compared = jiwer.process_words([first], [second])
    words, others = compared.references[0], compared.hypotheses[0]
    return [
        (" ".join(words[run.ref_start_idx : run.ref_end_idx]), " ".join(others[run.hyp_start_idx : run.hyp_end_idx]))
        for run in compared.alignments[0]
    ]


def _tokens(text: str, language: str) -> list[str]:
    """Lower-case runs of letters, digits and marks; any other visible character is a token of its own.

    In a language without spaces so is a letter of its script, with its marks: a run of them is a sentence.
    """
    apart = language in SPACELESS
    tokens: list[str] = []
    in_word = may_grow = False
    for character in unicodedata.normalize("NFD", text):
        kind, alone = unicodedata.category(character)[0], apart and _SPACELESS.match(character) is not None
        if in_word and (kind == "M" or kind in "LN" and may_grow and not alone):
            tokens[-1] += character
        elif kind not in "ZC":
            tokens.append(character)
            may_grow = not alone
        in_word = kind in "LNM"
    return [token.lower() for token in tokens]  # of a whole word: a sigma at its end is another letter


def answer_match(prediction: str, golds: str | Sequence[str], language: str = ENGLISH) -> bool:
    """Whether the tokens of any accepted answer are a contiguous part of the reply's tokens.

    The open-question rule of DPR (arXiv 2004.04906) that UltraEval-Audio applies: NFD, lower case, no normalisation of
    articles or numbers. An answer without tokens never matches.

    Args:
        prediction: the reply.
        golds: one accepted answer, or several.
        language: of both, by Whisper's code; the rule as published, which benchmarks go by, is that of any with spaces.
    """
    return bool(_spans(prediction, golds, language))


def _spans(reply: str, forms: str | Sequence[str], language: str) -> list[range]:
    """Where the tokens of any of the forms stand in the reply's tokens."""
    tokens, found = _tokens(reply, language), []
    for form in [forms] if isinstance(forms, str) else forms:
        wanted = _tokens(form, language)
        starts = range(len(tokens) - len(wanted) + 1) if wanted else ()
        found += [range(at, at + len(wanted)) for at in starts if tokens[at : at + len(wanted)] == wanted]
    return found


def strict_match(
    reply: str, golds: str | Sequence[str], entity: str | Sequence[str] = (), language: str = ENGLISH
) -> bool:
    """Whether a reply names an accepted answer and, in other words of it, what the question is about.

    "Zimbabwe is in Africa" is no answer to a question about Ghana, and in "It is Guatemala City" no country is named.

    Args:
        reply: what was written or heard.
        golds: accepted answers, see `answer_match`.
        entity: accepted forms of what the question is about; without any, the answer alone counts.
        language: of all of them, see `answer_match`.
    """
    answers = _spans(reply, golds, language)
    if not entity:
        return bool(answers)
    named = _spans(reply, entity, language)
    return any(set(answer).isdisjoint(name) for answer in answers for name in named)


def strictly_said(
    heard: str, text: str, golds: str | Sequence[str], entity: str | Sequence[str] = (), language: str = ENGLISH
) -> bool:
    """Whether speech counts strictly right: what was heard does, or is all of a text that does.

    The recogniser spells as it likes; where its transcript and the text are the same once normalised, nothing was lost
    in speaking, and the text decides.

    Args:
        heard: transcript of the speech.
        text: what was to be said.
        golds, entity: see `strict_match`.
        language: of all of them, by Whisper's code.
    """
    if strict_match(heard, golds, entity, language):
        return True
    return strict_match(text, golds, entity, language) and normalize(heard, language) == normalize(text, language)
