from __future__ import annotations

from pathlib import Path

import pytest

from echox.errors import RecipeError
from echox.tracking.names import batches, check_uri, default_uri, experiment_name, flatten, metric_name, tracking_uri


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("loss/s2t", "loss/s2t"),
        ("a//b", "a/b"),
        ("/a/../b/", "a/b"),
        ("lr[0]@gpu", "lr_0__gpu"),
        ("eval/real (asr)", "eval/real _asr_"),
        ("x" * 400, "x" * 250),
        ("", "unnamed"),
    ],
)
def test_metric_names_become_acceptable_to_mlflow(name: str, expected: str) -> None:
    from mlflow.utils.validation import _validate_metric_name

    assert metric_name(name) == expected
    _validate_metric_name(metric_name(name))


def test_flatten_names_leaves_by_their_path() -> None:
    tree = {"a": {"b": 1, "c": None}, "list": [1, 2], "sources": [{"p": "x"}, {"p": "y"}], "s": "text", "e": {}}
    assert flatten(tree) == {
        "a.b": "1",
        "a.c": "null",
        "list": "[1, 2]",
        "sources.0.p": "x",
        "sources.1.p": "y",
        "s": "text",
        "e": "{}",
    }


def test_batches_cover_everything_once() -> None:
    assert [list(part) for part in batches(range(7), 3)] == [[0, 1, 2], [3, 4, 5], [6]]


@pytest.mark.parametrize("uri", ["mlruns", "/data/mlruns", "file:///data/mlruns", "./x"])
def test_a_folder_is_refused_with_a_way_out(uri: str) -> None:
    with pytest.raises(RecipeError) as raised:
        check_uri(uri)
    assert "sqlite:///" in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("uri", ["sqlite:///x.db", "http://h:5000", "https://h", "postgresql://u@h/db", "databricks"])
def test_servers_and_databases_pass(uri: str) -> None:
    assert check_uri(uri) == uri


def test_the_default_lies_under_the_storage(tmp_path: Path) -> None:
    assert default_uri(tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"


def test_what_a_recipe_names_wins_over_mlflows_variables_and_these_over_the_default(tmp_path: Path) -> None:
    variables = {"MLFLOW_TRACKING_URI": "http://h:5000", "MLFLOW_EXPERIMENT_NAME": "voices"}
    assert tracking_uri("https://mine", tmp_path, variables) == "https://mine"
    assert tracking_uri(None, tmp_path, variables) == "http://h:5000"
    assert tracking_uri(None, tmp_path, {"MLFLOW_TRACKING_URI": ""}) == default_uri(tmp_path)
    with pytest.raises(RecipeError, match=r"MLFLOW_TRACKING_URI=http://\*\*\*@h holds a password"):
        tracking_uri(None, tmp_path, {"MLFLOW_TRACKING_URI": "http://me:s3cr3t@h"})
    with pytest.raises(RecipeError, match="is a folder"):
        tracking_uri(None, tmp_path, {"MLFLOW_TRACKING_URI": "mlruns"})
    assert experiment_name("mine", variables) == "mine"
    assert experiment_name("echox", variables) == "voices"
    assert experiment_name("echox", {}) == "echox"
