"""Reads SpeechInstruct: instructions as text and as the units of mHuBERT, the ones EchoX speaks in."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from echox.files import parse_json
from echox.units.identity import UnitSetIdentity
from shards.corpora.dialogues import find_lists, listed_utterances
from shards.corpus import Corpus, Request, Utterance, clean, wrong_source

_NAME = "speech-instruct"
_CHAIN = "chain_of_modality_instruction.jsonl"
_NAMES = {"speechinstruct"}
UNITS = "mhubert_base_vp_en_es_fr_it3_L11_km1000"
"""The k-means that made the units, 1,000 of them, consecutive duplicates removed."""
UNIT_SET = UnitSetIdentity(features="hubert", model="mhubert-base-vp_en_es_fr", layer=11, clusters=1000)
"""The same as a record of the dataset; known by name, as the corpus does not come with the centroids."""

_UNITS = r"<sosp>((?:\s*<\d+>)*)\s*<eosp>"
_ANSWERED = re.compile(r"\[SpeechGPT\]:\s*(?:\[tq\])?\s*(.*?);?\s*\[ta\]\s*(.*?);?\s*\[ua\]\s*" + _UNITS, re.DOTALL)
_SPOKEN = re.compile(r"This is input:\s*(.*?)\s*<eoh>\s*\[SpeechGPT\]:\s*" + _UNITS, re.DOTALL | re.IGNORECASE)
_HEARD = re.compile(r"This is input:\s*" + _UNITS + r".*?\[SpeechGPT\]:\s*(.*?)\s*<eoa>", re.DOTALL | re.IGNORECASE)


def discover(source: Path, request: Request) -> Iterator[Utterance]:
    """Utterances of the chain-of-modality instructions, or of the file or EchoX archives that the source names."""
    listing = source if source.is_file() and source.suffix == ".jsonl" else source / _CHAIN
    if listing.is_file():
        yield from _listed(listing, request)
        return
    lists = find_lists(source, _NAMES)
    if not lists:
        raise wrong_source(_NAME, source, f"{_CHAIN} or SpeechInstruct/*.tar.gz")
    yield from listed_utterances(lists, _NAME, request)


def _listed(listing: Path, request: Request) -> Iterator[Utterance]:
    with listing.open("rb") as lines:
        for number, line in enumerate(lines):
            name = f"{listing.stem}-{number:07d}"
            try:
                question, answer, units = parse(parse_json(line)["plain_text"])
            except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
                problem = f"line {number + 1} of {listing.name}: {error}"
                yield Utterance(id=name, task=request.task, source=_NAME, problem=problem)
                continue
            yield Utterance(
                id=name,
                task=request.task,
                source=_NAME,
                question_text=question,
                answer_text=answer,
                units=units,
                extra={"units": UNITS},
                problem="it has units instead of sound" if request.task == "sqa" else None,
            )


def parse(text: Any) -> tuple[str | None, str | None, tuple[int, ...]]:
    """Instruction, text and units of one line's `plain_text`.

    Three forms occur: an answered spoken instruction, a sentence to speak, and speech to transcribe.

    Raises:
        ValueError: none of them, such as a dialogue without speech.
    """
    if answered := _ANSWERED.search(text):
        question, answer, units = answered.groups()
    elif spoken := _SPOKEN.search(text):
        question, (answer, units) = None, spoken.groups()
    elif heard := _HEARD.search(text):
        question, (units, answer) = None, heard.groups()
    else:
        raise ValueError("no text with its units")
    return clean(question), clean(answer), tuple(map(int, re.findall(r"\d+", units)))


CORPUS = Corpus(
    name=_NAME,
    summary="SpeechInstruct: answers as text and mHuBERT units (stage II)",
    page="https://huggingface.co/datasets/fnlp/SpeechInstruct",
    licence="none is stated on the page",
    layout="""\
chain_of_modality_instruction.jsonl: {"prefix", "plain_text"} a line, units written out as <661><588>...
Name cross_modal_instruction.jsonl itself as the source for its 9 million sentences of many speakers;
SpeechInstruct/*.tar.gz in the layout of EchoX-Dialogues is read too.""",
    tasks=("tts", "sqa"),
    discover=discover,
    unit_set=UNIT_SET,
    example="echox shards build speech-instruct --source SpeechInstruct --out data/speech-instruct",
)
