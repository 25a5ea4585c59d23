"""Speaks text with a Piper voice."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from echox.audio.io import resample
from echox.errors import MissingModelError

if TYPE_CHECKING:
    from numpy.typing import NDArray


def check_voice(model: Path) -> None:
    """Make sure that the package, a voice and its configuration are there.

    Raises:
        MissingModelError: one is not.
    """
    if find_spec("piper") is None:
        fix = "pip install 'echox[demo]'"
        raise MissingModelError("piper-tts, which speaks, is not installed", where=str(model), fix=fix)
    for path in (model, Path(f"{model}.json")):
        if not path.is_file():
            fix = "name a voice's .onnx, with its .onnx.json beside it"
            raise MissingModelError("there is no Piper voice", where=str(path), fix=fix)


class PiperSpeech:
    """A voice without randomness, so that a text sounds the same whenever it is spoken.

    Args:
        model: `NAME.onnx`, with `NAME.onnx.json` beside it.

    Raises:
        MissingModelError: it is no voice.
    """

    def __init__(self, model: Path) -> None:
        from piper import PiperVoice, SynthesisConfig

        try:
            self._voice = PiperVoice.load(model)
        except Exception as error:  # onnxruntime's errors have no common class of their own
            fix = "name a voice's .onnx, with its .onnx.json beside it"
            raise MissingModelError(f"this is no Piper voice: {error}", where=str(model), fix=fix) from error
        self._settings = SynthesisConfig(noise_scale=0.0, noise_w_scale=0.0, normalize_audio=True)

    def speak(self, text: str) -> NDArray[np.float32]:
        """16 kHz mono samples of a text."""
        chunks: list[Any] = list(self._voice.synthesize(text, syn_config=self._settings))
        if not chunks:
            return np.zeros(0, np.float32)
        return resample(np.concatenate([chunk.audio_float_array for chunk in chunks]), chunks[0].sample_rate)
