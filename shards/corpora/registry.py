"""Lists the corpora there are recipes for, in the order in which help shows them."""

from __future__ import annotations

from shards.corpora import (
    audioqa,
    hh_rlhf_speech,
    librispeech,
    magpie_pro_speech,
    manifest,
    mls,
    sharechatx,
    speech_instruct,
)
from shards.corpus import Corpus

CORPORA: dict[str, Corpus] = {
    module.CORPUS.name: module.CORPUS
    for module in (
        manifest,
        librispeech,
        mls,
        audioqa,
        speech_instruct,
        hh_rlhf_speech,
        sharechatx,
        magpie_pro_speech,
    )
}
