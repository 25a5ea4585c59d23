"""Reads HH-RLHF-Speech: helpful and harmless dialogues, spoken, as the EchoX authors publish spoken dialogues."""

from __future__ import annotations

from shards.corpora.dialogues import subset
from shards.corpus import Corpus

_NAME = "hh-rlhf-speech"

CORPUS = Corpus(
    name=_NAME,
    summary="HH-RLHF, spoken: its chosen answers are speech to learn from (stage II)",
    page="https://huggingface.co/datasets/KurtDu/EchoX-Dialogues-Plus",
    licence="as stated on the page; the texts (Anthropic/hh-rlhf) are MIT",
    layout="S2S-QA/HH-RLHF-Speech/*.tar.gz, in each a data.json and the .wav files it names; or the same unpacked",
    tasks=("tts", "sqa"),
    discover=subset(_NAME, {"hhrlhfspeech", "hhrlhf"}, "HH-RLHF-Speech"),
    example="echox shards build hh-rlhf-speech --source EchoX-Dialogues-Plus --out data/hh-rlhf --units units/",
)
