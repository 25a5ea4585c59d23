"""Loads what a server answers with: a run of the echo stage, and a voice that knows its units."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from echox.engine.object_store.reading import local_run
from echox.speak.pipeline import SpeechToSpeech
from echox.speak.vocoder import check_vocoder, default_vocoder, load_vocoder

if TYPE_CHECKING:
    from echox.speak.vocoder import Vocoder


def load(run: str | Path, vocoder: str | Path | None, speaker: str | None = None) -> tuple[SpeechToSpeech, Vocoder]:
    """The run, and its voice.

    Args:
        run: folder or URL of a run, or a checkpoint.
        vocoder: its folder; None: the demo's.
        speaker: name or number of who speaks, in a vocoder of several; None: the first.

    Raises:
        CheckpointError: there is no such run, or it does not speak.
        EchoXError: the vocoder cannot be read, speaks other units, or has no such speaker.
    """
    folder = default_vocoder() if vocoder is None else Path(vocoder)
    voice = load_vocoder(folder, speaker)
    model = SpeechToSpeech.load(local_run(run))
    model.engine()  # an S2T run does not speak, and says so here
    check_vocoder(folder, [model.units])
    return model, voice
