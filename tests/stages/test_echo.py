from __future__ import annotations

import dataclasses

import pytest
import torch

from echox.models.t2c import text_part
from tests import tiny


def _frozen(name: str, parameter: torch.nn.Parameter) -> bool:
    trained = "lora_" in name or name.startswith(("echo.", "denoising."))
    return not trained


@pytest.mark.parametrize("pseudo_text", ["argmax_teacher_forced", "reference", "free_run", "generated"])
def test_echo_loss_alone_reaches_lora_and_nothing_frozen(pseudo_text: str) -> None:
    stage = tiny.echo_stage(pseudo_text=pseudo_text, free_run_tokens=6)
    stage.train()
    batch = tiny.speech_batch(6)
    batch.own_BR, batch.own_mask_BR = batch.response_BR.flip(0), batch.response_mask_BR.flip(0)
    terms = stage(batch)
    assert int(terms["echo"].count) > 0
    terms["echo"].total.backward()
    grads = {name: parameter.grad for name, parameter in stage.named_parameters()}
    for name, parameter in stage.named_parameters():
        if _frozen(name, parameter):
            assert grads[name] is None, name
    lora = [grad for name, grad in grads.items() if "lora_" in name]
    assert lora and all(grad is not None for grad in lora)
    assert sum(float(grad.abs().sum()) for grad in lora) > 0
    assert float(grads["denoising.inner.weight"].abs().sum()) > 0
    assert float(grads["echo.unit_embedding.weight"].abs().sum()) > 0


def test_alignment_steps_train_the_denoising_adapter_alone_and_ask_no_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = tiny.echo_stage(denoising={"dropout": 0.0, "ffn": 24, "align_steps": 3}).train()
    batch = tiny.speech_batch(6)
    whole = stage(batch)["denoising"]
    monkeypatch.setattr(stage.teacher, "forward", lambda *_: pytest.fail("the teacher was asked"))
    batch = dataclasses.replace(batch, step=2)
    terms = stage(batch)
    assert list(terms) == ["denoising"] and stage.known_counts(batch) == {}
    assert stage.loss_weights({"denoising": torch.tensor(1.0)}, 2) == {"denoising": 1.0}
    assert terms["denoising"].count == whole.count
    torch.testing.assert_close(terms["denoising"].total, whole.total)
    terms["denoising"].total.backward()
    moved = {name.split(".")[0] for name, p in stage.named_parameters() if p.grad is not None}
    assert moved == {"denoising"}
    monkeypatch.undo()
    assert set(stage(dataclasses.replace(batch, step=3))) == {"s2t", "echo", "denoising"}


def test_adapter_that_returns_the_embedding_makes_the_echo_decoder_repeat_the_teacher() -> None:
    stage = tiny.echo_stage().eval()
    batch = tiny.speech_batch(6)
    text, mask = batch.response_BR, batch.response_mask_BR & (batch.response_BR != tiny.END)
    prefix, header, embedded = stage._embeddings(text)
    part = text_part(prefix, embedded, mask, header)
    asked = part.left_padded()
    pseudo = stage.teacher(asked.values_BLh, asked.mask_BL, torch.full((6,), 30))
    logits = stage.echo(part, pseudo.words_NM, pseudo.mask_NM)[:, :-1]
    logits[..., stage.echo.pad] = -torch.inf
    assert torch.equal(logits.argmax(-1)[pseudo.mask_NM], pseudo.words_NM[pseudo.mask_NM])
    assert int(pseudo.mask_NM.sum()) > 30


def test_batch_losses_equal_the_sum_of_single_samples() -> None:
    stage = tiny.echo_stage(segmentation={"mode": "fixed", "fixed_tokens": 3}).eval()
    batch = tiny.speech_batch(5)
    together = stage(batch)
    alone = [stage(tiny.one_row(batch, row)) for row in range(5)]
    for name in ("s2t", "echo", "denoising"):
        assert int(together[name].count) == sum(int(terms[name].count) for terms in alone)
        total = sum(terms[name].total for terms in alone)
        torch.testing.assert_close(together[name].total, total, rtol=1e-3, atol=1e-3)


def test_rows_of_weight_zero_add_nothing() -> None:
    stage = tiny.echo_stage().eval()
    batch = tiny.speech_batch(4)
    weighted = dataclasses.replace(batch, weight_B=torch.tensor([1.0, 0.0, 1.0, 0.0]))
    terms = stage(weighted)
    kept = [stage(tiny.one_row(batch, row)) for row in (0, 2)]
    for name, term in terms.items():
        torch.testing.assert_close(term.total, sum(k[name].total for k in kept), rtol=1e-3, atol=1e-3)


def test_denoising_is_zero_when_the_adapter_returns_the_embedding_and_ignores_padding() -> None:
    from echox.stages.losses import denoising_loss

    target = torch.randn(2, 4, 8)
    mask = torch.tensor([[True, True, True, False], [True, False, False, False]])
    adapted = target.clone()
    adapted[~mask] = torch.randn(4, 8)
    term = denoising_loss(adapted * 3.0, target, mask)
    assert float(term.total) == pytest.approx(0.0, abs=1e-5)
    assert int(term.count) == 4
    assert float(denoising_loss(-target, target, mask).total) == pytest.approx(8.0, abs=1e-4)


def test_dynamic_lambda_keeps_denoising_within_a_fifth_of_the_echo_loss() -> None:
    stage = tiny.echo_stage()
    for echo, denoising in ((2.0, 5.0), (2.0, 0.41), (2.0, 0.39), (0.0, 1.0)):
        weight = stage.loss_weights({"echo": torch.tensor(echo), "denoising": torch.tensor(denoising)}, 0)["denoising"]
        contribution = float(weight) * denoising
        assert contribution <= 0.2 * echo + 1e-6 or float(weight) == 1.0
        assert float(weight) == pytest.approx(1.0 if denoising <= 0.2 * echo else 0.2 * echo / denoising)


def test_training_mode_never_wakes_the_frozen_parts() -> None:
    stage = tiny.echo_stage().train()
    assert stage.echo.training and stage.denoising.training
    assert not stage.teacher.training and not stage.s2t.front_end.training
    assert not any(module.training for module in stage.teacher.modules())
