"""Extracts units from speech: features, nearest centroids, consecutive duplicates removed."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from echox.errors import DataError, MissingModelError
from echox.files import parse_json
from echox.units.features import FeatureConfig, FrameFeatures, load_features, weights_sha256
from echox.units.identity import UnitSetIdentity, read_unit_set, write_unit_set
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
                found[index] = collapse(self.kmeans.segment(frames_TD))
            if progress is not None:
                progress("extract units", len(found), len(audio))
        return [found[index] for index in range(len(audio))]

    def save(self, folder: str | Path, *, weights: str | None = None) -> UnitSetIdentity:
        """Write a folder of units, see `save_units`."""
        return save_units(folder, self.features.config, self.kmeans, weights=weights)

    @classmethod
    def load(cls, folder: str | Path) -> UnitExtractor:
        """Read what `save` wrote and open the feature model it names.

        Raises:
            DataError: no readable `kmeans.npz` in the folder.
            MissingModelError: the feature model is not there.
        """
        config, kmeans = _read(folder)
        return cls(load_features(config), kmeans)


def _read(folder: str | Path) -> tuple[FeatureConfig, KMeans]:
    path = Path(folder) / FILE
    return _features(path), KMeans.load(path)


def _features(path: Path) -> FeatureConfig:
    try:
        return FeatureConfig(**parse_json(str(read_npz(path, "features"))))
    except (ValueError, TypeError) as error:
        raise DataError(
            f"The features of the k-means file cannot be read: {error}", where=str(path), fix="Fit the units again."
        ) from error


def save_units(
    folder: str | Path, config: FeatureConfig, kmeans: KMeans, *, name: str = "", weights: str | None = None
) -> UnitSetIdentity:
    """Write `kmeans.npz`, which holds the centroids and names the features, and the record of the unit set beside it.

    Args:
        folder: where they go.
        config: the features.
        kmeans: centroids of their frames.
        name: what others call the model; the last part of `config.model` if empty.
        weights: SHA-256 of the model's weights; None looks for them, empty leaves them open.

    Returns:
        The record.
    """
    if weights is None:
        try:
            weights = weights_sha256(config)
        except MissingModelError:
            weights = ""
    unit_set = identify(config, kmeans, name=name, weights=weights)
    kmeans.save(Path(folder) / FILE, features=json.dumps(asdict(config)))
    write_unit_set(folder, unit_set)
    return unit_set


def identify(config: FeatureConfig, kmeans: KMeans, *, name: str = "", weights: str = "") -> UnitSetIdentity:
    """The unit set of features and centroids; the arguments are those of `save_units`."""
    if config.kind == "log_mel":
        return UnitSetIdentity(features=config.kind, clusters=kmeans.clusters, centroids=kmeans.sha256)
    return UnitSetIdentity(
        features=config.kind,
        model=name or Path(config.model).name,
        layer=config.layer,
        clusters=kmeans.clusters,
        weights=weights,
        centroids=kmeans.sha256,
    )


def unit_set_of(folder: str | Path) -> UnitSetIdentity:
    """Which units a folder of `kmeans.npz` makes: by its centroids, whatever the record beside them says.

    The record adds the model's name and weights if it is one of these centroids.

    Raises:
        DataError: no readable `kmeans.npz` in the folder.
    """
    found, record = identify(*_read(folder)), read_unit_set(folder)
    if record is None or record.centroids != found.centroids:
        return found
    return replace(found, model=record.model, weights=record.weights)


def fit_extractor(
    audio: Sequence[Floats],
    config: FeatureConfig,
    clusters: int,
    *,
    seed: int = 0,
    max_frames: int = 400_000,
    switch: float = 0.0,
    progress: Progress | None = None,
) -> UnitExtractor:
    """Fit k-means on the frames of clips.

    Args:
        audio: float32 [samples] each, 16 kHz mono.
        config: the features.
        clusters: number of units K.
        seed: of k-means, and of the choice of clips where there are more frames than `max_frames`.
        max_frames: most frames to fit on; 400,000 are 2.2 hours.
        switch: what a change of unit costs, see `KMeans.fit`.
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
    kmeans = KMeans.fit(np.concatenate(frames)[:max_frames], clusters, seed=seed, switch=switch)
    return UnitExtractor(features, kmeans)


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
