"""Rates how speech sounds with DNSMOS P.835 and P.808, networks that predict the mean opinion of listeners.

What was said does not matter to it, so it stands beside the word error rate and in place of neither. It was trained on
noisy and denoised calls at 16 kHz (Reddy et al., ICASSP 2022, arXiv 2110.01763), not on synthetic speech.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from echox.config.paths import how_to_get, model_place
from echox.errors import MissingModelError
from echox.evaluate.onnx import open_session
from echox.files import sha256_file

if TYPE_CHECKING:
    import onnxruntime
    from numpy.typing import NDArray

    from echox.evaluate.listening import Listener
    from echox.evaluate.scores import SpokenItem

    Floats = NDArray[np.float32]

MODEL = "microsoft/dnsmos"
P835, P808 = "sig_bak_ovr.onnx", "model_v8.onnx"
VOICES = {"echo": "Echo", "cascade": "cascade", "copy": "copy"}
"""Whose speech is rated: the model's own, the teacher's of the same text, the reference's true units."""

_RATE = 16_000
_WINDOW_S = 9.01
_WINDOW = int(_WINDOW_S * _RATE)
_AT_ONCE = 4
"""Windows given to the networks together; a window of P.835 has 75 MB of activations."""
_FFT, _HOP, _MELS = 321, 160, 120
_TO_OPINION = {
    "sig": (-0.08397278, 1.22083953, 0.0052439),
    "bak": (-0.13166888, 1.60915514, -0.39604546),
    "ovrl": (-0.06766283, 1.11546468, 0.04602535),
}
"""Polynomials, highest power first, that map the outputs of P.835, in their order, to opinions (speechmos 0.0.1.1)."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Quality:
    """Predicted mean opinions of one clip, from 1 (bad) to 5 (excellent).

    Attributes:
        ovrl: of the whole, P.835.
        sig: of the speech alone, P.835.
        bak: of what is behind it, P.835; 5 is silence.
        p808: of the whole, by the network that was trained on P.808 listening tests.
    """

    ovrl: float
    sig: float
    bak: float
    p808: float


PARTS = tuple(Quality.__dataclass_fields__)


class Dnsmos:
    """DNSMOS as the package `speechmos` computes it, window by window of 9.01 s, a second apart.

    A clip shorter than a window is repeated, as there, but read once: the package reads up to nine windows of the same
    sound, which costs as many times as much. On 20 clips of 0.2 to 6 s that moved `ovrl` by 0.01 on average.

    Args:
        folder: holds `sig_bak_ovr.onnx` and `model_v8.onnx`.
        threads: CPU threads; default: all.

    Raises:
        MissingModelError: a file of it is absent, or no model.
    """

    def __init__(self, folder: Path, threads: int | None = None) -> None:
        self._folder = folder
        threads = threads or os.cpu_count() or 1
        self._p835, self._p808 = (self._open(name, threads) for name in (P835, P808))

    @classmethod
    def find(cls) -> Dnsmos | None:
        """The model below the cache's models; None where it was never fetched, since scores do without it."""
        folder = model_place(MODEL)
        return cls(folder) if folder.is_dir() else None

    def identity(self) -> dict[str, str]:
        """SHA-256 of the files that decide what it says."""
        return {name: sha256_file(self._folder / name) for name in (P835, P808)}

    def rate(self, clips: Sequence[Floats], progress: Progress | None = None) -> list[Quality | None]:
        """Opinions of 16 kHz mono clips; None for one without any sound.

        Samples beyond 1 are cut off, as a player does.
        """
        found: list[Quality | None] = []
        for clip in clips:
            found.append(self._rate(np.clip(clip, -1, 1)) if np.any(clip) else None)
            if progress:
                progress(len(found), len(clips))
        return found

    def _rate(self, clip: Floats) -> Quality:
        windows_BT = _windows(clip)
        raw_B3, p808_B = [], []
        for start in range(0, len(windows_BT), _AT_ONCE):
            batch_BT = windows_BT[start : start + _AT_ONCE]
            raw_B3.append(self._p835.run(None, {"input_1": batch_BT})[0])
            p808_B.append(self._p808.run(None, {"input_1": _log_mel(batch_BT)})[0][:, 0])
        raw = np.concatenate(raw_B3).astype(np.float64).T
        opinions = {
            name: float(np.polyval(polynomial, outputs).mean())
            for (name, polynomial), outputs in zip(_TO_OPINION.items(), raw, strict=True)
        }
        return Quality(**opinions, p808=float(np.concatenate(p808_B).mean()))

    def _open(self, name: str, threads: int) -> onnxruntime.InferenceSession:
        path = self._folder / name
        try:
            return open_session(path, threads)
        except Exception as error:  # of onnxruntime's own kinds
            said = str(error).splitlines()[0]
            raise MissingModelError(f"this is no model: {said}", where=str(path), fix=how_to_get(MODEL)) from error


def mean_quality(rated: Iterable[Quality | None]) -> dict[str, float] | None:
    """`n` clips that have a sound, and their mean opinions; None without any."""
    heard = [asdict(each) for each in rated if each is not None]
    if not heard:
        return None
    return {"n": len(heard), **{part: float(np.mean([each[part] for each in heard])) for part in PARTS}}


def spread_over(count: int, most: int) -> list[int]:
    """At most so many of the numbers below `count`, at even distances."""
    return list(dict.fromkeys(np.linspace(0, count - 1, min(most, count)).round().astype(int).tolist()))


def rate_voices(
    items: Sequence[SpokenItem], listener: Listener, rater: Dnsmos, most: int, progress: Progress | None = None
) -> dict[str, dict[str, float]]:
    """The mean quality of the three voices on at most `most` of the items, the same for all, at even distances.

    Returns:
        Voice of `VOICES` to `mean_quality`; voices that said nothing are left out.
    """
    chosen = [items[index] for index in spread_over(len(items), most)]
    units = {
        "echo": [item.units for item in chosen],
        "cascade": [item.cascade_units for item in chosen],
        "copy": [item.copy_units for item in chosen],
    }
    said = [(voice, each) for voice, spoken in units.items() for each in spoken if each is not None and len(each)]
    rated = rater.rate(listener.speak([each for _, each in said]), progress)
    means = {
        voice: mean_quality(quality for (whose, _), quality in zip(said, rated, strict=True) if whose == voice)
        for voice in VOICES
    }
    return {voice: mean for voice, mean in means.items() if mean}


def _windows(clip: Floats) -> Floats:
    """Windows of a clip; [B, 144160]."""
    if len(clip) < _WINDOW:
        return np.resize(clip, (1, _WINDOW)).astype(np.float32)
    count = int(np.floor(len(clip) / _RATE) - _WINDOW_S) + 1
    # The package computes where a window ends in floating point, and leaves out those that this makes a sample short,
    # from the eighth to the 24th. Numbers of others are without them, and so are these.
    whole = [place for place in range(count) if int((place + _WINDOW_S) * _RATE) - place * _RATE == _WINDOW]
    return np.stack([clip[place * _RATE :][:_WINDOW] for place in whole]).astype(np.float32)


def _log_mel(windows_BT: Floats) -> Floats:
    """What P.808 reads of windows: a log-mel spectrogram as librosa's, 80 dB below its peak; [B, 900, 120]."""
    import torch
    from transformers.audio_utils import mel_filter_bank

    # The library's filters are of even transforms: of twice the rate and bins, the lower half are those of 321 points.
    filters_FM = mel_filter_bank(_FFT + 1, _MELS, 0.0, _RATE / 2, 2 * _RATE, norm="slaney", mel_scale="slaney")
    bank_FM = torch.from_numpy(filters_FM[: _FFT // 2 + 1]).float()
    waves_BT = torch.from_numpy(windows_BT[:, :-_HOP].copy())
    spectrum_BFT = torch.stft(
        waves_BT, _FFT, _HOP, window=torch.hann_window(_FFT), center=True, pad_mode="constant", return_complex=True
    )
    power_BTM = spectrum_BFT.abs().square().transpose(1, 2) @ bank_FM
    decibels_BTM = 10 * power_BTM.clamp_min(1e-10).log10()
    below_peak_BTM = (decibels_BTM - decibels_BTM.amax((1, 2), keepdim=True)).clamp_min(-80)
    return np.asarray(((below_peak_BTM + 40) / 40).numpy(), dtype=np.float32)
