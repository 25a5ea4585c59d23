"""Reads ShareChatX: spoken dialogues of several turns, as the EchoX authors publish them."""

from __future__ import annotations

from shards.corpora.dialogues import subset
from shards.corpus import Corpus

_NAME = "sharechatx"

CORPUS = Corpus(
    name=_NAME,
    summary="ShareChatX: 43,223 spoken questions of dialogues with answers as text (stages I and III)",
    page="https://huggingface.co/datasets/KurtDu/EchoX-Dialogues",
    licence="Apache-2.0 as stated by its owners; see the page you download from",
    layout="S2T-QA/ShareChatX/*.tar.gz, in each a data.json and the .wav files it names; or the same unpacked",
    tasks=("sqa", "tts"),
    discover=subset(_NAME, {"sharechatx"}, "ShareChatX"),
    example="echox shards build sharechatx --source EchoX-Dialogues --out data/sharechatx",
)
