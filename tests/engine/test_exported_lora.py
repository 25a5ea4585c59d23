"""LoRA that DeepSpeed trained in one flat parameter, on one rank and on two, is what stock PEFT loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from launching import launch, prepare

from echox.release.export import export
from echox.speak.pipeline import SpeechToSpeech
from tests import tiny
from tests.speak.echo_run import write_echo_run

WORKER = Path(__file__).with_name("export_worker.py")
TOKENS = torch.arange(2 * 9).view(2, 9) * 5 % tiny.VOCABULARY


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_echo_run(folder)
    return folder


def scenarios(models: Path) -> list[dict[str, Any]]:
    init = {"s2t": str(models / "s2t"), "t2c": str(models / "t2c")}
    stages = {"s2t": ({}, ("adapters", "lora")), "echo": (init, ("lora", "denoising", "echo"))}
    return [
        {"name": f"tiny-{stage}", "stage": stage, "init": init, "groups": groups, "models": str(models)}
        for stage, (init, groups) in stages.items()
    ]


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_was_trained_on_any_number_of_ranks_is_what_stock_peft_loads(
    models: Path, tmp_path: Path, ranks: int
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = prepare(tmp_path)
    launch(folder, WORKER, ranks, scenarios(models))
    for stage in ("s2t", "echo"):
        run, out = folder / "runs" / f"tiny-{stage}", tmp_path / f"peft-{stage}"
        export(run, out, "peft")
        base = AutoModelForCausalLM.from_pretrained(models / "llm", dtype=torch.float32).eval()
        with torch.no_grad():
            before = base(input_ids=TOKENS).logits
            found = PeftModel.from_pretrained(base, out).eval()(input_ids=TOKENS).logits
            wanted = SpeechToSpeech.load(run, device="cpu").stage.s2t.llm(input_ids=TOKENS).logits
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
        assert (found - before).abs().max() > 0.05, "training must have moved it"
        export(run, tmp_path / f"hf-{stage}", "hf")
        with torch.no_grad():
            merged = SpeechToSpeech.load(tmp_path / f"hf-{stage}", device="cpu").stage.s2t.llm(input_ids=TOKENS).logits
        torch.testing.assert_close(merged, wanted, rtol=0, atol=1e-4)
