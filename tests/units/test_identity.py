"""When two unit sets are the same, when they are not, and what is said of it."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from echox.errors import CheckpointError, DataError
from echox.units.extract import identify, save_units, unit_set_of
from echox.units.features import FeatureConfig
from echox.units.identity import RECORD, UnitPart, UnitSetIdentity, check_same_unit_set, read_unit_set, write_unit_set
from echox.units.kmeans import KMeans

FULL = UnitSetIdentity(features="hubert", model="mhubert", layer=11, clusters=1000, weights="aa", centroids="bb")
NAMED = replace(FULL, weights="", centroids="")
LOG_MEL = UnitSetIdentity(features="log_mel", clusters=1000, centroids="cc")


@pytest.mark.parametrize(
    ("other", "fields"),
    [
        (FULL, ()),
        (NAMED, ()),
        (replace(FULL, features="whisper"), ("features",)),
        (replace(FULL, layer=10), ("layer",)),
        (replace(FULL, clusters=500), ("clusters",)),
        (replace(FULL, centroids="other"), ("centroids",)),
        (replace(NAMED, layer=9), ("layer",)),
        (replace(NAMED, model="hubert-base"), ("model",)),
        # The same model in a folder of another name, by its weights; or by centroids where these are not known.
        (replace(FULL, model="elsewhere"), ()),
        (replace(FULL, model="elsewhere", weights=""), ()),
        # Published centroids on the frames of a model that they are not of.
        (replace(FULL, model="hubert-base", weights="other"), ("model",)),
        # One model in two file formats.
        (replace(FULL, weights="other"), ()),
    ],
)
def test_unit_sets_differ_by_what_is_known_of_both(other: UnitSetIdentity, fields: tuple[str, ...]) -> None:
    assert FULL.conflicts(other) == other.conflicts(FULL) == fields


def test_people_can_tell_any_two_apart() -> None:
    others = [FULL, NAMED, LOG_MEL, *(replace(FULL, **{key: "x"}) for key in ("model", "weights", "centroids"))]
    for one, other in itertools.combinations(others, 2):
        assert str(one) != str(other) and one.digest != other.digest
    assert str(FULL) == f"hubert mhubert, layer 11, 1000 clusters ({FULL.digest})" and len(FULL.digest) == 8
    assert str(NAMED).endswith(f"({NAMED.digest}, known by name)")
    assert str(LOG_MEL).startswith("log_mel, 1000 clusters (")


def test_the_error_names_both_and_where_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    other = replace(FULL, centroids="other")
    parts = [UnitPart("dataset a", NAMED), UnitPart("dataset b", FULL), UnitPart("dataset c", other)]
    with pytest.raises(CheckpointError) as caught:
        check_same_unit_set(parts, fix="do this", error=CheckpointError)
    assert str(caught.value) == (
        f"dataset b has units of {FULL}, and dataset c of {other}: unit sets that differ in centroids give one id to "
        "different sounds. Fix: do this"
    )
    with pytest.raises(DataError, match=r"differ in model .*--name"):
        check_same_unit_set([UnitPart("a", FULL), UnitPart("b", replace(NAMED, model="x"))], fix="do this")
    assert capsys.readouterr().err == ""


def test_alike_they_are_the_one_that_says_most(capsys: pytest.CaptureFixture[str]) -> None:
    assert check_same_unit_set([UnitPart("a", NAMED), UnitPart("b", FULL)], fix="") == FULL
    assert check_same_unit_set([UnitPart("a", None)], fix="") is None
    assert capsys.readouterr().err == ""


def test_unknown_units_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert check_same_unit_set([UnitPart("a", None), UnitPart("b", FULL), UnitPart("c", None)], fix="") == FULL
    said = capsys.readouterr().err
    assert said.startswith("warning: no unit_set.json") and said.count("\n") == 1
    assert "which units a and c has" in said and f"those of b, {FULL}" in said
    assert check_same_unit_set([UnitPart("a", None), UnitPart("b", None)], fix="") is None
    assert capsys.readouterr().err.count("\n") == 1
    # What is known is compared whatever is not.
    with pytest.raises(DataError):
        check_same_unit_set([UnitPart("a", FULL), UnitPart("b", None), UnitPart("c", LOG_MEL)], fix="")


def test_one_model_in_two_files_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    check_same_unit_set([UnitPart("a", FULL), UnitPart("b", replace(FULL, weights="other"))], fix="")
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "model files of a" in said and "taken for one model" in said


def test_a_record_is_read_back_and_an_equal_one_keeps_its_date(tmp_path: Path) -> None:
    assert read_unit_set(tmp_path) is None
    write_unit_set(tmp_path / "new", FULL)
    path = tmp_path / "new" / RECORD
    before = path.stat().st_mtime_ns
    write_unit_set(tmp_path / "new", FULL)
    assert read_unit_set(tmp_path / "new") == FULL and path.stat().st_mtime_ns == before
    write_unit_set(tmp_path / "new", None)
    assert not path.exists()


@pytest.mark.parametrize(
    "content",
    ["{", "[]", "{}", '{"features": "hubert", "clusters": "9"}', '{"features": "x", "clusters": 2, "more": 1}'],
)
def test_a_damaged_record_is_one_sentence(tmp_path: Path, content: str) -> None:
    (tmp_path / RECORD).write_text(content)
    with pytest.raises(DataError, match="record of a unit set") as caught:
        read_unit_set(tmp_path)
    assert RECORD in caught.value.where


def test_the_hash_is_over_the_centroids_in_their_order_and_the_scaling() -> None:
    import hashlib

    table = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    published = hashlib.sha256(table.astype("<f4").tobytes()).hexdigest()
    assert KMeans(table).sha256 == KMeans(table, np.zeros(3), np.ones(3)).sha256 == published
    hashes = {KMeans(table, mean, scale).sha256 for mean in (None, np.ones(3)) for scale in (None, np.full(3, 2.0))}
    assert len({*hashes, KMeans(table[::-1]).sha256}) == 5


def test_a_folder_of_units_is_what_its_centroids_say(tmp_path: Path) -> None:
    config = FeatureConfig(kind="hubert", model="org/absent", layer=11)
    table = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    saved = save_units(tmp_path, config, KMeans(table), name="mhubert", weights="aa")
    assert saved == unit_set_of(tmp_path) == read_unit_set(tmp_path)
    assert (saved.model, saved.layer, saved.clusters, saved.weights) == ("mhubert", 11, 5, "aa")
    # Fitted again by a program that writes no record: the old one is no longer believed.
    KMeans(table + 1).save(tmp_path / "kmeans.npz", features=json.dumps(vars(config)))
    assert unit_set_of(tmp_path) == identify(config, KMeans(table + 1))
    assert unit_set_of(tmp_path).conflicts(saved) == ("model", "centroids")
    (tmp_path / RECORD).unlink()
    assert unit_set_of(tmp_path).model == "absent"
    assert identify(FeatureConfig(kind="log_mel"), KMeans(table)).model == ""
    # A model that is not there leaves its weights open.
    assert save_units(tmp_path, config, KMeans(table)).weights == ""
