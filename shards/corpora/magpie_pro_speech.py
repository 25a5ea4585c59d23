"""Reads Magpie-Pro-Speech+: Magpie-Llama-3.3-Pro instructions, rewritten for speech and spoken by the EchoX authors."""

from __future__ import annotations

from shards.corpora.dialogues import subset
from shards.corpus import Corpus

_NAME = "magpie-pro-speech"

CORPUS = Corpus(
    name=_NAME,
    summary="Magpie-Pro-Speech+: 1,413 h of spoken questions with answers as text (stages I and III)",
    page="https://huggingface.co/datasets/KurtDu/EchoX-Dialogues-Plus",
    licence="as stated on the page; the texts come from a Llama 3.3 model",
    layout="S2T-QA/Magpie-Pro-Speech+/*.tar.gz, in each a data.json and the .wav files it names; or the same unpacked",
    tasks=("sqa", "tts"),
    discover=subset(_NAME, {"magpieprospeech", "magpieprospeechplus"}, "Magpie-Pro-Speech+"),
    example="echox shards build magpie-pro-speech --source EchoX-Dialogues-Plus --out data/magpie --limit 117000",
)
