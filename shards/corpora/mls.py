"""Reads Multilingual LibriSpeech: read speech of eight languages, as OpenSLR unpacks it or Hugging Face stores it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from shards.corpora.parquet import parquet_rows
from shards.corpus import Audio, Corpus, FileAudio, Request, Utterance, clean, sorted_paths, wrong_source

_NAME = "mls"


def discover(source: Path, request: Request) -> Iterator[Utterance]:
    """Utterances of a split in the order of its transcripts."""
    empty = True
    # Not to be looked for everywhere: below train/audio lie ten million files.
    listings = {path for depth in ("", "*/", "*/*/") for path in source.glob(f"{depth}transcripts.txt")}
    for listing in sorted_paths(listings):
        folder = listing.absolute().parent
        if folder.name != request.split or not listing.is_file():
            continue
        language = re.sub(r"^mls_|_opus$", "", folder.parent.name)
        suffix = ".opus" if folder.parent.name.endswith("_opus") else ".flac"
        with listing.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                empty = False
                name, _, text = line.partition("\t")
                speaker, _, rest = name.partition("_")
                audio = FileAudio(
                    listing.parent / "audio" / speaker / rest.partition("_")[0] / f"{name}{suffix}", listing.parent
                )
                yield _utterance(name, text, audio, request.split, speaker, language)
    for row in parquet_rows(source, request.split, ("id", "transcript", "speaker_id")) if empty else ():
        empty = False
        values = row.values
        name = values["id"] or PurePosixPath(values["audio.path"] or "").stem
        yield _utterance(name, values["transcript"], row.audio, request.split, str(values["speaker_id"]), None)
    if empty:
        looked_for = f"mls_*/{request.split}/transcripts.txt or parquet file of split {request.split}"
        raise wrong_source(_NAME, source, looked_for)


def _utterance(name: str, text: str, audio: Audio, split: str, speaker: str, language: str | None) -> Utterance:
    words = clean(text)
    return Utterance(
        id=name,
        task="asr",
        source=_NAME,
        split=split,
        question=audio,
        question_text=words,
        answer_text=words,
        extra={"speaker": speaker, **({"language": language} if language else {})},
    )


CORPUS = Corpus(
    name=_NAME,
    summary="Multilingual LibriSpeech: 44,660 h of read English and 6,000 h of seven more languages (stage I)",
    page="https://www.openslr.org/94",
    licence="CC BY 4.0",
    layout="""\
mls_english/train/transcripts.txt
mls_english/train/audio/10214/10108/10214_10108_000000.flac
(the same with .opus below mls_english_opus), or the parquet files of
https://huggingface.co/datasets/parler-tts/mls_eng or https://huggingface.co/datasets/facebook/multilingual_librispeech""",
    tasks=("asr",),
    discover=discover,
    has_splits=True,
    example="echox shards build mls --source mls_english --out data/mls-train --limit 723636",
)
