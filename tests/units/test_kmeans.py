"""k-means against scikit-learn, and the units that come of it."""

from __future__ import annotations

import itertools
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


def _cheapest(model: KMeans, utterance: np.ndarray) -> tuple[float, tuple[int, ...]]:
    """The best of all labellings, one by one."""
    distance = ((((utterance - model.mean_D) / model.scale_D)[:, None] - model.centroids_KD) ** 2).sum(-1)
    every = itertools.product(range(model.clusters), repeat=len(utterance))
    return min(
        (
            sum(distance[at, label] for at, label in enumerate(row))
            + model.switch_cost * np.count_nonzero(np.diff(row)),
            row,
        )
        for row in every
    )


def test_segments_are_the_cheapest_of_all_labellings() -> None:
    random = np.random.default_rng(2)
    switched = 0
    for case in range(12):
        model = KMeans(
            random.normal(size=(3, 4)),
            random.normal(size=4),
            random.uniform(0.5, 2, 4),
            switch_cost=0.6 * (1 + case % 3),
        )
        utterance = random.normal(size=(6, 4)).astype(np.float32)
        labels = tuple(model.segment(utterance).tolist())
        assert labels == _cheapest(model, utterance)[1]
        switched += labels != tuple(model.predict(utterance).tolist())
    assert switched > 3, "the cost should matter in some of them"


def test_a_switch_cost_makes_segments_longer_is_saved_and_is_another_unit_set(tmp_path: Path) -> None:
    data = frames(count=400)
    plain, dear = KMeans.fit(data, 20), KMeans.fit(data, 20, switch=2.0)
    changes = [np.count_nonzero(np.diff(model.segment(data).astype(int))) for model in (plain, dear)]
    assert (plain.segment(data) == plain.predict(data)).all() and changes[1] < changes[0]
    dear.save(tmp_path / "kmeans.npz")
    again = KMeans.load(tmp_path / "kmeans.npz")
    assert again.switch_cost == dear.switch_cost > 0 and (again.segment(data) == dear.segment(data)).all()
    assert again.sha256 == dear.sha256 != plain.sha256


def test_a_file_from_before_there_was_a_switch_cost_has_none(tmp_path: Path) -> None:
    model = KMeans.fit(frames(count=100), 5)
    np.savez(tmp_path / "old.npz", centroids=model.centroids_KD, mean=model.mean_D, scale=model.scale_D)
    assert KMeans.load(tmp_path / "old.npz").switch_cost == 0
