"""Computes Whisper's log-mel spectrogram of a batch of clips, padded to 30 s or trimmed to the batch's longest."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

HOP = 160
"""Samples a mel frame: 100 frames a second."""
N_FFT = 400
"""Samples of the analysis window (25 ms)."""
PAD_SECONDS = 30.0
"""The input length Whisper was pretrained on."""
_RATE = 16_000


class LogMel(nn.Module):
    """Log-mel frames, equal to `WhisperFeatureExtractor` of transformers.

    Source: the Whisper paper (arXiv 2212.04356, section 2.2) and its released code: Hann window of 400, hop 160, power,
    Slaney mel filters, log10 floored at 1e-10 and at 8 below the clip's maximum, then (x + 4) / 4.

    In both modes a clip's valid frames do not depend on what it is batched with: silence up to the margin is appended
    to each, the floor is the clip's own, and trimmed batches end in at least half a window of silence, so that the
    mirror at the end of the signal never shows a clip's own sound.

    Args:
        n_mels: 80, or 128 for Whisper large-v3.
        input_mode: "trim" to the longest clip plus margin, or "pad_30s".
        margin_s: silence that counts as part of each clip, seconds.
        stack: encoder frames the adapter joins; lengths are multiples of `2 * stack` mel frames (the encoder halves the
            rate once), so that no joined frame is partly outside the batch.
    """

    filters_FM: Tensor
    window_W: Tensor

    def __init__(
        self,
        n_mels: int = 80,
        *,
        input_mode: Literal["trim", "pad_30s"] = "trim",
        margin_s: float = 0.5,
        stack: int = 2,
    ) -> None:
        super().__init__()
        from transformers.audio_utils import mel_filter_bank

        filters = mel_filter_bank(
            num_frequency_bins=1 + N_FFT // 2,
            num_mel_filters=n_mels,
            min_frequency=0.0,
            max_frequency=_RATE / 2,
            sampling_rate=_RATE,
            norm="slaney",
            mel_scale="slaney",
        )
        self.n_mels = n_mels
        self.input_mode = input_mode
        self.margin = round(margin_s * _RATE)
        self.multiple = 2 * stack
        self.register_buffer("filters_FM", torch.from_numpy(filters).float(), persistent=False)
        self.register_buffer("window_W", torch.hann_window(N_FFT), persistent=False)

    def padded_samples(self, longest: int) -> int:
        """Samples the longest clip of a batch is padded to, given its length."""
        if self.input_mode == "pad_30s":
            return int(PAD_SECONDS * _RATE)
        block = HOP * self.multiple
        samples = -(-(longest + max(self.margin, N_FFT // 2)) // block) * block
        # The position table of the encoder ends at 30 s.
        return min(samples, int(PAD_SECONDS * _RATE) // block * block)

    @torch.no_grad()
    def forward(self, audio_BN: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the frames of a batch.

        Args:
            audio_BN: waveforms at 16 kHz, zeros after each clip's end; what exceeds 30 s is cut.
            lengths_B: samples of each clip.

        Returns:
            mel_BMT: log-mel, float32; in mode "trim" T is a multiple of `2 * stack`, in mode "pad_30s" it is 3,000.
            frames_B: valid mel frames of each clip, margin included, rounded up to a multiple of `2 * stack`.
        """
        samples = self.padded_samples(audio_BN.shape[1])
        audio_BN = nn.functional.pad(audio_BN[:, :samples].float(), (0, max(0, samples - audio_BN.shape[1])))
        spectrum_BFT = torch.stft(audio_BN, N_FFT, HOP, window=self.window_W, center=True, return_complex=True)
        power_BFT = spectrum_BFT[..., :-1].abs().square()
        mel_BMT = (self.filters_FM.T @ power_BFT).clamp_min(1e-10).log10()
        mel_BMT = torch.maximum(mel_BMT, mel_BMT.amax(dim=(1, 2), keepdim=True) - 8.0)
        block = HOP * self.multiple
        frames_B = (lengths_B + self.margin + block - 1).div(block, rounding_mode="floor") * self.multiple
        return (mel_BMT + 4.0) / 4.0, frames_B.clamp_max(mel_BMT.shape[-1])
