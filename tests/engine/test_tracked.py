"""`echox train` in one process: its MLflow run is opened, fed with system metrics, and ended."""

from __future__ import annotations

import argparse
import json
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from mlflow.tracking import MlflowClient
from toy import toy_recipe

from echox import train as train_command
from echox.engine import trainer as train_module


@pytest.mark.parametrize("sampled", [True, False])
def test_system_metrics_are_sampled_where_the_recipe_asks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sampled: bool
) -> None:
    def train(recipe: Any, context: Any, build: Any, tracker: Any, **options: Any) -> Any:
        came, send = threading.Event(), tracker.log_metrics
        tracker.log_metrics = lambda metrics, step: (send(metrics, step), came.set())
        came.wait(60 if sampled else 1.5)  # the first sample comes after a second
        return SimpleNamespace(stopped="")

    monkeypatch.setattr(train_module, "train", train)
    recipe = toy_recipe("sampled", Path("ds_configs/zero3_cpu.json"), tracking__system_metrics=sampled)
    args = argparse.Namespace(accept_new_data=False, allow=[], recipe="toy")
    train_command._tracked(recipe, args, cast(Any, SimpleNamespace(rank=0, storage=tmp_path)))
    run_id = json.loads((tmp_path / "sampled" / "mlflow.json").read_text())["run_id"]
    run = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").get_run(run_id)
    assert run.info.status == "FINISHED"
    assert any(name.startswith("system/") for name in run.data.metrics) == sampled
