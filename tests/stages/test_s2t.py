from __future__ import annotations

import torch
from torch.nn import functional as F

from echox.builders.stages import build_s2t_stage
from tests import tiny


def _stage(align_steps: int = 0):
    config = tiny.model_config()
    config = config.model_copy(update={"ctc": config.ctc.model_copy(update={"align_steps": align_steps})})
    return build_s2t_stage(config, tiny.s2t_model(config))


def test_losses_equal_the_sum_of_single_samples() -> None:
    stage = _stage().eval()
    batch = tiny.speech_batch(5)
    together = stage(batch)
    alone = [stage(tiny.one_row(batch, row)) for row in range(5)]
    for name in ("s2t", "ctc"):
        assert int(together[name].count) == sum(int(terms[name].count) for terms in alone)
        torch.testing.assert_close(together[name].total, sum(t[name].total for t in alone), rtol=1e-4, atol=1e-4)


def test_text_loss_is_the_llm_cross_entropy_on_the_response() -> None:
    stage = _stage().eval()
    batch = tiny.one_row(tiny.speech_batch(3), 2)
    out = stage.s2t(batch)
    expected = F.cross_entropy(stage.s2t.head(out.states.hidden)[0], batch.response_BR[0], reduction="sum")
    torch.testing.assert_close(stage(batch)["s2t"].total, expected)


def test_alignment_steps_train_adapter_and_ctc_head_alone() -> None:
    stage = _stage(align_steps=3).train()
    terms = stage(tiny.speech_batch(4, step=2))
    assert list(terms) == ["ctc"]
    assert list(stage.known_counts(tiny.speech_batch(4, step=2))) == ["ctc"]
    terms["ctc"].total.backward()
    moved = {name.split(".")[2] for name, p in stage.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {"alignment", "ctc_head"}
    assert set(stage(tiny.speech_batch(4, step=3))) == {"s2t", "ctc"}


def test_both_losses_leave_encoder_and_llm_base_without_gradient() -> None:
    stage = _stage().train()
    terms = stage(tiny.speech_batch(4))
    (terms["s2t"].total + terms["ctc"].total).backward()
    for name, parameter in stage.named_parameters():
        trained = "lora_" in name or name.startswith(
            ("s2t.front_end.alignment", "s2t.front_end.ctc_head", "s2t.front_end.shrink")
        )
        assert (parameter.grad is not None) is trained, name
    groups = stage.parameter_groups()
    listed = [name for names in groups.values() for name in names]
    assert sorted(listed) == sorted(name for name, p in stage.named_parameters() if p.requires_grad)


def test_a_row_without_transcript_adds_nothing_to_ctc_and_keeps_its_response() -> None:
    stage = _stage().train()
    batch = tiny.speech_batch(3)
    before = stage(batch)
    batch.transcript_lengths_B[1] = 0
    terms = stage(batch)
    others = [stage(tiny.one_row(batch, row))["ctc"] for row in (0, 2)]
    torch.testing.assert_close(terms["ctc"].total, sum(term.total for term in others), rtol=1e-4, atol=1e-4)
    assert int(terms["ctc"].count) == sum(int(term.count) for term in others) == stage.known_counts(batch)["ctc"]
    torch.testing.assert_close(terms["s2t"].total, before["s2t"].total)
    stage.zero_grad()
    stage(tiny.one_row(batch, 1))["ctc"].total.backward()
    assert not any(p.grad is not None and p.grad.any() for p in stage.parameters())


def test_ctc_classes_of_a_corpus_vocabulary() -> None:
    from echox.builders.setup import ctc_tokens
    from echox.models.speech import CtcHead

    tokens = ctc_tokens(48, [30, 7, 30, 9])
    assert tokens.tolist() == [48, 7, 9, 30]
    head = CtcHead(8, tokens, 48)
    assert head.classes(torch.tensor([[7, 30, 9, 11]])).tolist() == [[1, 3, 2, 0]]
    table = torch.randn(48, 8)
    head.init_from_table(table)
    assert float(head.linear.weight[0].abs().sum()) == 0
    cosine = F.cosine_similarity(head.linear.weight[1:], table[[7, 9, 30]])
    torch.testing.assert_close(cosine, torch.ones(3))
