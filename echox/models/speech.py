"""Speech to LLM-width vectors: frozen Whisper encoder, alignment adapter with CTC head, shrink with look-back.

Follows Soundwave (arXiv 2502.12900), the first stage of EchoX; sizes are Whisper's and the LLM's own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from echox.models.attention import Attention, EncoderBlock
from echox.models.rows import gather_rows, lengths_to_mask


class TrimmedWhisperEncoder(nn.Module):
    """A Hugging Face Whisper encoder that accepts any number of mel frames up to 3,000.

    Only the first T rows of the position table are needed, so trimmed input costs in proportion to its length. Frames
    beyond a clip's own length are zeroed before each convolution and masked in attention: the features of a clip do not
    depend on the other clips of its batch.
    """

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder
        self.width = int(encoder.config.d_model)

    def forward(self, mel_BMT: Tensor, frames_B: Tensor) -> tuple[Tensor, Tensor]:
        """`[B, mels, T]` with `frames_B` real mel frames each to features `[B, T/2, d]` and their real frames `[B]`."""
        encoder = self.encoder
        mel_BMT = mel_BMT.to(encoder.conv1.weight.dtype)
        mel_mask = lengths_to_mask(frames_B, mel_BMT.shape[2])[:, None, :]
        x = F.gelu(encoder.conv1(mel_BMT * mel_mask)) * mel_mask
        x = F.gelu(encoder.conv2(x)).transpose(1, 2)
        out_frames_B = (frames_B + 1) // 2
        mask = lengths_to_mask(out_frames_B, x.shape[1])
        positions = encoder.embed_positions(torch.arange(x.shape[1], device=x.device))
        x = x + positions
        bias = torch.zeros(mask.shape, dtype=x.dtype, device=x.device).masked_fill(~mask, torch.finfo(x.dtype).min)
        bias_B11T = bias[:, None, None, :].expand(-1, 1, x.shape[1], -1)
        for layer in encoder.layers:
            out = layer(x, bias_B11T)
            x = out[0] if isinstance(out, tuple) else out
        features: Tensor = encoder.layer_norm(x)
        return features, out_frames_B


class AlignmentAdapter(nn.Module):
    """Stack frames, project to the LLM width, one encoder layer, LayerNorm: `[B, T, d]` to `[B, T/stack, h]`."""

    def __init__(
        self, *, encoder_width: int, width: int, heads: int, ffn: int, stack: int, dropout: float, frame_local: bool
    ) -> None:
        super().__init__()
        self.stack = stack
        self.frame_local = frame_local
        self.projection = nn.Linear(encoder_width * stack, width)
        self.block = EncoderBlock(width, heads, ffn, dropout)
        self.norm = nn.LayerNorm(width)

    def forward(self, features_BTd: Tensor, frames_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return aligned frames `[B, T', h]` and how many of each row are real `[B]`; a last partial stack is kept."""
        batch, frames, width = features_BTd.shape
        features_BTd = features_BTd * lengths_to_mask(frames_B, frames)[:, :, None]
        features_BTd = F.pad(features_BTd, (0, 0, 0, -frames % self.stack))
        stacked = features_BTd.reshape(batch, -1, width * self.stack)
        aligned_B = (frames_B + self.stack - 1) // self.stack
        mask = lengths_to_mask(aligned_B, stacked.shape[1])
        aligned = self.norm(self.block(self.projection(stacked), mask, frame_local=self.frame_local))
        return aligned, aligned_B


LOGIT_STD = 3.0


class CtcHead(nn.Module):
    """Linear map from aligned frames to CTC classes; class 0 is the blank, class i > 0 is LLM token `tokens[i]`.

    Args:
        width: LLM width h.
        tokens: LLM token id of each class; the first is the audio placeholder that serves as blank.
        vocabulary: size of the LLM's vocabulary.
    """

    tokens: Tensor

    def __init__(self, width: int, tokens: Tensor, vocabulary: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, len(tokens), bias=False)
        self.vocabulary = vocabulary
        self.register_buffer("tokens", tokens)

    @torch.no_grad()
    def init_from_table(self, table_Vh: Tensor) -> None:
        """Start each class from its token's embedding; the blank starts at zero (U26).

        Rows are scaled to a mean norm of 3: on normalised frames that is the standard deviation of a logit.
        """
        rows = table_Vh[self.tokens.clamp(max=len(table_Vh) - 1)].float()
        rows = rows * (LOGIT_STD / rows.norm(dim=1).mean().clamp(min=1e-6))
        rows[0] = 0
        self.linear.weight.copy_(rows)

    def classes(self, tokens_BC: Tensor) -> Tensor:
        """CTC class of each LLM token; a token without a class becomes the blank, which CTC never asks for."""
        table = torch.zeros(self.vocabulary + 1, dtype=torch.long, device=tokens_BC.device)
        table[self.tokens] = torch.arange(len(self.tokens), device=tokens_BC.device)
        table[self.tokens[0]] = 0
        return table[tokens_BC]

    def forward(self, aligned_BTh: Tensor) -> Tensor:
        """Class logits `[B, T, C]`."""
        logits: Tensor = self.linear(aligned_BTh)
        return logits


class Shrunk(NamedTuple):
    """Speech vectors `[B, v, h]`, their mask `[B, v]`, and the frame each was made of `[B, v]`."""

    speech_BVh: Tensor
    mask_BV: Tensor
    kept_BV: Tensor


class ShrinkAdapter(nn.Module):
    """Keep the first frame of every run of equal CTC labels, then let it look back at the frames.

    Args:
        width, heads, dropout: of the look-back attention.
        kept_keys_only: look back at kept frames only, as the release does.
        drop_blanks: keep no run of blanks; a row of blanks alone keeps its first frame.
    """

    def __init__(
        self, *, width: int, heads: int, dropout: float, kept_keys_only: bool, drop_blanks: bool = False
    ) -> None:
        super().__init__()
        self.kept_keys_only = kept_keys_only
        self.drop_blanks = drop_blanks
        self.look_back = Attention(width, heads, dropout)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(width)

    def forward(self, aligned_BTh: Tensor, frames_B: Tensor, labels_BT: Tensor) -> Shrunk:
        """Shrink `[B, T, h]` with labels `[B, T]`, blank 0; v is the longest row (one host sync)."""
        valid = lengths_to_mask(frames_B, aligned_BTh.shape[1])
        keep = run_starts(labels_BT) & valid
        if self.drop_blanks:
            keep = keep & (labels_BT != 0)
            keep[:, 0] |= ~keep.any(1)
        longest = int(keep.sum(1).max())  # host sync
        order = torch.argsort((~keep).to(torch.uint8), dim=1, stable=True)[:, :longest]
        kept = gather_rows(aligned_BTh, order)
        mask = keep.gather(1, order)
        attended = self.look_back(kept, aligned_BTh, keep if self.kept_keys_only else valid)
        return Shrunk(self.norm(kept + self.dropout(attended)), mask, order)


def run_starts(labels_BT: Tensor) -> Tensor:
    """True where a run of equal labels begins; the first frame always does: [B, T]."""
    starts = torch.ones_like(labels_BT, dtype=torch.bool)
    starts[:, 1:] = labels_BT[:, 1:] != labels_BT[:, :-1]
    return starts


class SpeechOutput(NamedTuple):
    """What the front end hands to the LLM and to the CTC loss.

    Attributes:
        speech_BVh, mask_BV, kept_BV: see `Shrunk`.
        ctc_logits_BTC: class logits of all frames.
        frames_B: real frames of each row.
    """

    speech_BVh: Tensor
    mask_BV: Tensor
    kept_BV: Tensor
    ctc_logits_BTC: Tensor
    frames_B: Tensor


class SpeechFrontEnd(nn.Module):
    """Whisper encoder, alignment adapter, CTC head and shrink adapter in order."""

    def __init__(
        self, encoder: TrimmedWhisperEncoder, alignment: AlignmentAdapter, ctc_head: CtcHead, shrink: ShrinkAdapter
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.alignment = alignment
        self.ctc_head = ctc_head
        self.shrink = shrink

    def align(
        self, mel_BMT: Tensor, frames_B: Tensor, features_BTd: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Aligned frames `[B, T, h]`, CTC logits `[B, T, C]` and real frames `[B]`; the encoder gets no gradient."""
        if features_BTd is None:
            with torch.no_grad():
                features, encoded_B = self.encoder(mel_BMT, frames_B)
        else:
            features, encoded_B = features_BTd.to(self.alignment.projection.weight.dtype), (frames_B + 1) // 2
        aligned, aligned_B = self.alignment(features, encoded_B)
        return aligned, self.ctc_head(aligned), aligned_B

    def forward(self, mel_BMT: Tensor, frames_B: Tensor, features_BTd: Tensor | None = None) -> SpeechOutput:
        """Log-mel to speech vectors at the LLM width.

        Args:
            mel_BMT: log-mel `[B, mels, T]`; not read where `features_BTd` is given.
            frames_B: real mel frames of each row.
            features_BTd: the encoder's output for this input, `[B, T/2, d]`, where it was computed before.
        """
        aligned, logits, aligned_B = self.align(mel_BMT, frames_B, features_BTd)
        shrunk = self.shrink(aligned, aligned_B, logits.detach().argmax(-1))
        return SpeechOutput(shrunk.speech_BVh, shrunk.mask_BV, shrunk.kept_BV, logits, aligned_B)
