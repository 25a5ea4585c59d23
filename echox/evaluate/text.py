"""Compares texts: English normalisation, word error rate, and whether a reply has the answer about the right thing."""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Callable, Sequence

from echox.errors import DataError


@functools.cache
def _normalizer() -> Callable[[str], str]:
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    # Its spelling table (colour to color) is data of a model's folder; both sides of a comparison go without.
    return EnglishTextNormalizer({})


def normalize(text: str) -> str:
    """Whisper's English text normalisation: case, punctuation, contractions, numbers as digits, fillers removed.

    Source: the Whisper paper (arXiv 2212.04356, appendix C), as in transformers.
    """
    # It leaves a full stop standing where no word is before it.
    words = _normalizer()(text).split()
    return " ".join(word for word in words if any(character.isalnum() for character in word))


def wer(references: Sequence[str], hypotheses: Sequence[str]) -> float:
    """Word errors over reference words, both normalised, over the whole corpus; 1.0 is 100 %.

    References with no words left after normalisation count by what is inserted; without any reference word the result
    is 0.0 where nothing was heard either, else 1.0.

    Raises:
        DataError: the two have different lengths.
    """
    import jiwer

    if len(references) != len(hypotheses):
        raise DataError(f"{len(references)} references cannot be compared with {len(hypotheses)} hypotheses")
    expected = [normalize(text) for text in references]
    heard = [normalize(text) for text in hypotheses]
    words = sum(len(text.split()) for text in expected)
    if words == 0:
        return float(any(heard))
    # jiwer refuses an empty reference, whose words heard are all insertions.
    insertions = sum(len(text.split()) for want, text in zip(expected, heard, strict=True) if not want)
    pairs = [(want, text) for want, text in zip(expected, heard, strict=True) if want]
    output = jiwer.process_words([want for want, _ in pairs], [text for _, text in pairs])
    return (output.substitutions + output.deletions + output.insertions + insertions) / words


def word_edits(wanted: str, heard: str) -> list[tuple[str, str]]:
    """Two texts side by side as word error rates count them: both normalised, by the least number of edits.

    Returns:
        Words of the first and of the second, run by run: the same words, others in their place, or an empty text on
        the side that has none.
    """
    import jiwer

    first, second = normalize(wanted), normalize(heard)
    if not first or not second:  # jiwer refuses an empty reference
        return [(first, second)] if first or second else []
    compared = jiwer.process_words([first], [second])
    words, others = compared.references[0], compared.hypotheses[0]
    return [
        (" ".join(words[run.ref_start_idx : run.ref_end_idx]), " ".join(others[run.hyp_start_idx : run.hyp_end_idx]))
        for run in compared.alignments[0]
    ]


def _tokens(text: str) -> list[str]:
    """Lower-case runs of letters, digits and marks; any other visible character is a token of its own."""
    tokens: list[str] = []
    in_word = False
    for character in unicodedata.normalize("NFD", text):
        kind = unicodedata.category(character)[0]
        if kind in "LNM" and in_word:
            tokens[-1] += character
        elif kind not in "ZC":
            tokens.append(character)
        in_word = kind in "LNM"
    return [token.lower() for token in tokens]  # of a whole word: a sigma at its end is another letter


def answer_match(prediction: str, golds: str | Sequence[str]) -> bool:
    """Whether the tokens of any accepted answer are a contiguous part of the reply's tokens.

    The open-question rule of DPR (arXiv 2004.04906) that UltraEval-Audio applies: NFD, lower case, no normalisation of
    articles or numbers. An answer without tokens never matches.

    Args:
        prediction: the reply.
        golds: one accepted answer, or several.
    """
    return bool(_spans(prediction, golds))


def _spans(reply: str, forms: str | Sequence[str]) -> list[range]:
    """Where the tokens of any of the forms stand in the reply's tokens."""
    tokens, found = _tokens(reply), []
    for form in [forms] if isinstance(forms, str) else forms:
        wanted = _tokens(form)
        starts = range(len(tokens) - len(wanted) + 1) if wanted else ()
        found += [range(at, at + len(wanted)) for at in starts if tokens[at : at + len(wanted)] == wanted]
    return found


def strict_match(reply: str, golds: str | Sequence[str], entity: str | Sequence[str] = ()) -> bool:
    """Whether a reply names an accepted answer and, in other words of it, what the question is about.

    "Zimbabwe is in Africa" is no answer to a question about Ghana, and in "It is Guatemala City" no country is named.

    Args:
        reply: what was written or heard.
        golds: accepted answers, see `answer_match`.
        entity: accepted forms of what the question is about; without any, the answer alone counts.
    """
    answers = _spans(reply, golds)
    if not entity:
        return bool(answers)
    named = _spans(reply, entity)
    return any(set(answer).isdisjoint(name) for answer in answers for name in named)


def strictly_said(heard: str, text: str, golds: str | Sequence[str], entity: str | Sequence[str] = ()) -> bool:
    """Whether speech counts strictly right: what was heard does, or is all of a text that does.

    The recogniser spells as it likes; where its transcript and the text are the same once normalised, nothing was lost
    in speaking, and the text decides.

    Args:
        heard: transcript of the speech.
        text: what was to be said.
        golds, entity: see `strict_match`.
    """
    if strict_match(heard, golds, entity):
        return True
    return strict_match(text, golds, entity) and normalize(heard) == normalize(text)
