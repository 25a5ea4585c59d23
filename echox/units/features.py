"""Computes the frame features that units are made of, at 50 a second: a Whisper or HuBERT layer, or log-mel."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from echox.audio.batches import length_batches
from echox.device import best_device
from echox.errors import DataError
from echox.files import sha256_file

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    Floats = NDArray[np.float32]

FRAME_RATE = 50.0
"""Frames a second."""
HOP = 320
"""Samples a frame at 16 kHz."""
_RATE = 16_000
_SHORTEST = 400
"""Samples of one frame of HuBERT."""
_PIECE_S = 28
_BATCH_S = {"cpu": 60, "cuda": 240}
"""Padded seconds a batch; a GPU wants more at a time than a processor's cache holds."""
_HUBERT_BATCH_S = {"cpu": 10, "cuda": 240}
"""The same for HuBERT, whose first layers are wide: 60 s at once take 1.5 times as long on a processor."""


@dataclass(frozen=True, kw_only=True)
class FeatureConfig:
    """What a frame is.

    Attributes:
        kind: "whisper" or "hubert" (any HuBERT or mHuBERT in transformers' layout), or "log_mel".
        model: model folder, or its name below the cache; unused for log_mel.
        layer: output of which transformer block, counted from 1; unused for log_mel.
    """

    kind: Literal["whisper", "hubert", "log_mel"] = "whisper"
    model: str = "openai/whisper-base"
    layer: int = 4

    def __post_init__(self) -> None:
        if self.kind not in ("whisper", "hubert", "log_mel") or self.layer < 1:
            raise DataError(
                f"No features of kind {self.kind!r}, layer {self.layer}",
                fix="Use whisper, hubert or log_mel, and a layer from 1.",
            )


class FrameFeatures(Protocol):
    """Waveforms to frames."""

    config: FeatureConfig
    frame_rate: float

    def __call__(self, audio: Sequence[Floats]) -> list[Floats]:
        """float32 [frames, features] of each 16 kHz mono clip; frames = ceil(samples / 320), HuBERT one less."""
        ...


def load_features(config: FeatureConfig) -> FrameFeatures:
    """Open the feature extractor a configuration names.

    Raises:
        MissingModelError: no such model folder.
        DataError: the model has fewer layers.
    """
    if config.kind == "log_mel":
        return LogMelFeatures(config)
    return WhisperFeatures(config) if config.kind == "whisper" else HubertFeatures(config)


class LogMelFeatures:
    """80 log-mel bands, two frames of 10 ms stacked: 160 features."""

    frame_rate = FRAME_RATE

    def __init__(self, config: FeatureConfig) -> None:
        from echox.audio.features import LogMel

        self.config = config
        self._device = best_device()
        self._log_mel = LogMel(80, input_mode="trim").to(self._device)

    def __call__(self, audio: Sequence[Floats]) -> list[Floats]:
        """float32 [frames, 160] of each clip."""

        def stacked(audio_BN: Tensor, lengths_B: Tensor) -> Tensor:
            mel_BMT, _ = self._log_mel(audio_BN, lengths_B)
            batch, _, time = mel_BMT.shape
            frames_BTD: Tensor = mel_BMT.transpose(1, 2).reshape(batch, time // 2, -1)
            return frames_BTD

        return _in_batches(audio, stacked, self._device)


class WhisperFeatures:
    """Hidden states of one layer of a Whisper encoder on input trimmed to the clip and half a second of silence."""

    frame_rate = FRAME_RATE

    def __init__(self, config: FeatureConfig) -> None:
        import torch
        from transformers import WhisperModel

        from echox.audio.features import LogMel
        from echox.models.speech import TrimmedWhisperEncoder

        self.config = config
        encoder = WhisperModel.from_pretrained(_folder(config), dtype=torch.float32).encoder.eval()
        _check_layer(config, len(encoder.layers))
        encoder.layers = encoder.layers[: config.layer]
        # The last LayerNorm belongs to the full encoder's output.
        encoder.layer_norm = torch.nn.Identity()
        self._device = best_device()
        self._encoder = TrimmedWhisperEncoder(encoder).to(self._device)
        self._log_mel = LogMel(encoder.config.num_mel_bins, input_mode="trim", stack=1).to(self._device)

    def __call__(self, audio: Sequence[Floats]) -> list[Floats]:
        """float32 [frames, width] of each clip."""

        def encoded(audio_BN: Tensor, lengths_B: Tensor) -> Tensor:
            features_BTD: Tensor = self._encoder(*self._log_mel(audio_BN, lengths_B))[0]
            return features_BTD

        return _in_batches(audio, encoded, self._device)


class HubertFeatures:
    """Hidden states of one layer of a HuBERT, whole clips batched by length."""

    frame_rate = FRAME_RATE

    def __init__(self, config: FeatureConfig) -> None:
        import torch
        from transformers import HubertModel

        from echox.units.masked_norm import MaskedGroupNorm

        self.config = config
        self._device = best_device()
        self._model: Any = HubertModel.from_pretrained(_folder(config), dtype=torch.float32).eval().to(self._device)
        _check_layer(config, int(self._model.config.num_hidden_layers))
        first = self._model.feature_extractor.conv_layers[0]
        # A HuBERT with layer norms instead (the large ones) sees no frame but the one it normalises.
        self._norm: MaskedGroupNorm | None = None
        if isinstance(getattr(first, "layer_norm", None), torch.nn.GroupNorm):
            self._norm = first.layer_norm = MaskedGroupNorm(first.layer_norm)

    def __call__(self, audio: Sequence[Floats]) -> list[Floats]:
        """float32 [frames, width] of each clip; a clip shorter than 25 ms is padded to one frame."""
        import torch

        kernel, stride = self._model.config.conv_kernel[0], self._model.config.conv_stride[0]
        done: dict[int, Floats] = {}
        for batch in length_batches([len(clip) for clip in audio], _HUBERT_BATCH_S[self._device] * _RATE):
            lengths_B = torch.tensor([max(_SHORTEST, len(audio[index])) for index in batch])
            audio_BN = _padded([audio[index] for index in batch], int(lengths_B.max()))
            mask_BN = torch.arange(audio_BN.shape[1]) < lengths_B[:, None]
            if self._norm is not None:
                self._norm.lengths_B = ((lengths_B - kernel) // stride + 1).to(self._device)
            with torch.no_grad():
                states = self._model(
                    audio_BN.to(self._device), attention_mask=mask_BN.to(self._device), output_hidden_states=True
                ).hidden_states
            frames_B = self._model._get_feat_extract_output_lengths(lengths_B).tolist()
            for index, frames_TD, frames in zip(batch, states[self.config.layer].cpu(), frames_B, strict=True):
                done[index] = frames_TD[:frames].numpy().copy()
        return [done[index] for index in range(len(audio))]


def weights_sha256(config: FeatureConfig) -> str:
    """SHA-256 of the weight file of the features' model; over the hashes of all where there are several.

    Empty for log-mel, which has no weights.

    Raises:
        MissingModelError: no such model folder.
    """
    if config.kind == "log_mel":
        return ""
    folder = Path(_folder(config))
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    hashes = [sha256_file(path) for path in files]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def frame_width(config: FeatureConfig) -> int:
    """Features a frame, by the configuration of the model, which is not loaded.

    Raises:
        MissingModelError: no such model folder.
        DataError: the model has fewer layers, or is of another kind.
    """
    if config.kind == "log_mel":
        return 160
    from transformers import AutoConfig

    found = AutoConfig.from_pretrained(_folder(config))
    if found.model_type != config.kind:
        raise DataError(
            f"{config.model} is a model of type {found.model_type}, not {config.kind}",
            fix="Name the model whose frames were clustered, and its kind by --features.",
        )
    _check_layer(config, found.encoder_layers if config.kind == "whisper" else found.num_hidden_layers)
    return int(found.hidden_size)


def _folder(config: FeatureConfig) -> str:
    from echox.config.paths import resolve_model

    return str(resolve_model(config.model))


def _check_layer(config: FeatureConfig, layers: int) -> None:
    if config.layer > layers:
        raise DataError(
            f"Layer {config.layer} of {config.model} does not exist, it has {layers}", fix="Name a layer from 1 on."
        )


def _padded(clips: Sequence[Floats], longest: int) -> Tensor:
    import torch

    audio_BN = torch.zeros(len(clips), longest)
    for row, clip in zip(audio_BN, clips, strict=True):
        row[: len(clip)] = torch.from_numpy(np.ascontiguousarray(clip, dtype=np.float32))
    return audio_BN


class _Encode(Protocol):
    def __call__(self, audio_BN: Tensor, lengths_B: Tensor) -> Tensor: ...


def _in_batches(audio: Sequence[Floats], encode: _Encode, device: str) -> list[Floats]:
    """Run `encode` on pieces of at most 28 s, batched by similar length, and join them again."""
    import torch

    size = _PIECE_S * _RATE
    pieces = [(owner, clip[at : at + size]) for owner, clip in enumerate(audio) for at in range(0, len(clip), size)]
    done: list[Floats | None] = [None] * len(pieces)
    for batch in length_batches([len(clip) for _, clip in pieces], _BATCH_S[device] * _RATE):
        lengths_B = torch.tensor([len(pieces[index][1]) for index in batch])
        audio_BN = _padded([pieces[index][1] for index in batch], int(lengths_B.max()))
        with torch.no_grad():
            features_BTD = encode(audio_BN.to(device), lengths_B.to(device)).cpu()
        for row, index in enumerate(batch):
            done[index] = features_BTD[row, : -(-len(pieces[index][1]) // HOP)].numpy().copy()
    joined: list[list[Floats]] = [[] for _ in audio]
    for (owner, _), frames in zip(pieces, done, strict=True):
        assert frames is not None
        joined[owner].append(frames)
    if any(not parts for parts in joined):
        raise DataError("An empty clip has no frames", fix="Leave out recordings without sound.")
    return [np.concatenate(parts) for parts in joined]
