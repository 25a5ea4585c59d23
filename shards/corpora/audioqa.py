"""Reads AudioQA-1M: spoken questions and answers, as its owners (VITA-MLLM) or the EchoX authors publish it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from shards.corpora.archives import json_list
from shards.corpora.dialogues import dialogue_utterances, subset
from shards.corpus import Audio, Corpus, FileAudio, Request, Utterance, wrong_source

_NAME = "audioqa"
_LISTS = {"train": "train.json", "dev": "eval.json"}
_SOUND = "QA_1450K_"
"""How the folders of sound begin; paths in the lists have folders of their author's machines before it."""

_echox_subset = subset(_NAME, {"audioqa", "audioqa1m"}, "S2S-QA/AudioQA")


def discover(source: Path, request: Request) -> Iterator[Utterance]:
    """Utterances of `train.json` or `eval.json` where the source has one, else of the EchoX archives."""
    listing = source / _LISTS.get(request.split, request.split)
    if request.split == "train" and not listing.is_file():
        yield from _echox_subset(source, request)
        return
    if not listing.is_file():
        raise wrong_source(_NAME, source, listing.name)

    def locate(path: str) -> Audio:
        parts = PurePosixPath(path).parts
        at = next((at for at, part in enumerate(parts) if part.startswith(_SOUND)), None)
        return FileAudio(source.joinpath(*parts[at:]) if at is not None else source / path.lstrip("/"), source)

    with listing.open("rb") as stream:
        for number, example in enumerate(json_list(stream, str(listing))):
            name = f"{listing.stem}-{number:07d}"
            yield from dialogue_utterances(_named(example), name, _NAME, request, locate, request.split)


def _named(example: Any) -> Any:
    """A bare list of turns is a dialogue too."""
    return example if isinstance(example, Mapping) else {"conversations": example}


CORPUS = Corpus(
    name=_NAME,
    summary="AudioQA-1M: spoken questions and answers; its answers are speech to learn from (stage II)",
    page="https://huggingface.co/datasets/KurtDu/EchoX-Dialogues-Plus (folder S2S-QA/AudioQA, the part EchoX used) or "
    "https://huggingface.co/datasets/VITA-MLLM/AudioQA-1M",
    licence="as stated on the page you download from",
    layout="""\
S2S-QA/AudioQA/*.tar.gz, in each a data.json and the .wav files it names; or
train.json, eval.json
QA_1450K_question_tar_16khz/question_shuf_part_6/wav/*_question.wav
QA_1450K_answer_part1_tar_16khz/answer_part1_shuf_part_3/wav/*_F10.wav""",
    tasks=("tts", "sqa"),
    discover=discover,
    has_splits=True,
    example="echox shards build audioqa --source EchoX-Dialogues-Plus --out data/audioqa --units units/",
)
