"""Extracts units from speech: features, nearest centroids, consecutive duplicates removed."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from echox.errors import DataError
from echox.units.features import FeatureConfig, FrameFeatures, load_features
from echox.units.kmeans import KMeans, read_npz

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]
    Units = NDArray[np.uint16]
    Progress = Callable[[str, int, int], None]

FILE = "kmeans.npz"
_GROUP = 64


def collapse(labels_T: Units) -> tuple[Units, Units]:
    """Runs of equal labels: the label of each and its length in frames.

    Raises:
        DataError: a run longer than 65,535 frames, 22 minutes at 50 frames a second.
    """
    if len(labels_T) == 0:
        return np.zeros(0, np.uint16), np.zeros(0, np.uint16)
    starts = np.flatnonzero(np.concatenate([[True], labels_T[1:] != labels_T[:-1]]))
    durations = np.diff(np.append(starts, len(labels_T)))
    if durations.max() > 65_535:
        raise DataError(f"One unit lasts {durations.max()} frames, more than 65,535", fix="Cut the recording.")
    return labels_T[starts].astype(np.uint16), durations.astype(np.uint16)


def expand(units: Units, durations: Units) -> Units:
    """Inverse of `collapse`: each unit as often as it lasts."""
    return np.repeat(units, durations)


class UnitExtractor:
    """Features and centroids that belong together.

    Args:
        features: frame features.
        kmeans: centroids of the same width.
    """

    def __init__(self, features: FrameFeatures, kmeans: KMeans) -> None:
        self.features = features
        self.kmeans = kmeans

    @property
    def n_units(self) -> int:
        """Number of units K."""
        return self.kmeans.clusters

    @property
    def frame_rate(self) -> float:
        """Frames a second, the unit of durations."""
        return self.features.frame_rate

    def extract(self, audio: Sequence[Floats], progress: Progress | None = None) -> list[tuple[Units, Units]]:
        """Units and their durations in frames of 16 kHz mono clips.

        Args:
            audio: float32 [samples] each.
            progress: called with (what, done, of).

        Raises:
            DataError: an empty clip.
        """
        order = sorted(range(len(audio)), key=lambda index: len(audio[index]))
        found: dict[int, tuple[Units, Units]] = {}
        for start in range(0, len(order), _GROUP):
            group = order[start : start + _GROUP]
            for index, frames_TD in zip(group, self.features([audio[index] for index in group]), strict=True):
                found[index] = collapse(self.kmeans.predict(frames_TD))
            if progress is not None:
                progress("extract units", len(found), len(audio))
        return [found[index] for index in range(len(audio))]

    def save(self, folder: str | Path) -> None:
        """Write `kmeans.npz`, which holds the centroids and names the features."""
        self.kmeans.save(Path(folder) / FILE, features=json.dumps(asdict(self.features.config)))

    @classmethod
    def load(cls, folder: str | Path) -> UnitExtractor:
        """Read what `save` wrote and open the feature model it names.

        Raises:
            DataError: no readable `kmeans.npz` in the folder.
            MissingModelError: the feature model is not there.
        """
        path = Path(folder) / FILE
        config = FeatureConfig(**json.loads(str(read_npz(path, "features"))))
        return cls(load_features(config), KMeans.load(path))


def fit_extractor(
    audio: Sequence[Floats],
    config: FeatureConfig,
    clusters: int,
    *,
    seed: int = 0,
    max_frames: int = 400_000,
    progress: Progress | None = None,
) -> UnitExtractor:
    """Fit k-means on the frames of clips.

    Args:
        audio: float32 [samples] each, 16 kHz mono.
        config: the features.
        clusters: number of units K.
        seed: of k-means, and of the choice of clips where there are more frames than `max_frames`.
        max_frames: most frames to fit on; 400,000 are 2.2 hours.
        progress: called with (what, done, of).

    Raises:
        DataError: fewer frames than clusters, or an empty clip.
    """
    features = load_features(config)
    order = np.random.default_rng(seed).permutation(len(audio)).tolist()
    frames: list[Floats] = []
    total = 0
    for start in range(0, len(order), _GROUP):
        if total >= max_frames:
            break
        for part in features([audio[index] for index in order[start : start + _GROUP]]):
            frames.append(part)
            total += len(part)
        if progress is not None:
            progress("frames for k-means", min(start + _GROUP, len(order)), len(order))
    if not frames:
        raise DataError("No audio to fit units on", fix="Give at least one recording.")
    return UnitExtractor(features, KMeans.fit(np.concatenate(frames)[:max_frames], clusters, seed=seed))


def fit_units(
    audio: Sequence[Floats],
    model: str,
    layer: int,
    clusters: int,
    folder: str | Path,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> UnitExtractor:
    """Fit units on a Whisper encoder layer and save them.

    Args:
        audio: float32 [samples] each, 16 kHz mono.
        model: Whisper folder, or its name below the cache; stored as given.
        layer: encoder block whose output is clustered, counted from 1.
        clusters: number of units K.
        folder: where `kmeans.npz` goes.
        seed: of k-means.
        progress: called with (what, done, of).
    """
    config = FeatureConfig(kind="whisper", model=model, layer=layer)
    extractor = fit_extractor(audio, config, clusters, seed=seed, progress=progress)
    extractor.save(folder)
    return extractor
