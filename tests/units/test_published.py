"""Published centroids: every accepted format, nothing executed, everything else refused."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
import torch
from joblib import numpy_pickle
from sklearn.cluster import KMeans as ScikitKMeans
from sklearn.cluster import MiniBatchKMeans
from transformers import HubertConfig, HubertModel

from echox.audio.io import write_audio
from echox.cli import main
from echox.errors import DataError
from echox.files import sha256_file
from echox.units.extract import UnitExtractor, unit_set_of
from echox.units.features import FeatureConfig, frame_width, load_features
from echox.units.identity import read_unit_set
from echox.units.kmeans import KMeans
from echox.units.published import read_published
from shards.corpora.speech_instruct import UNIT_SET

FRAMES = np.random.default_rng(0).normal(size=(300, 16)).astype(np.float32)


def fitted(kind: Any = MiniBatchKMeans, **options: Any) -> Any:
    return kind(6, **{"random_state": 0, **options}).fit(FRAMES)


class OldWrapper(numpy_pickle.NumpyArrayWrapper):
    """As joblib wrote it before 1.2, when the centroids of mHuBERT were published: without alignment."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        del self.numpy_array_alignment_bytes


OldWrapper.__module__, OldWrapper.__qualname__ = "joblib.numpy_pickle", "NumpyArrayWrapper"


def dump(value: Any, path: Path, monkeypatch: pytest.MonkeyPatch, *, old: bool, protocol: int) -> Path:
    with monkeypatch.context() as patch:
        if old:
            patch.setattr(numpy_pickle, "NumpyArrayWrapper", OldWrapper)
        joblib.dump(value, path, protocol=protocol)
    return path


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize(
    "model",
    [
        fitted(compute_labels=False),
        fitted(),
        fitted(ScikitKMeans),
        fitted(ScikitKMeans, init=FRAMES[:6], n_init=1),
        fitted(random_state=np.random.RandomState(3)),
    ],
    ids=["fairseq", "with labels", "k-means", "arrays before it", "random state"],
)
def test_a_dump_of_scikit_learn_is_read_as_joblib_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Any, old: bool, protocol: int
) -> None:
    path = dump(model, tmp_path / "km.bin", monkeypatch, old=old, protocol=protocol)
    assert (b"numpy_array_alignment_bytes" in path.read_bytes()) is not old
    expected = joblib.load(path).cluster_centers_
    assert expected.dtype == np.float32
    found = read_published(path)
    np.testing.assert_array_equal(found.centroids_KD, expected)
    assert not found.mean_D.any() and (found.scale_D == 1).all()


def test_plain_arrays_are_read(tmp_path: Path) -> None:
    table = FRAMES[:6]
    np.save(tmp_path / "a.npy", table)
    np.save(tmp_path / "b.npy", np.asfortranarray(table.astype(np.float64)))
    np.savez(tmp_path / "c.npz", table)
    np.savez(tmp_path / "d.npz", cluster_centers_=table, counts=np.arange(6))
    np.savez(tmp_path / "e.npz", centroids=table, counts=np.arange(6))
    joblib.dump(table, tmp_path / "f.bin")
    joblib.dump(np.asfortranarray(table), tmp_path / "g.bin")
    hashes = set()
    for path in sorted(tmp_path.iterdir()):
        np.testing.assert_array_equal(read_published(path).centroids_KD, table)
        hashes.add(read_published(path).sha256)
    assert len(hashes) == 1
    own = KMeans(table, np.ones(16, np.float32), np.full(16, 2, np.float32))
    own.save(tmp_path / "kmeans.npz", features="{}")
    assert read_published(tmp_path / "kmeans.npz").sha256 == own.sha256


class Evil:
    """What a pickle can do: call anything."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (Path.touch, (self.mark,))


def test_nothing_in_a_dump_is_executed(tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    model = fitted()
    model.more = Evil(mark)
    joblib.dump(model, tmp_path / "km.bin")
    np.testing.assert_array_equal(read_published(tmp_path / "km.bin").centroids_KD, model.cluster_centers_)
    (tmp_path / "evil.bin").write_bytes(pickle.dumps(Evil(mark)))
    with pytest.raises(DataError, match="no array"):
        read_published(tmp_path / "evil.bin")
    assert not mark.exists()
    joblib.load(tmp_path / "km.bin")
    assert mark.exists(), "the file would have been dangerous"


def _cut(model: Any) -> bytes:
    buffer = io.BytesIO()
    joblib.dump(model, buffer)
    return buffer.getvalue()[:700]


def _compressed(model: Any) -> bytes:
    buffer = io.BytesIO()
    joblib.dump(model, buffer, compress=3)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no known format"),
        (b"\x00" * 64, "no known format"),
        (_compressed(fitted()), "no known format"),
        (_cut(fitted()), "ends after|no end|damaged|exhausted|expected"),
        (pickle.dumps({"a": [1, 2]}), "no array"),
        (pickle.dumps({1, 2}), "opcode EMPTY_SET"),
        (b"\x80\x04.", "damaged"),
        (b"\x80\x04\x85.", "not put there"),
        (b"\x80\x04N}\x94u.", "damaged"),
    ],
)
def test_anything_else_is_refused_in_one_sentence(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "km.bin"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"no centroids to be read.*({reason}).*Nothing in a file is executed"):
        read_published(path)


@pytest.mark.parametrize("table", [np.arange(6), np.arange(6).reshape(2, 3), np.zeros((2, 2, 2)), np.array(["a"])])
def test_an_array_that_is_no_table_of_centroids_is_refused(tmp_path: Path, table: np.ndarray) -> None:
    np.save(tmp_path / "km.npy", table)
    np.savez(tmp_path / "km.npz", first=table, second=table)
    with pytest.raises(DataError, match="table of floating-point numbers"):
        read_published(tmp_path / "km.npy")
    with pytest.raises(DataError, match="first, second, of which none"):
        read_published(tmp_path / "km.npz")
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="no centroids to be read"):
        read_published(tmp_path / "objects.npy")
    with pytest.raises(DataError, match="Cannot read the centroids"):
        read_published(tmp_path / "absent.npy")


@pytest.fixture(scope="module")
def hubert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "some-hubert"
    config = HubertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, conv_dim=(8,) * 7,
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    HubertModel(config).save_pretrained(folder)
    return folder


def test_an_imported_folder_makes_units_like_a_fitted_one(
    hubert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    audio = (np.random.default_rng(0).normal(size=16_000) * 0.1).astype(np.float32)
    config = FeatureConfig(kind="hubert", model=str(hubert), layer=2)
    (frames_TD,) = load_features(config)([audio])
    model = MiniBatchKMeans(5, random_state=0).fit(frames_TD)
    joblib.dump(model, tmp_path / "km.bin")
    words = ["units", "import", str(tmp_path / "km.bin"), str(tmp_path / "units"), "--model", str(hubert)]
    assert main([*words, "--layer", "2", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    unit_set = unit_set_of(tmp_path / "units")
    assert said == {"folder": str(tmp_path / "units"), "clusters": 5, "unit_set": str(unit_set)}
    assert (unit_set.features, unit_set.model, unit_set.layer) == ("hubert", "some-hubert", 2)
    assert unit_set.weights == sha256_file(hubert / "model.safetensors")
    assert unit_set == read_unit_set(tmp_path / "units")
    write_audio(tmp_path / "a.wav", audio)
    assert main(["units", "extract", str(tmp_path / "units"), str(tmp_path / "a.wav")]) == 0
    (row,) = map(json.loads, capsys.readouterr().out.splitlines())
    labels = np.repeat(row["units"], row["durations"])
    np.testing.assert_array_equal(labels, model.predict(UnitExtractor.load(tmp_path / "units").features([audio])[0]))
    assert row["unit_set"]["centroids"] == unit_set.centroids


def test_what_cannot_be_imported_says_why(hubert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "km.npy", FRAMES[:6, :8])
    words = ["units", "import", str(tmp_path / "km.npy"), str(tmp_path / "units"), "--layer", "2", "--model"]
    assert main([*words, str(hubert)]) == 4
    assert "have 8 features, and the frames of" in capsys.readouterr().err
    assert main([*words, str(hubert), "--layer", "3"]) == 4
    assert "Layer 3" in capsys.readouterr().err
    assert main([*words, str(hubert), "--features", "whisper"]) == 4
    assert "type hubert, not whisper" in capsys.readouterr().err
    assert main([*words, str(tmp_path / "absent")]) == 3
    assert not (tmp_path / "units").exists()
    assert frame_width(FeatureConfig(kind="log_mel")) == 160


def test_imported_centroids_of_mhubert_are_those_of_speech_instruct(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = HubertConfig(
        hidden_size=16, num_hidden_layers=11, num_attention_heads=2, intermediate_size=32, conv_dim=(8,) * 7,
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    HubertModel(config).save_pretrained(tmp_path / "mhubert-base")
    np.save(tmp_path / "km.npy", np.random.default_rng(0).normal(size=(1000, 16)).astype(np.float32))
    words = ["units", "import", str(tmp_path / "km.npy"), str(tmp_path / "units")]
    words += ["--model", str(tmp_path / "mhubert-base"), "--layer"]
    found = {}
    for layer, name in (("11", UNIT_SET.model), ("11", ""), ("10", UNIT_SET.model)):
        assert main([*words, layer, "--name", name]) == 0
        found[layer, name] = unit_set_of(tmp_path / "units").conflicts(UNIT_SET)
    assert found == {("11", UNIT_SET.model): (), ("11", ""): ("model",), ("10", UNIT_SET.model): ("layer",)}
