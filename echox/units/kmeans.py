"""Clusters speech frames by k-means, fitted by scikit-learn in mini-batches, applied in batches by torch.

Frame by frame, labels flicker between neighbouring centroids, and no text tells how. `KMeans.segment` therefore can
charge for every change of label and find the cheapest labels of a whole utterance by dynamic programming, the
duration-penalised segmentation of Kamper and van Niekerk (arXiv 2012.07551).
"""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from echox.device import best_device
from echox.errors import DataError
from echox.files import open_regular

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

FIT_BATCH = 10_000
"""Frames a mini-batch, as in the recipes HuBERT's units come from."""
FIT_INIT = 5
"""Frames a cluster that k-means++ draws its seeds from."""
PREDICT_BATCH = 65_536
_LARGEST = 256 << 20
"""Bytes that a k-means file may unpack to."""


class KMeans:
    """Nearest-centroid quantiser of standardised frames.

    Args:
        centroids_KD: float32 [clusters, features], in standardised space.
        mean_D: subtracted from every frame; None is zero.
        scale_D: what frames are then divided by; None is one.
        switch_cost: what a change of label costs in an utterance, a squared distance in standardised space; 0 takes
            the nearest centroid of each frame.
    """

    def __init__(
        self,
        centroids_KD: Floats,
        mean_D: Floats | None = None,
        scale_D: Floats | None = None,
        switch_cost: float = 0.0,
    ) -> None:
        if centroids_KD.ndim != 2 or not 0 < len(centroids_KD) <= 65_536 or not np.isfinite(centroids_KD).all():
            raise DataError(
                f"Centroids of shape {list(centroids_KD.shape)} are not 1 to 65,536 rows of finite numbers",
                fix="Fit the units again.",
            )
        self.centroids_KD = np.ascontiguousarray(centroids_KD, dtype=np.float32)
        width = centroids_KD.shape[1]
        self.mean_D = np.zeros(width, np.float32) if mean_D is None else np.asarray(mean_D, np.float32)
        self.scale_D = np.ones(width, np.float32) if scale_D is None else np.asarray(scale_D, np.float32)
        self.switch_cost = float(switch_cost)

    @property
    def clusters(self) -> int:
        """Number of clusters K."""
        return len(self.centroids_KD)

    @property
    def width(self) -> int:
        """Features a frame."""
        return int(self.centroids_KD.shape[1])

    @property
    def sha256(self) -> str:
        """SHA-256 of the centroids, little-endian float32 row by row.

        Then mean and scale, unless all are 0 and 1, and the switch cost, unless it is 0.
        """
        tables = [self.centroids_KD]
        if self.mean_D.any() or (self.scale_D != 1).any():
            tables += [self.mean_D, self.scale_D]
        if self.switch_cost:
            tables.append(np.array([self.switch_cost]))
        return hashlib.sha256(b"".join(table.astype("<f4").tobytes() for table in tables)).hexdigest()

    @classmethod
    def fit(cls, frames_ND: Floats, clusters: int, *, seed: int = 0, max_iter: int = 12, switch: float = 0.0) -> KMeans:
        """Fit with k-means++ seeding on mini-batches of frames scaled to unit variance.

        Without the scaling a few channels of a transformer's hidden states, a hundred times larger than the rest,
        would decide alone: units of a Whisper layer then explain half as much of the spectrum.

        Args:
            frames_ND: float32 [frames, features].
            clusters: K.
            seed: of seeding and batches.
            max_iter: most passes over the frames; it stops earlier once 10 mini-batches bring no gain.
            switch: what a change of label costs, in mean squared distances of a frame from its centroid.

        Raises:
            DataError: fewer frames than clusters.
        """
        from sklearn.cluster import MiniBatchKMeans

        if len(frames_ND) < clusters:
            raise DataError(
                f"{len(frames_ND)} frames are too few for {clusters} clusters",
                fix="Give more audio or ask for fewer clusters.",
            )
        model = MiniBatchKMeans(
            clusters,
            init="k-means++",
            batch_size=FIT_BATCH,
            # Seeding costs clusters times samples; the default, three batches, would take longer than the fit.
            init_size=min(len(frames_ND), max(FIT_INIT * clusters, 1000)),
            max_iter=max_iter,
            n_init=1,
            max_no_improvement=10,
            random_state=seed,
        )
        mean_D = frames_ND.mean(0, dtype=np.float64).astype(np.float32)
        scale_D = np.maximum(frames_ND.std(0, dtype=np.float64), 1e-6).astype(np.float32)
        model.fit((frames_ND - mean_D) / scale_D)
        cost = switch * float(model.inertia_) / len(frames_ND)
        return cls(np.asarray(model.cluster_centers_, dtype=np.float32), mean_D, scale_D, cost)

    def predict(self, frames_ND: Floats) -> NDArray[np.uint16]:
        """Nearest centroid of each frame by Euclidean distance; uint16 [frames]."""
        import torch

        if frames_ND.ndim != 2 or frames_ND.shape[1] != self.centroids_KD.shape[1]:
            raise DataError(
                f"Frames of shape {list(frames_ND.shape)} do not fit centroids of width {self.centroids_KD.shape[1]}",
                fix="Use the features the units were fitted on.",
            )
        device = best_device()
        centroids_KD = torch.from_numpy(self.centroids_KD).to(device)
        mean_D, scale_D = torch.from_numpy(self.mean_D).to(device), torch.from_numpy(self.scale_D).to(device)
        # |x - c|^2 without the term |x|^2, which is the same for every centroid.
        half_norm_K = centroids_KD.square().sum(1) / 2
        labels_N = np.zeros(len(frames_ND), dtype=np.uint16)
        for start in range(0, len(frames_ND), PREDICT_BATCH):
            part_ND = torch.from_numpy(np.ascontiguousarray(frames_ND[start : start + PREDICT_BATCH], np.float32))
            part_ND = (part_ND.to(device) - mean_D) / scale_D
            nearest = torch.addmm(half_norm_K, part_ND, centroids_KD.T, alpha=-1).argmin(1)
            labels_N[start : start + PREDICT_BATCH] = nearest.cpu().numpy()
        return labels_N

    def segment(self, frames_TD: Floats) -> NDArray[np.uint16]:
        """Labels of one utterance, uint16 [frames]: those of least distance and switch cost together.

        Ties go to the lower label, and to staying.
        """
        if not self.switch_cost or len(frames_TD) == 0:
            return self.predict(frames_TD)
        standard_TD = (np.asarray(frames_TD, np.float32) - self.mean_D) / self.scale_D
        half_TK = np.square(self.centroids_KD).sum(1) / 2 - standard_TD @ self.centroids_KD.T
        cost_TK = 2 * half_TK  # the term |x|^2 is the same for every centroid
        stays_TK = np.ones(cost_TK.shape, dtype=bool)
        from_T = np.zeros(len(cost_TK), dtype=np.int64)
        total_K = cost_TK[0]
        for frame in range(1, len(cost_TK)):
            from_T[frame] = total_K.argmin()
            switched = total_K[from_T[frame]] + np.float32(self.switch_cost)
            stays_TK[frame] = total_K <= switched
            total_K = np.minimum(total_K, switched) + cost_TK[frame]
        labels_T = np.zeros(len(cost_TK), dtype=np.uint16)
        label = int(total_K.argmin())
        for frame in range(len(cost_TK) - 1, -1, -1):
            labels_T[frame] = label
            if not stays_TK[frame, label]:
                label = int(from_T[frame])
        return labels_T

    def save(self, path: str | Path, **extra: str) -> None:
        """Write one `.npz`: the centroids and any texts that go with them."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays: dict[str, Any] = {
            "centroids": self.centroids_KD,
            "mean": self.mean_D,
            "scale": self.scale_D,
            "switch_cost": np.array(self.switch_cost),
            **{name: np.array(text) for name, text in extra.items()},
        }
        with path.open("wb") as file:
            np.savez(file, **arrays)

    @classmethod
    def load(cls, path: str | Path) -> KMeans:
        """Read what `save` wrote.

        Raises:
            DataError: no such file, or no centroids in it.
        """
        centroids_KD, mean_D, scale_D = (read_npz(path, name) for name in ("centroids", "mean", "scale"))
        return cls(centroids_KD, mean_D, scale_D, _switch_cost(path))


def _switch_cost(path: str | Path) -> float:
    """Of a file; 0 where it was made before there was one."""
    with np.load(Path(path), allow_pickle=False) as file:
        return float(file["switch_cost"]) if "switch_cost" in file else 0.0


def read_npz(path: str | Path, name: str) -> Any:
    """One array of a `.npz` file.

    Raises:
        DataError: no such file, not an npz, or no such array.
    """
    try:
        with open_regular(Path(path)) as descriptor, open(descriptor, "rb", closefd=False) as opened:
            with zipfile.ZipFile(opened) as archive:
                size = sum(member.file_size for member in archive.infolist())
            if size > _LARGEST:
                raise ValueError(f"it unpacks to {size:,} bytes")
            opened.seek(0)
            with np.load(opened, allow_pickle=False) as file:
                return file[name]
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise DataError(
            f"Cannot read {name} of the k-means file: {type(error).__name__} {error}",
            where=str(path),
            fix="Make it with `echox units fit`.",
        ) from error
    except Exception as error:
        # zipfile.BadZipFile, which numpy lets through for a truncated file, is no OSError.
        raise DataError(f"The k-means file is damaged: {error}", where=str(path), fix="Fit the units again.") from error
