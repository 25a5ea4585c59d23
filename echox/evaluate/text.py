"""Compares texts: English normalisation, word error rate, and whether an answer is in a reply."""

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


def _tokens(text: str) -> list[str]:
    """Lower-case runs of letters, digits and marks; any other visible character is a token of its own."""
    tokens: list[str] = []
    in_word = False
    for character in unicodedata.normalize("NFD", text):
        kind = unicodedata.category(character)[0]
        if kind in "LNM" and in_word:
            tokens[-1] += character.lower()
        elif kind not in "ZC":
            tokens.append(character.lower())
        in_word = kind in "LNM"
    return tokens


def answer_match(prediction: str, golds: str | Sequence[str]) -> bool:
    """Whether the tokens of any accepted answer are a contiguous part of the reply's tokens.

    The open-question rule of DPR (arXiv 2004.04906) that UltraEval-Audio applies: NFD, lower case, no normalisation of
    articles or numbers. An answer without tokens never matches.

    Args:
        prediction: the reply.
        golds: one accepted answer, or several.
    """
    reply = _tokens(prediction)
    for gold in [golds] if isinstance(golds, str) else golds:
        wanted = _tokens(gold)
        size = len(wanted)
        if size and any(reply[start : start + size] == wanted for start in range(len(reply) - size + 1)):
            return True
    return False
