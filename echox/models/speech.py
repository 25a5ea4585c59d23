"""Encodes speech to LLM-width vectors: frozen Whisper encoder, alignment adapter with CTC head, shrink with look-back.

Follows Soundwave (arXiv 2502.12900), the first stage of EchoX; sizes are Whisper's and the LLM's own.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from echox.models.attention import Attention, EncoderBlock
from echox.models.chunked_heads import Head, best_classes, class_scores, expected_rows
from echox.models.packed_attention import use_packed_attention
from echox.models.ragged import Layout, Rows, lengths_to_mask, rows_of


class TrimmedWhisperEncoder(nn.Module):
    """A Hugging Face Whisper encoder that accepts any number of mel frames.

    Only the first T rows of the position table are needed, so trimmed input costs in proportion to its length. Frames
    beyond a clip's own length are zeroed before each convolution and masked in attention: the features of a clip do not
    depend on the other clips of its batch. The convolutions are a few percent of the work and run padded.

    What is longer than the position table (3,000 mel frames, 30 s) is encoded in windows of that size, each as a row of
    its own that begins at position 0 and sees no other, and joined again. A window has an even number of mel frames, so
    encoder frame t begins at t / 50 s in any of them.

    Args:
        encoder: `WhisperModel.encoder` of transformers, in eval mode.
        layout: of the windows in the Transformer layers.
        input_mode: "trim" masks what lies behind a clip. "pad_30s" and "all_30s" compute `encoder` as it was
            pretrained: it gets whole windows, the log-mel of the silence in them included, attends to all 1,500 frames,
            and only then are those of the clip handed on, which are all of them where the silence counts too.
    """

    def __init__(
        self,
        encoder: Any,
        layout: Layout = "packed",
        *,
        input_mode: Literal["trim", "pad_30s", "all_30s"] = "trim",
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.layout: Layout = layout
        self.input_mode = input_mode
        self.width = int(encoder.config.d_model)
        self.window = 2 * int(encoder.config.max_source_positions)
        if layout == "packed":
            use_packed_attention(encoder)

    def forward(
        self, mel_BMT: Tensor, frames_B: Tensor, frames_on_host_B: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """`[B, mels, T]` with `frames_B` real mel frames each to features `[B, T/2, d]` and their real frames `[B]`.

        In modes of whole windows the features end with those of the longest clip.

        `frames_on_host_B`: the same numbers on the CPU, so that packing need not wait for the device.

        Raises:
            ValueError: a mode of whole windows, and T is not a multiple of one.
        """
        columns = mel_BMT.shape[2]
        if self.input_mode != "trim" and columns % self.window:
            raise ValueError(
                f"{self.input_mode} needs log-mel of whole windows of {self.window} frames, and this has {columns}"
            )
        encode = self._encode if columns <= self.window else self._in_windows
        features_BTd, encoded_B = encode(mel_BMT, frames_B, frames_on_host_B), encoded_frames(frames_B)
        if self.input_mode != "trim":  # what follows need not compute on the silence behind the longest clip
            known_B = encoded_B if frames_on_host_B is None else encoded_frames(frames_on_host_B)
            features_BTd = features_BTd[:, : int(known_B.max())]  # host sync, where not known
        return features_BTd, encoded_B

    def _in_windows(self, mel_BMT: Tensor, frames_B: Tensor, frames_on_host_B: Tensor | None) -> Tensor:
        """Features `[B, T/2, d]` of rows of several windows; windows in which a row has no frame are not computed."""
        batch, _, columns = mel_BMT.shape
        windows = -(-columns // self.window)

        def of_windows(frames_B: Tensor) -> Tensor:
            starts_W = torch.arange(0, windows * self.window, self.window, device=frames_B.device)
            return (frames_B[:, None] - starts_W).clamp(0, self.window).flatten()

        frames_on_host_K = of_windows(
            frames_B.cpu() if frames_on_host_B is None else frames_on_host_B
        )  # host sync, where not known
        on_host_K = frames_on_host_K.nonzero()[:, 0]
        used_K = on_host_K.to(mel_BMT.device, non_blocking=True)
        padded_BMT = F.pad(mel_BMT, (0, windows * self.window - columns))
        mel_KMT = padded_BMT.unflatten(2, (windows, self.window)).transpose(1, 2).flatten(0, 1)[used_K]
        features_KTd = self._encode(mel_KMT, of_windows(frames_B)[used_K], frames_on_host_K[on_host_K])
        all_KTd = features_KTd.new_zeros(batch * windows, *features_KTd.shape[1:])
        all_KTd = all_KTd.index_copy(0, used_K, features_KTd)
        return all_KTd.view(batch, -1, self.width)[:, : (columns + 1) // 2]

    def _encode(self, mel_BMT: Tensor, frames_B: Tensor, frames_on_host_B: Tensor | None) -> Tensor:
        """Features `[B, T/2, d]` of rows of one window at most."""
        if self.input_mode != "trim":
            frames_B = torch.full_like(frames_B, self.window)
            frames_on_host_B = None if frames_on_host_B is None else torch.full_like(frames_on_host_B, self.window)
        encoder = self.encoder
        mel_BMT = mel_BMT.to(encoder.conv1.weight.dtype)
        mel_mask = lengths_to_mask(frames_B, mel_BMT.shape[2])[:, None, :]
        x = F.gelu(encoder.conv1(mel_BMT * mel_mask)) * mel_mask
        x = F.gelu(encoder.conv2(x)).transpose(1, 2)
        rows = rows_of(
            encoded_frames(frames_B),
            x.shape[1],
            self.layout,
            None if frames_on_host_B is None else encoded_frames(frames_on_host_B),
        )
        position_ids = encoder.embed_positions(torch.arange(x.shape[1], device=x.device))
        x = rows.from_padded(x + position_ids)
        attention = rows.bidirectional(x.dtype)
        for layer in encoder.layers:
            out = layer(x, **attention)
            x = out[0] if isinstance(out, tuple) else out
        features: Tensor = rows.to_padded(encoder.layer_norm(x))
        return features


def encoded_frames(frames_B: Tensor) -> Tensor:
    """Frames that the encoder makes of this many mel frames."""
    return (frames_B + 1) // 2


class AlignmentAdapter(nn.Module):
    """Stack frames, project to the LLM width, one encoder layer, LayerNorm: `[B, T, d]` to T/stack frames a row."""

    def __init__(
        self,
        *,
        encoder_width: int,
        width: int,
        heads: int,
        ffn: int,
        stack: int,
        dropout: float,
        frame_local: bool,
        layout: Layout = "packed",
    ) -> None:
        super().__init__()
        self.layout: Layout = layout
        self.stack = stack
        self.frame_local = frame_local
        self.projection = nn.Linear(encoder_width * stack, width)
        self.block = EncoderBlock(width, heads, ffn, dropout)
        self.norm = nn.LayerNorm(width)

    def forward(
        self, features_BTd: Tensor, frames_B: Tensor, frames_on_host_B: Tensor | None = None
    ) -> tuple[Tensor, Rows]:
        """Return the aligned frames and their layout; a last partial stack is kept.

        `frames_on_host_B`: the same numbers on the CPU, so that packing need not wait for the device.
        """
        batch, frames, width = features_BTd.shape
        features_BTd = features_BTd * lengths_to_mask(frames_B, frames)[:, :, None]
        features_BTd = F.pad(features_BTd, (0, 0, 0, -frames % self.stack))
        stacked = features_BTd.reshape(batch, -1, width * self.stack)
        rows = rows_of(
            self._stacks(frames_B),
            stacked.shape[1],
            self.layout,
            None if frames_on_host_B is None else self._stacks(frames_on_host_B),
        )
        aligned = self.norm(self.block(self.projection(rows.from_padded(stacked)), rows, frame_local=self.frame_local))
        return aligned, rows

    def _stacks(self, frames_B: Tensor) -> Tensor:
        return (frames_B + self.stack - 1) // self.stack


LOGIT_STD = 3.0


class CtcHead(nn.Module):
    """Linear map from aligned frames to CTC classes; class 0 is the blank, class i > 0 is LLM token `tokens[i]`.

    Args:
        width: LLM width h.
        tokens: LLM token id of each class; the first is the audio placeholder that serves as blank.
        vocabulary: size of the LLM's vocabulary.

    Attributes:
        complete: whether every token has a class.
    """

    tokens: Tensor

    def __init__(self, width: int, tokens: Tensor, vocabulary: int) -> None:
        super().__init__()
        self.linear = Head(width, len(tokens), bias=False)
        self.vocabulary = vocabulary
        self.complete = len(tokens) > vocabulary
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
        """CTC class of each LLM token; a token without a class gets that of the blank."""
        table = torch.zeros(self.vocabulary + 1, dtype=torch.long, device=tokens_BC.device)
        table[self.tokens] = torch.arange(len(self.tokens), device=tokens_BC.device)
        return table[tokens_BC]

    def forward(self, aligned_BTh: Tensor, frames: Rows, tokens_BC: Tensor | None = None) -> CtcScores:
        """The class of each frame, and what CTC reads of its logits where the row says `tokens_BC`.

        Args:
            aligned_BTh: frames in the layout `frames`.
            frames: that layout; rows behind the B that say something are not scored.
            tokens_BC: LLM tokens of the transcripts; None where only the classes of the frames are wanted.
        """
        flat_Th = aligned_BTh.flatten(0, 1)
        if tokens_BC is None:
            return CtcScores(best_classes(self.linear, flat_Th).view(aligned_BTh.shape[:2]))
        classes_BC = self.classes(tokens_BC)
        unheard = len(frames.lengths_N) - len(classes_BC)
        classes_NS = F.pad(classes_BC, (1, 0, 0, unheard))  # class 0, the blank, comes first
        classes_BTS = frames.broadcast(classes_NS).expand(*aligned_BTh.shape[:2], -1)
        found = class_scores(self.linear, flat_Th, classes_BTS.flatten(0, 1))
        normaliser_BT, best_BT = (part.view(aligned_BTh.shape[:2]) for part in (found.normaliser, found.best))
        return CtcScores(best_BT, classes_BC, normaliser_BT, found.chosen.view(classes_BTS.shape), self.complete)

    def expected(self, aligned_BVh: Tensor, table_Ch: Tensor) -> Tensor:
        """The mean of the words' rows of a table under the classes' probabilities; the blank stands for no word."""
        return expected_rows(self.linear, aligned_BVh.flatten(0, 1), table_Ch, 1).view(*aligned_BVh.shape[:2], -1)


class CtcScores(NamedTuple):
    """What is read of the CTC logits of all frames, in their layout.

    Attributes:
        labels: the most probable class of each frame.
        classes_BC: class of each transcript token.
        normaliser: logarithm of the sum of exponentials over all classes.
        chosen: logits of the blank and of the row's `classes_BC`, `[..., C + 1]`.
        complete: whether every token has a class.
    """

    labels: Tensor
    classes_BC: Tensor | None = None
    normaliser: Tensor | None = None
    chosen: Tensor | None = None
    complete: bool = False


class Shrunk(NamedTuple):
    """Speech vectors, their layout, and the frame each was made of, counted in its row."""

    speech: Tensor
    rows: Rows
    kept: Tensor


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

    def forward(self, aligned_BTh: Tensor, frames: Rows, labels_BT: Tensor) -> Shrunk:
        """Shrink `[B, T, h]` with labels `[B, T]`, blank 0, both in the layout `frames` (one host sync)."""
        keep = run_starts(labels_BT, frames)
        if self.drop_blanks:
            keep = keep & (labels_BT != 0)
            keep = keep | ((frames.positions == 0) & frames.broadcast(frames.count(keep) == 0))
        rows, positions = frames.subset(keep)
        kept = frames.gather(aligned_BTh, positions, rows)
        memory = (kept, rows) if self.kept_keys_only else (aligned_BTh, frames)
        attended = self.look_back(kept, memory[0], rows, memory[1])
        return Shrunk(self.norm(kept + self.dropout(attended)), rows, positions)


def run_starts(labels_BT: Tensor, rows: Rows) -> Tensor:
    """True where a run of equal labels begins; the first frame of a row always does: [B, T]."""
    starts = rows.positions == 0
    starts[:, 1:] |= labels_BT[:, 1:] != labels_BT[:, :-1]
    return starts


class SpeechOutput(NamedTuple):
    """What the front end hands to the LLM and to the CTC loss.

    Attributes:
        speech, rows, kept: see `Shrunk`.
        aligned: all frames.
        ctc: what is read of their CTC logits.
        frames: layout of the frames.
    """

    speech: Tensor
    rows: Rows
    kept: Tensor
    aligned: Tensor
    ctc: CtcScores
    frames: Rows

    def padded(self) -> tuple[Tensor, Tensor]:
        """Speech vectors `[B, v, h]` and the mask of real ones."""
        return self.rows.to_padded(self.speech), lengths_to_mask(self.rows.lengths_N, self.rows.size)


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
        self,
        mel_BMT: Tensor,
        frames_B: Tensor,
        features_BTd: Tensor | None = None,
        frames_on_host_B: Tensor | None = None,
        *,
        tokens_BC: Tensor | None = None,
    ) -> tuple[Tensor, CtcScores, Rows]:
        """Aligned frames, their CTC scores, and the layout of both; the encoder gets no gradient."""
        if features_BTd is None:
            with torch.no_grad():
                features, encoded_B = self.encoder(mel_BMT, frames_B, frames_on_host_B)
        else:
            features, encoded_B = features_BTd.to(self.alignment.projection.weight.dtype), encoded_frames(frames_B)
        encoded_on_host_B = None if frames_on_host_B is None else encoded_frames(frames_on_host_B)
        aligned, frames = self.alignment(features, encoded_B, encoded_on_host_B)
        return aligned, self.ctc_head(aligned, frames, tokens_BC), frames

    def forward(
        self,
        mel_BMT: Tensor,
        frames_B: Tensor,
        features_BTd: Tensor | None = None,
        frames_on_host_B: Tensor | None = None,
        *,
        tokens_BC: Tensor | None = None,
    ) -> SpeechOutput:
        """Log-mel to speech vectors at the LLM width.

        Args:
            mel_BMT: log-mel `[B, mels, T]`; not read where `features_BTd` is given.
            frames_B: real mel frames of each row.
            features_BTd: the encoder's output for this input, `[B, T/2, d]`, where it was computed before.
            frames_on_host_B: `frames_B` on the CPU, so that packing need not wait for the device.
            tokens_BC: what is said in the first B rows, for the CTC loss; None for none.
        """
        aligned, ctc, frames = self.align(mel_BMT, frames_B, features_BTd, frames_on_host_B, tokens_BC=tokens_BC)
        shrunk = self.shrink(aligned, frames, ctc.labels)
        return SpeechOutput(shrunk.speech, shrunk.rows, shrunk.kept, aligned, ctc, frames)
