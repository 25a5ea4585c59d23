"""Computes Whisper's log-mel spectrogram of clips, trimmed or padded to 30 s; longer ones in windows of 30 s."""

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
WINDOW = int(PAD_SECONDS * _RATE)
"""Samples that Whisper hears at once."""
_WINDOW_FRAMES = WINDOW // HOP


class LogMel(nn.Module):
    """Log-mel frames, equal to `WhisperFeatureExtractor` of transformers.

    Source: the Whisper paper (arXiv 2212.04356, section 2.2) and its released code: Hann window of 400, hop 160, power,
    Slaney mel filters, log10 floored at 1e-10 and at 8 below the clip's maximum, then (x + 4) / 4.

    In both modes a clip's valid frames do not depend on what it is batched with: silence up to the margin is appended
    to each, the floor is the clip's own, and trimmed batches end in at least half a window of silence, so that the
    mirror at the end of the signal never shows a clip's own sound.

    A clip longer than 30 s is cut into windows of 30 s without overlap, each computed as a clip of its own and laid end
    to end: mel frame t begins at t / 100 s, whichever window it is of. The margin opens no window of its own.

    Args:
        n_mels: 80, or 128 for Whisper large-v3.
        input_mode: "trim" to the longest clip plus margin; "pad_30s" fills the last window with silence, as
            `WhisperFeatureExtractor` does; "all_30s" counts that silence as valid frames too.
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
        input_mode: Literal["trim", "pad_30s", "all_30s"] = "trim",
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
        """Samples the longest clip of a batch is padded to, given its length, which is 30 s at most."""
        if self.input_mode != "trim":
            return WINDOW
        block = HOP * self.multiple
        samples = -(-(longest + max(self.margin, N_FFT // 2)) // block) * block
        # The position table of the encoder ends at 30 s.
        return min(samples, WINDOW // block * block)

    @torch.no_grad()
    def forward(self, audio_BN: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the frames of a batch.

        Args:
            audio_BN: waveforms at 16 kHz, zeros after each clip's end.
            lengths_B: samples of each clip.

        Returns:
            mel_BMT: log-mel, float32; in mode "trim" T is a multiple of `2 * stack`, in the others of 3,000.
            frames_B: valid mel frames of each clip, margin included, rounded up to a multiple of `2 * stack` as far as
                its last window reaches.
        """
        if audio_BN.shape[1] > WINDOW:
            return self._in_windows(audio_BN, lengths_B)
        samples = self.padded_samples(audio_BN.shape[1])
        mel_BMT = self._log_mel(nn.functional.pad(audio_BN[:, :samples], (0, max(0, samples - audio_BN.shape[1]))))
        if self.input_mode == "all_30s":
            return mel_BMT, torch.full_like(lengths_B, mel_BMT.shape[-1])
        return mel_BMT, self._frames(lengths_B).clamp_max(mel_BMT.shape[-1])

    def _in_windows(self, audio_BN: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        """The same for a batch whose longest clip has several windows; those after a clip's end are left at zero."""
        batch, samples = audio_BN.shape
        windows = -(-samples // WINDOW)
        audio_KN = nn.functional.pad(audio_BN, (0, windows * WINDOW - samples)).view(batch * windows, WINDOW)
        windows_B = ((lengths_B + WINDOW - 1) // WINDOW).clamp_min(1)
        used_K = (torch.arange(windows, device=lengths_B.device) < windows_B[:, None]).flatten().nonzero()[:, 0]
        mel_KMT = self._log_mel(audio_KN[used_K])
        all_KMT = mel_KMT.new_zeros(batch * windows, *mel_KMT.shape[1:]).index_copy_(0, used_K, mel_KMT)
        mel_BMT = all_KMT.unflatten(0, (batch, windows)).transpose(1, 2).flatten(2)
        reach_B = windows_B * _WINDOW_FRAMES
        if self.input_mode == "all_30s":
            return mel_BMT, reach_B
        if self.input_mode == "pad_30s":
            return mel_BMT, torch.minimum(self._frames(lengths_B), reach_B)
        frames_B = torch.minimum(self._frames(lengths_B), reach_B // self.multiple * self.multiple)
        return mel_BMT[..., : int(frames_B.max())], frames_B

    def _log_mel(self, audio_BN: Tensor) -> Tensor:
        """Log-mel `[B, M, N / 160]` of waveforms, each with the floor that its own maximum sets."""
        audio_BN = audio_BN.float()
        spectrum_BFT = torch.stft(audio_BN, N_FFT, HOP, window=self.window_W, center=True, return_complex=True)
        power_BFT = spectrum_BFT[..., :-1].abs().square()
        mel_BMT = (self.filters_FM.T @ power_BFT).clamp_min(1e-10).log10()
        mel_BMT = torch.maximum(mel_BMT, mel_BMT.amax(dim=(1, 2), keepdim=True) - 8.0)
        return (mel_BMT + 4.0) / 4.0

    def _frames(self, lengths_B: Tensor) -> Tensor:
        """Mel frames of clips and their margins, in whole stacks."""
        block = HOP * self.multiple
        return (lengths_B + self.margin + block - 1).div(block, rounding_mode="floor") * self.multiple
