"""Maps units to log-mel with durations from context, and trains this half of the embedded vocoder.

For one voice. Durations: a small convolutional network gives each unit a frame count from the units around it. Mel:
units repeated for their durations, 50 frames a second; two mel frames are a linear map of the seven units around each,
solved in closed form. A convolutional network on top of that map left its error where it was (0.218 after 150 steps,
0.220 before), so there is none.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from echox.errors import DataError, MissingModelError
from echox.files import read_json
from echox.models.ragged import lengths_to_mask
from echox.units.identity import UnitSetIdentity, read_unit_set, write_unit_set

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Units = NDArray[np.uint16]
    Floats = NDArray[np.float32]

KIND = "unit_mel"
RATE = 16_000
HOP = 160
"""Samples a mel frame; two mel frames a unit frame."""
N_FFT = 1024
WINDOW = 640
N_MELS = 80
FLOOR = 1e-4
"""Least mel amplitude before the logarithm."""
CONTEXT = 3
"""Frames to either side that a mel frame depends on; 4 and 6 predict unseen speech no better."""
RIDGE = 3.0
"""Weight of the squared coefficients against the squared error."""


@dataclass(frozen=True, kw_only=True)
class UnitMelConfig:
    """Sizes.

    Attributes:
        n_units: number of units K.
        width: channels of the duration network.
        blocks: its residual blocks; each sees 2 units to either side.
        max_duration: longest predicted duration, frames of 20 ms.
    """

    n_units: int
    width: int = 128
    blocks: int = 6
    max_duration: int = 40

    def __post_init__(self) -> None:
        for name, most in (("n_units", 1 << 16), ("width", 1 << 14), ("blocks", 1 << 10), ("max_duration", 1 << 12)):
            value = getattr(self, name)
            if not isinstance(value, int) or not 0 < value <= most:
                raise ValueError(f"{name} is {value!r:.40}, not a whole number from 1 to {most}")


class ConvBlock(nn.Module):
    """Depthwise convolution over time, then a two-layer perceptron, residual (ConvNeXt, arXiv 2201.03545)."""

    def __init__(self, width: int, kernel: int = 5, widening: int = 2) -> None:
        super().__init__()
        self.depthwise = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=width)
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, widening * width)
        self.down = nn.Linear(widening * width, width)

    def forward(self, x_BTD: Tensor, mask_BT1: Tensor) -> Tensor:
        """`[B, T, D]` to the same shape; frames outside the mask are zero on the way in."""
        mixed = self.depthwise((x_BTD * mask_BT1).transpose(1, 2)).transpose(1, 2)
        return cast(Tensor, x_BTD + self.down(F.gelu(self.up(self.norm(mixed)))))


class UnitMel(nn.Module):
    """Duration network and mel map.

    Args:
        config: sizes.
    """

    map_RM: Tensor
    mean_M: Tensor
    std_M: Tensor

    def __init__(self, config: UnitMelConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.units = nn.Embedding(config.n_units, width)
        # From the usual unit variance a table would hardly move in the few hundred steps it has.
        nn.init.normal_(self.units.weight, std=0.1)
        self.blocks: Any = nn.ModuleList(ConvBlock(width) for _ in range(config.blocks))
        self.head = nn.Linear(width, config.max_duration)
        # Row k * K + u is what unit u, k - CONTEXT frames away, adds to a frame.
        self.register_buffer("map_RM", torch.zeros((2 * CONTEXT + 1) * config.n_units, 2 * N_MELS))
        self.register_buffer("mean_M", torch.zeros(N_MELS))
        self.register_buffer("std_M", torch.ones(N_MELS))

    def duration_logits(self, units_BU: Tensor, lengths_B: Tensor) -> Tensor:
        """Scores of 1, 2, … `max_duration` frames for every unit; `[B, U, max_duration]`."""
        mask_BU1 = lengths_to_mask(lengths_B, units_BU.shape[1])[..., None]
        hidden = self.units(units_BU)
        for block in self.blocks:
            hidden = block(hidden, mask_BU1)
        return cast(Tensor, self.head(hidden))

    @property
    def sees_units(self) -> int:
        """Units to either side on which a unit's duration depends."""
        return sum(block.depthwise.kernel_size[0] // 2 for block in self.blocks)

    @torch.no_grad()
    def durations(self, units: Units) -> Units:
        """Frames of each unit of one sequence: the median of what the network thinks possible."""
        if len(units) == 0:
            return np.zeros(0, np.uint16)
        units_BU = torch.from_numpy(units.astype(np.int64))[None]
        share_UD = self.duration_logits(units_BU, torch.tensor([len(units)]))[0].softmax(-1)
        median_U = 1 + (share_UD.cumsum(-1) < 0.5).sum(-1).clamp_max(self.config.max_duration - 1)
        return median_U.numpy().astype(np.uint16)

    @torch.no_grad()
    def spectrum(self, units: Units, durations: Units) -> Tensor:
        """Log-mel amplitudes `[2 * frames, mels]` of one sequence."""
        rows_TC = neighbours(spread(units, durations), self.config.n_units)
        mel_TM = F.embedding_bag(rows_TC, self.map_RM, mode="sum").reshape(-1, N_MELS)
        return mel_TM * self.std_M + self.mean_M

    def save(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors`."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {name: tensor.contiguous() for name, tensor in self.state_dict().items()}, folder / "model.safetensors"
        )
        (folder / "config.json").write_text(json.dumps({"kind": KIND, **asdict(self.config)}, indent=2) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> UnitMel:
        """Read what `save` wrote.

        Raises:
            MissingModelError: a file is absent or does not fit.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        folder = Path(folder)
        try:
            content = read_json(folder / "config.json")
            content.pop("kind")
            model = cls(UnitMelConfig(**content))
            model.load_state_dict(load_file(folder / "model.safetensors"))
        except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
            raise MissingModelError(
                f"Cannot load the vocoder: {error}", where=str(folder), fix="Train it again."
            ) from error
        return model.eval()


def mel_filters() -> Tensor:
    """Mel filters `[N_FFT / 2 + 1, mels]`, 0 to 8 kHz, Slaney's scale and norm."""
    import torchaudio

    return cast(
        Tensor,
        torchaudio.functional.melscale_fbanks(
            N_FFT // 2 + 1, 0.0, RATE / 2, N_MELS, RATE, norm="slaney", mel_scale="slaney"
        ),
    )


def log_mel(audio: Floats, frames: int, filters_FM: Tensor) -> Tensor:
    """Log-mel amplitudes `[2 * frames, mels]` of a clip whose units fill `frames` frames of 20 ms."""
    samples = torch.from_numpy(np.ascontiguousarray(audio, dtype=np.float32))
    samples = F.pad(samples, (0, max(0, 2 * frames * HOP + N_FFT - len(samples))))
    window = torch.hann_window(WINDOW)
    spectrum_FT = torch.stft(samples, N_FFT, HOP, WINDOW, window, center=True, pad_mode="constant", return_complex=True)
    return (filters_FM.T @ spectrum_FT.abs()).clamp_min(FLOOR).log().T[: 2 * frames].contiguous()


def spread(units: Units, durations: Units) -> Tensor:
    """The unit of every frame; `[T]`.

    Raises:
        DataError: units and durations of different lengths.
    """
    if len(units) != len(durations):
        raise DataError(f"{len(units)} units cannot have {len(durations)} durations")
    return torch.from_numpy(np.repeat(units.astype(np.int64), durations.astype(np.int64)))


def neighbours(frames_T: Tensor, n_units: int) -> Tensor:
    """Rows of the map for every frame, `[T, 2 * CONTEXT + 1]`; the first and last unit go on past the ends."""
    padded = torch.cat([frames_T[:1].expand(CONTEXT), frames_T, frames_T[-1:].expand(CONTEXT)])
    windows_TC = padded.unfold(0, 2 * CONTEXT + 1, 1)
    return windows_TC + n_units * torch.arange(2 * CONTEXT + 1)


def solve_map(frames: Sequence[Tensor], mels: Sequence[Tensor], n_units: int) -> Tensor:
    """Ridge regression of mel frames on the units around them: `[(2 * CONTEXT + 1) * K, 2 * mels]`."""
    import scipy.linalg
    import scipy.sparse

    columns_NC = torch.cat([neighbours(row, n_units) for row in frames]).numpy()
    count, size = len(columns_NC), (2 * CONTEXT + 1) * n_units
    indices, starts = columns_NC.reshape(-1), np.arange(count + 1) * columns_NC.shape[1]
    design = scipy.sparse.csr_matrix((np.ones(len(indices), np.float32), indices, starts), shape=(count, size))
    normal = (design.T @ design).toarray()
    normal[np.diag_indices(size)] += RIDGE
    target = torch.cat(list(mels)).reshape(count, -1).numpy()
    return torch.from_numpy(scipy.linalg.solve(normal, design.T @ target, assume_a="pos").astype(np.float32))


def fit_mel(model: UnitMel, clips: Sequence[tuple[Units, Units, Floats]]) -> None:
    """Set the mel map, and the mean and deviation of each band, from clips of the voice."""
    filters_FM = mel_filters()
    frames = [spread(units, durations) for units, durations, _ in clips]
    mels = [log_mel(audio, len(row), filters_FM) for (_, _, audio), row in zip(clips, frames, strict=True)]
    every = torch.cat(mels)
    model.mean_M.copy_(every.mean(0))
    model.std_M.copy_(every.std(0).clamp_min(1e-3))
    normalised = [(mel - model.mean_M) / model.std_M for mel in mels]
    model.map_RM.copy_(solve_map(frames, normalised, model.config.n_units))


def read_clips(folder: Path) -> list[tuple[Units, Units, Floats]]:
    """Units, durations and audio of every spoken answer in a folder of shards.

    Raises:
        DataError: a sample without units, durations or audio, or a damaged shard.
    """
    from echox.audio.io import read_audio
    from echox.stream.storage.store import read_folder

    def units(member: bytes) -> Units:
        return np.frombuffer(member, dtype="<u2")

    return [
        (units(sample["answer.units"]), units(sample["answer.durations"]), read_audio(sample["answer.flac"]))
        for sample in read_folder(folder, {"answer.units", "answer.durations", "answer.flac"})
    ]


def count_units(folder: Path, clips: Sequence[tuple[Units, Units, Floats]]) -> int:
    """Number of units K: as recorded, of the `units/kmeans.npz` beside the folder, or the largest unit seen and one."""
    from echox.units.kmeans import KMeans

    unit_set = read_unit_set(folder)
    if unit_set is not None:
        return unit_set.clusters
    beside = folder.parent / "units" / "kmeans.npz"
    if beside.is_file():
        return KMeans.load(beside).clusters
    return 1 + max((int(units.max()) for units, _, _ in clips if len(units)), default=0)


def train_vocoder(
    source: str | Path | Sequence[tuple[Units, Units, Floats]],
    folder: str | Path,
    *,
    n_units: int | None = None,
    unit_set: UnitSetIdentity | None = None,
    steps: int = 300,
    seed: int = 0,
    batch: int = 16,
    lr: float = 2e-3,
    config: UnitMelConfig | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> UnitMel:
    """Solve the mel map and train the duration network on clips of one voice, and save them.

    Args:
        source: a folder of shards with spoken answers, or units, durations in frames of 20 ms, and 16 kHz mono audio
            of each clip.
        folder: where the vocoder goes.
        n_units: number of units K; default: what `count_units` finds.
        unit_set: which units; default: what the folder of shards says.
        steps: optimizer steps of the duration network.
        seed: of weights and batches.
        batch: unit sequences a step.
        lr: peak learning rate of AdamW; warm-up over 5 % of the steps, then cosine to zero.
        config: sizes other than the default.
        progress: called after each step with (what and its loss, step, all steps).

    Raises:
        DataError: no clip with units.
    """
    place = Path(source) if isinstance(source, str | Path) else Path()
    every = read_clips(place) if isinstance(source, str | Path) else source
    clips = [clip for clip in every if len(clip[0])]
    if not clips:
        raise DataError("No clip with units to train a vocoder on", where=str(source) if place.name else "")
    config = config or UnitMelConfig(n_units=n_units or count_units(place, clips))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = UnitMel(config)
    fit_mel(model, clips)
    sequences = [torch.from_numpy(units.astype(np.int64)) for units, _, _ in clips]
    classes = [
        torch.from_numpy(np.minimum(lasting, config.max_duration).astype(np.int64) - 1) for _, lasting, _ in clips
    ]
    random = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    warm_up = max(1, steps // 20)
    pad = nn.utils.rnn.pad_sequence
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / warm_up) * 0.5 * (1 + np.cos(np.pi * step / steps))
        rows = random.choice(len(clips), batch)
        lengths_B = torch.tensor([len(sequences[row]) for row in rows])
        logits_BUD = model.duration_logits(pad([sequences[row] for row in rows], batch_first=True), lengths_B)
        target_BU = pad([classes[row] for row in rows], batch_first=True, padding_value=-100)
        loss = F.cross_entropy(logits_BUD.flatten(0, 1), target_BU.flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if progress is not None:
            progress(f"train the vocoder (duration loss {loss.item():.3f})", step + 1, steps)
    model.eval()
    write_unit_set(folder, None)  # Interrupted here, it is of unknown units rather than of those of an earlier one.
    model.save(folder)
    write_unit_set(folder, unit_set or (read_unit_set(place) if place.name else None))
    return model
