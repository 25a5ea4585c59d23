from __future__ import annotations

import torch

from tests import tiny


def test_batched_states_equal_one_unpadded_forward_each() -> None:
    model = tiny.s2t_model().eval()
    batch = tiny.speech_batch(5)
    together = model(batch)
    for row in range(5):
        alone = tiny.one_row(batch, row)
        speech = model.front_end(alone.mel_BMT, alone.frames_B)
        blocks = [
            model.embed(alone.before_BP),
            speech.speech_BVh,
            model.embed(alone.after_BQ),
            model.embed(alone.response_BR),
        ]
        hidden = model.causal_lm.model(inputs_embeds=torch.cat(blocks, dim=1)).last_hidden_state
        length = alone.response_BR.shape[1]
        torch.testing.assert_close(together.hidden_BRh[row, :length], hidden[0, -length - 1 : -1], rtol=1e-4, atol=1e-4)
        logits = model.causal_lm.lm_head(hidden[0, -length - 1 : -1])
        torch.testing.assert_close(together.logits_BRV[row, :length], logits, rtol=1e-4, atol=1e-4)


def test_batched_generation_equals_hugging_face_greedy_one_by_one() -> None:
    model = tiny.s2t_model().eval()
    batch = tiny.speech_batch(5)
    ours = model.generate(batch, tiny.END, 12)
    for row in range(5):
        alone = tiny.one_row(batch, row)
        speech = model.front_end(alone.mel_BMT, alone.frames_B)
        prompt = torch.cat([model.embed(alone.before_BP), speech.speech_BVh, model.embed(alone.after_BQ)], dim=1)
        expected = model.causal_lm.generate(
            inputs_embeds=prompt, max_new_tokens=12, do_sample=False, eos_token_id=tiny.END, pad_token_id=tiny.END
        )[0]
        expected = expected[: int((expected != tiny.END).cumprod(0).sum())]
        assert ours.tokens_BR[row][ours.mask_BR[row]].tolist() == expected.tolist()


def test_generated_states_are_those_that_predict_each_token() -> None:
    model = tiny.s2t_model().eval()
    batch = tiny.speech_batch(3)
    own = model.generate(batch, tiny.END, 8)
    speech = model.front_end(batch.mel_BMT, batch.frames_B)
    again = model.response_states(speech, batch, own.tokens_BR, own.mask_BR)
    torch.testing.assert_close(own.hidden_BRh[own.mask_BR], again[own.mask_BR], rtol=1e-3, atol=1e-4)
    assert torch.equal(model.head(again).argmax(-1)[own.mask_BR], own.tokens_BR[own.mask_BR])
