"""Two Stage III steps at the true 3B shapes on random weights: no download, one process, minutes on a CPU."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from echox.audio.io import encode_flac
from echox.stream.format.writer import write_shards


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_two_echo_steps_at_3b_shapes(tmp_path: Path) -> None:
    wave = (np.random.default_rng(0).standard_normal(8000) * 0.1).astype(np.float32)
    meta = {"id": "a", "question_text": "hi", "answer_text": "yes", "task": "sqa", "question_s": 0.5, "answer_s": 0.5}
    write_shards(tmp_path / "sqa", [{"__key__": "a", "question.flac": encode_flac(wave), "json": meta}])
    overrides = [
        f"storage={tmp_path / 'runs'}",
        "model.random_init=true",
        "model.echo.units_per_token=1",
        "model.speech_encoder.margin_s=0.1",
        "init.s2t=null",
        "init.t2c=null",
        f"data.train=[{{path: {tmp_path / 'sqa'}, task: sqa}}]",
        "data.valid=[]",
        "data.global_batch=1",
        "data.micro_batch=1",
        "optim.steps=2",
        "optim.warmup_steps=0",
        "engine.deepspeed=ds_configs/zero3_cpu.json",
        "engine.precision=bf16",
        "engine.validate_every=0",
        "scaling.workers=1",
        "scaling.gpus_per_worker=0",
    ]
    ran = subprocess.run(
        [sys.executable, "-m", "echox", "train", "3b/echo", *overrides],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "runs/3b-echo/metrics.jsonl").read_text().splitlines()]
    losses = [row["loss/s2t"] for row in rows if "loss/s2t" in row]
    seconds = [row["perf/step_ms"] / 1000 for row in rows if "perf/step_ms" in row]
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(f"3B Stage III on random weights: {seconds} s a step, peak {peak:.1f} GiB, losses {losses}")
    assert len(losses) == 2
    assert all(np.isfinite(losses))
    assert peak < 22
