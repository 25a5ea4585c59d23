from __future__ import annotations

from dataclasses import replace

import torch

from tests import tiny


def test_batched_states_equal_one_unpadded_forward_each() -> None:
    model = tiny.s2t_model().eval()
    batch = tiny.speech_batch(5)
    states = model(batch).states
    hidden_BRh = states.response.to_padded(states.hidden)
    logits_BRV = model.head(hidden_BRh)
    for row in range(5):
        alone = tiny.one_row(batch, row)
        speech = model.encode_speech(alone)
        blocks = [
            model.embed(alone.before_BP),
            speech.padded()[0],
            model.embed(alone.after_BQ),
            model.embed(alone.response_BR),
        ]
        hidden = model.causal_lm.model(inputs_embeds=torch.cat(blocks, dim=1)).last_hidden_state
        length = alone.response_BR.shape[1]
        torch.testing.assert_close(hidden_BRh[row, :length], hidden[0, -length - 1 : -1], rtol=1e-4, atol=1e-4)
        logits = model.causal_lm.lm_head(hidden[0, -length - 1 : -1])
        torch.testing.assert_close(logits_BRV[row, :length], logits, rtol=1e-4, atol=1e-4)


def test_batched_generation_equals_hugging_face_greedy_one_by_one() -> None:
    model = tiny.s2t_model().eval()
    batch = tiny.speech_batch(5)
    ours = model.generate(batch, tiny.END, 12)
    for row in range(5):
        alone = tiny.one_row(batch, row)
        speech = model.encode_speech(alone)
        prompt = torch.cat([model.embed(alone.before_BP), speech.padded()[0], model.embed(alone.after_BQ)], dim=1)
        expected = model.causal_lm.generate(
            inputs_embeds=prompt, max_new_tokens=12, do_sample=False, eos_token_id=tiny.END, pad_token_id=tiny.END
        )[0]
        expected = expected[: int((expected != tiny.END).cumprod(0).sum())]
        assert ours.tokens_BR[row][ours.mask_BR[row]].tolist() == expected.tolist()


def test_generated_states_are_those_that_predict_each_token() -> None:
    model = tiny.s2t_model().eval()
    batch = tiny.speech_batch(3)
    own = model.generate(batch, tiny.END, 8)
    speech = model.encode_speech(batch)
    states = model.response_states(speech, batch, own.tokens_BR, own.mask_BR)
    again = states.response.to_padded(states.hidden)
    torch.testing.assert_close(own.hidden_BRh[own.mask_BR], again[own.mask_BR], rtol=1e-3, atol=1e-4)
    assert torch.equal(model.head(again).argmax(-1)[own.mask_BR], own.tokens_BR[own.mask_BR])


def test_precomputed_features_stand_for_the_log_mel() -> None:
    model = tiny.s2t_model().eval()
    batch = tiny.speech_batch(4)
    features, _ = model.front_end.encoder(batch.mel_BMT, batch.frames_B)
    stored = replace(batch, mel_BMT=batch.mel_BMT[:, :, :0], features_BTd=features)
    assert torch.equal(model(stored).states.hidden, model(batch).states.hidden)
    assert stored.stats() == batch.stats()


def test_ctc_embeddings_are_the_text_the_head_expects_at_each_kept_frame() -> None:
    config = tiny.model_config().model_copy(
        update={"shrink": tiny.model_config().shrink.model_copy(update={"ctc_embedding": True})}
    )
    model = tiny.s2t_model(config).eval()
    batch = tiny.speech_batch(4)
    speech, front_end = model.encode_speech(batch), model.front_end
    assert float(front_end.shrink.norm.weight.abs().sum()) == 0  # the states come in as training finds them useful
    speech_BVh, mask_BV = speech.padded()
    kept_BV, logits_BTC = (
        speech.rows.to_padded(speech.kept),
        speech.frames.to_padded(front_end.ctc_head.linear(speech.aligned)),
    )
    table = model.causal_lm.get_input_embeddings().weight
    for row in range(4):
        for column in range(int(mask_BV[row].sum())):
            odds = logits_BTC[row, kept_BV[row, column]].softmax(-1)
            words = front_end.ctc_head.tokens.tolist()
            expected = sum(odds[place] * table[word] for place, word in enumerate(words) if place)
            torch.testing.assert_close(speech_BVh[row, column], expected, rtol=1e-4, atol=1e-5)
