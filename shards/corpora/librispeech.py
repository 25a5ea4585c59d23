"""Reads LibriSpeech: 960 hours of read English, as OpenSLR unpacks it or as Hugging Face stores it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from shards.corpora.parquet import parquet_rows
from shards.corpus import Audio, Corpus, FileAudio, Request, Utterance, clean, in_split, sorted_paths, wrong_source

_NAME = "librispeech"


def discover(source: Path, request: Request) -> Iterator[Utterance]:
    """Utterances of a split in the order of subsets, speakers and chapters.

    Transcripts are upper-case throughout; they become lower-case, as in MLS, because the tokenizer of an LLM takes
    capitals apart into single letters.
    """
    empty = True
    for listing in sorted_paths(source.rglob("*.trans.txt")):
        part = listing.absolute().parts[-4]
        if not in_split(part, request.split) or not listing.is_file():
            continue
        for line in listing.read_text(encoding="utf-8", errors="replace").splitlines():
            empty = False
            name, _, text = line.partition(" ")
            yield _utterance(
                name, text, FileAudio(listing.parent / f"{name}.flac", listing.parent), part, name.partition("-")[0]
            )
    for row in parquet_rows(source, request.split, ("id", "text", "speaker_id")) if empty else ():
        empty = False
        yield _utterance(row.values["id"], row.values["text"], row.audio, row.part, str(row.values["speaker_id"]))
    if empty:
        raise wrong_source(
            _NAME, source, f"{request.split}-*/SPEAKER/CHAPTER/*.trans.txt or parquet file of split {request.split}"
        )


def _utterance(name: str, text: str, audio: Audio, part: str, speaker: str) -> Utterance:
    words = clean(text)
    words = words.lower() if words else None
    return Utterance(
        id=name,
        task="asr",
        source=_NAME,
        split=part,
        question=audio,
        question_text=words,
        answer_text=words,
        extra={"speaker": speaker},
    )


CORPUS = Corpus(
    name=_NAME,
    summary="960 h of read English, 281,241 utterances to transcribe (stage I)",
    page="https://www.openslr.org/12",
    licence="CC BY 4.0",
    layout="""\
LibriSpeech/train-clean-100/19/198/19-198.trans.txt
LibriSpeech/train-clean-100/19/198/19-198-0000.flac
or the parquet files of https://huggingface.co/datasets/openslr/librispeech_asr""",
    tasks=("asr",),
    discover=discover,
    has_splits=True,
    example="echox shards build librispeech --source LibriSpeech --out data/librispeech-train",
)
