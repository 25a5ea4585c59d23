"""Reads the tokenizer of a release: control tokens, the placeholder of speech, and the unit tokens behind it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from echox.errors import MissingModelError
from echox.files import read_text
from echox.release.echox_format.shape import (
    BEGIN,
    END_HEADER,
    END_OF_TURN,
    PLACEHOLDER,
    START_HEADER,
    ReleaseShape,
)
from echox.units.pieces import WORD_START

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
"""What is taken over beside the weights, where it is there."""
FIXED = {
    BEGIN: "<|begin_of_text|>",
    START_HEADER: "<|start_header_id|>",
    END_HEADER: "<|end_header_id|>",
    END_OF_TURN: "<|eot_id|>",
    65_576: "speaker",
    12_800: " arrested",
}
"""Tokens whose numbers stand in the released code."""
_UNIT = re.compile(r"<\|unit_(.+)\|>", re.DOTALL)
_LARGEST = 128 << 20


def open_tokenizer(folder: Path) -> Any:
    """The `tokenizers.Tokenizer` of a folder.

    Raises:
        MissingModelError: there is none that can be read.
    """
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    try:
        return Tokenizer.from_str(read_text(path, _LARGEST))
    except Exception as error:  # tokenizers raises nothing more specific, whatever is wrong with a file
        said = getattr(error, "strerror", None) or error
        fix = "name a folder with the tokenizer of the model"
        raise MissingModelError(f"the tokenizer cannot be read: {said}", where=str(path), fix=fix) from error


def fixed_problems(tokenizer: Any) -> list[str]:
    """Which of the numbers that the released code has written in it are other tokens here."""
    found = {number: tokenizer.decode([number], skip_special_tokens=False) for number in FIXED}
    return [
        f"token {number} of the tokenizer is {found[number]!r:.40}, the released code takes it for {text!r}"
        for number, text in FIXED.items()
        if found[number].replace("Ġ", " ").strip() != text.strip()
    ]


def unit_bodies(tokenizer: Any, shape: ReleaseShape) -> tuple[list[str], list[str]]:
    """The bodies of the unit tokens in their order, and what is wrong with them and the placeholder."""
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    problems = []
    place = vocabulary.get(PLACEHOLDER)
    if place != shape.vocabulary - 1:
        problems.append(f"{PLACEHOLDER} is token {place}, not {shape.vocabulary - 1}, the last of vocab_size")
    numbers = {
        number: match[1]
        for text, number in vocabulary.items()
        if number >= shape.vocabulary and (match := _UNIT.fullmatch(text))
    }
    wanted = range(shape.vocabulary, shape.vocabulary + shape.units)
    if len(numbers) != shape.units:
        problems.append(f"the tokenizer has {len(numbers)} unit tokens, config.json {shape.units} (unit_vocab_size)")
    elif sorted(numbers) != list(wanted):
        problems.append(f"the unit tokens are not the numbers {wanted.start} to {wanted.stop - 1}")
    return [numbers[number] for number in sorted(numbers)], problems


def kind_of(bodies: list[str]) -> str:
    """What the bodies of unit tokens are."""
    if not any(WORD_START in body for body in bodies):
        return "plain" if all(body.isdigit() for body in bodies) else "words"
    return "pieces" if any(body[:1].isdigit() for body in bodies) else "words"
