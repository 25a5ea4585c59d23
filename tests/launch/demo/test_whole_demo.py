"""The demo as a newcomer runs it: cut down here, whole in the slow suite."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

STAGES = ("s2t", "t2c", "echo")
QUESTIONS = ("sqa-heldout-phrasing", "sqa-heldout-knowledge")


def _demo(storage: Path, *options: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    ran = subprocess.run(
        [sys.executable, "-m", "launch.demo", "--storage", str(storage), *options],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-4000:]
    return ran, json.loads((storage / "result.json").read_text())


def _ray_processes() -> set[int]:
    names = ("raylet", "gcs_server")
    return {p.pid for p in psutil.process_iter(["name"]) if p.info["name"] in names}


@pytest.mark.timeout(1500)
def test_cut_down_demo_goes_through_every_phase(tmp_path: Path) -> None:
    before = _ray_processes()
    ran, result = _demo(tmp_path / "demo", "--quick")
    assert _ray_processes() <= before, "the demo stops the Ray head it started"
    assert {*STAGES, "assets", "corpus", "units", "vocoder", "respond", "evaluation", "report"} <= set(result["phases"])
    assert 0 < result["peak_memory_gib"] < 16
    for stage in STAGES:
        assert result["final_losses"][stage]["loss/total"] > 0
    for name in QUESTIONS:
        scores = result["sets"][name]
        assert scores["n"] == 2
        assert 0 <= scores["s2s_acc"] <= 1 and 0 <= scores["s2t_acc"] <= 1 and 0 <= scores["text_llm_acc"] <= 1
        assert scores["wer"] >= 0
        assert all(0 <= scores[key] <= 1 for key in ("s2t_strict_acc", "s2s_strict_acc", "cascade_acc", "exact"))
        assert scores["interval_95"][0] <= scores["s2s_strict_acc"] <= scores["interval_95"][1]
        assert sum(row["n"] for row in scores["relations"].values()) == scores["entity_n"] == 2
    assert result["sets"]["sqa-heldout-open"]["n"] == 2
    assert result["t2c_heldout_wer"] >= 0 and result["t2c_heldout_loss"] > 0 and result["segments_per_sample"] >= 1
    assert "<audio" in (tmp_path / "demo" / "report.html").read_text()
    shown = ran.stdout.replace("\n", " ")
    for words in ("report.html", "mlflow ui --backend-store-uri sqlite:///", "--repeat echo"):
        assert words in shown


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_second_demo_reuses_every_phase(tmp_path: Path) -> None:
    _demo(tmp_path / "demo", "--quick")
    again, result = _demo(tmp_path / "demo", "--quick")
    assert {*STAGES, "assets", "corpus", "units", "vocoder", "evaluation"} <= set(result["reused"])
    assert "reused" in again.stdout


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_whole_demo_reaches_its_aims(tmp_path: Path) -> None:
    _, result = _demo(tmp_path / "demo")
    phrasing, knowledge = (result["sets"][name] for name in QUESTIONS)
    assert phrasing["s2t_acc"] >= 0.95
    assert knowledge["s2t_acc"] >= 0.5 * knowledge["text_llm_acc"]
    assert phrasing["retention"] >= 0.75
    assert result["resynthesis_wer"] <= result["original_wer"] + 0.10
    assert result["peak_memory_gib"] < 16
    assert sum(result["phases"][stage] for stage in STAGES) < 20 * 60
    for stage in STAGES:
        rows = (tmp_path / "demo" / f"demo-{stage}" / "metrics.jsonl").read_text().splitlines()
        losses = [row["loss/total"] for row in map(json.loads, rows) if "loss/total" in row]
        assert sum(losses[-5:]) < sum(losses[:5])
