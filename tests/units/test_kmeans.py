"""k-means against scikit-learn, and the units that come of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn.cluster import MiniBatchKMeans
from sklearn.metrics import pairwise_distances_argmin

from echox.errors import DataError
from echox.units import kmeans
from echox.units.extract import collapse, expand
from echox.units.kmeans import KMeans


def frames(seed: int = 0, count: int = 2000) -> np.ndarray:
    random = np.random.default_rng(seed)
    centers = random.normal(size=(20, 8)) * 4
    return (centers[random.integers(0, 20, count)] + random.normal(size=(count, 8))).astype(np.float32)


def test_labels_are_those_of_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kmeans, "PREDICT_BATCH", 300)
    model = KMeans.fit(frames(), 20, seed=1)
    other = frames(1)
    assert model.predict(other).dtype == np.uint16
    scaled = (other - model.mean_D) / model.scale_D
    assert (model.predict(other) == pairwise_distances_argmin(scaled, model.centroids_KD)).all()


def test_one_large_channel_does_not_decide_alone() -> None:
    data = frames()
    stretched = data * np.array([1000, 1, 1, 1, 1, 1, 1, 1], np.float32) + 5
    assert (KMeans.fit(stretched, 20).predict(stretched) == KMeans.fit(data, 20).predict(data)).mean() > 0.99


def test_fit_is_as_good_as_scikit_learn_itself() -> None:
    data = frames()
    ours = KMeans.fit(data, 20, seed=1)
    scaled = (data - data.mean(0)) / data.std(0)
    theirs = MiniBatchKMeans(20, random_state=1, n_init=10).fit(scaled)

    def inertia(centroids: np.ndarray) -> float:
        return float(((scaled[:, None] - centroids) ** 2).sum(-1).min(1).mean())

    assert inertia(ours.centroids_KD) < 1.3 * inertia(theirs.cluster_centers_)


def test_same_seed_same_centroids() -> None:
    data = frames()
    assert (KMeans.fit(data, 20, seed=3).centroids_KD == KMeans.fit(data, 20, seed=3).centroids_KD).all()


def test_save_and_load(tmp_path: Path) -> None:
    model = KMeans.fit(frames(), 20)
    model.save(tmp_path / "kmeans.npz", features="{}")
    other = frames(1)
    assert (KMeans.load(tmp_path / "kmeans.npz").predict(other) == model.predict(other)).all()


def test_bad_input_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="10 frames are too few for 20"):
        KMeans.fit(frames(count=10), 20)
    with pytest.raises(DataError, match="do not fit centroids of width 8"):
        KMeans(frames(count=30)).predict(np.zeros((3, 7), np.float32))
    with pytest.raises(DataError, match="Cannot read centroids"):
        KMeans.load(tmp_path / "absent.npz")
    KMeans(frames(count=30)).save(tmp_path / "kmeans.npz")
    content = (tmp_path / "kmeans.npz").read_bytes()
    (tmp_path / "kmeans.npz").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match="k-means file"):
        KMeans.load(tmp_path / "kmeans.npz")


def test_collapse_and_expand() -> None:
    units, durations = collapse(np.array([4, 4, 4, 1, 2, 2, 4], dtype=np.uint16))
    assert (units.tolist(), durations.tolist()) == ([4, 1, 2, 4], [3, 1, 2, 1])
    assert units.dtype == durations.dtype == np.uint16
    labels = np.random.default_rng(0).integers(0, 3, 500).astype(np.uint16)
    units, durations = collapse(labels)
    assert (expand(units, durations) == labels).all()
    assert (units[1:] != units[:-1]).all()
    assert [len(part) for part in collapse(np.zeros(0, np.uint16))] == [0, 0]
    with pytest.raises(DataError, match="lasts 70000 frames"):
        collapse(np.zeros(70_000, np.uint16))
