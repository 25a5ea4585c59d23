"""Lets the vocoder of a run speak held-out clips while it trains: WAV files by step, and a page to hear it learn."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from echox.audio.io import write_audio
from echox.html import player, write_page
from echox.vocoder.losses import duration_loss, mel_loss

if TYPE_CHECKING:
    from echox.vocoder.data import Clip
    from echox.vocoder.generator import Generator
    from echox.vocoder.losses import LogMel

SAMPLES, PAGE = "samples", "samples.html"
"""Folder of a run that holds waveforms of held-out clips, and the page over them."""
MOST_SHOWN = 12
"""Steps on the page, which holds their sound itself; a long run has many more."""
REAL, SPOKEN = "real-{:02d}.wav", "step-{:08d}/spoken-{:02d}.wav"


class Samples:
    """Held-out clips, and what the steps of a run make of them.

    Args:
        folder: of the run.
        clips: what is spoken, the same at every step.
        rate: samples a second.
        speakers: names of those who speak, by row; none for one voice.
    """

    def __init__(self, folder: Path, clips: Sequence[Clip], rate: int, speakers: Sequence[str] = ()) -> None:
        self.clips, self.rate, self.speakers = list(clips), rate, list(speakers)
        self._folder = folder / SAMPLES

    @torch.no_grad()
    def speak(self, step: int, net: Generator, log_mel: LogMel) -> tuple[dict[str, float], list[tuple[Path, str]]]:
        """Speak each clip with its own durations, and as its own speaker.

        Args:
            step: optimizer steps behind the weights.
            net: the generator.
            log_mel: on its device.

        Returns:
            `valid/loss/mel_l1`, how far the log-mel of spoken and real clips are apart, `valid/loss/duration`, and each
            file that was written with its folder among the artifacts of the run.
        """
        device = log_mel.window_W.device
        errors, misses, units = list[float](), 0.0, 0
        (self._folder / SPOKEN.format(step, 0)).parent.mkdir(parents=True, exist_ok=True)
        was_training = net.training
        net.eval()
        for number, clip in enumerate(self.clips):
            frames_1T, units_1U, durations_1U, wave_1N = (
                torch.from_numpy(each)[None].to(device) for each in (clip.frames, clip.units, clip.durations, clip.wave)
            )
            speaker_1 = torch.tensor([clip.speaker], device=device)
            spoken = net(frames_1T, speaker_1, units_1U, torch.ones_like(units_1U, dtype=torch.bool))
            errors.append(float(mel_loss(log_mel(wave_1N), log_mel(spoken.wave_BN))))
            misses += float(duration_loss(spoken.logs_BU, durations_1U, torch.ones_like(units_1U)))
            units += len(clip.units)
            write_audio(self._folder / SPOKEN.format(step, number), spoken.wave_BN[0].cpu().numpy(), self.rate)
            write_audio(self._folder / REAL.format(number), clip.wave, self.rate)
        net.train(was_training)
        self._write_page()
        metrics = {"valid/loss/mel_l1": float(np.mean(errors)), "valid/loss/duration": misses / units}
        return metrics, list(self._files(step))

    def _files(self, step: int) -> Iterator[tuple[Path, str]]:
        for name in [PAGE, *map(REAL.format, range(len(self.clips)))]:
            yield self._folder / name, SAMPLES
        for number in range(len(self.clips)):
            path = self._folder / SPOKEN.format(step, number)
            yield path, f"{SAMPLES}/{path.parent.name}"

    def _write_page(self) -> None:
        """The newest step, the first, and some between them."""
        steps = sorted((int(each.name.removeprefix("step-")) for each in self._folder.glob("step-*")), reverse=True)
        shown = np.linspace(0, len(steps) - 1, min(MOST_SHOWN, len(steps))).round().astype(int)
        parts = ["<h1>How the voice learns</h1>", "<p>Held-out clips with their own durations. Newest first.</p>"]
        for number, clip in enumerate(self.clips):
            rows = "".join(
                f"<tr><td>{step}</td><td>{player(path.read_bytes())}</td></tr>"
                for step in (steps[place] for place in shown)
                if (path := self._folder / SPOKEN.format(step, number)).is_file()
            )
            real = player((self._folder / REAL.format(number)).read_bytes())
            heading = f"{clip.id} ({self.speakers[clip.speaker]})" if self.speakers else clip.id
            parts.append(
                f"<h2>{html.escape(heading)}</h2><table><tr><th>step</th><th>speech</th></tr>"
                f"<tr><td>real</td><td>{real}</td></tr>{rows}</table>"
            )
        write_page(self._folder / PAGE, "EchoX: a voice learns", parts)
