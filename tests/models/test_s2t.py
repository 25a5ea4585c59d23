from __future__ import annotations

from dataclasses import replace

import pytest
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


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_a_token_that_nothing_attends_to_keeps_its_place(layout: str) -> None:
    model = tiny.s2t_model(tiny.model_config(layout=layout)).eval()
    batch = tiny.speech_batch(4)
    unseen = 3  # no random token
    batch.before_BP[:, 1] = batch.after_BQ[1, 0] = batch.after_BQ[2, 0] = unseen
    batch.response_BR[0, 0] = unseen  # of an answer everything is seen
    seen = model.response_states(model.encode_speech(batch), batch, batch.response_BR, batch.response_mask_BR)
    model.unseen_token = unseen
    states = model.response_states(model.encode_speech(batch), batch, batch.response_BR, batch.response_mask_BR)
    found_BRh = states.response.to_padded(states.hidden)
    said = model.generate(batch, tiny.END, 6)
    for row in range(4):
        alone = tiny.one_row(batch, row)
        speech_1Vh = model.encode_speech(alone).padded()[0]
        ids = [alone.before_BP, alone.after_BQ, alone.response_BR]
        before, after, response = map(model.embed, ids)
        keys = [ids[0] != unseen, torch.ones(speech_1Vh.shape[:2], dtype=torch.bool), ids[1] != unseen]
        prompt = torch.cat([before, speech_1Vh, after], dim=1)

        def plain(rest: torch.Tensor, prompt: torch.Tensor = prompt, keys: list[torch.Tensor] = keys) -> torch.Tensor:
            values = torch.cat([prompt, rest], dim=1)
            mask = torch.cat([*keys, torch.ones(rest.shape[:2], dtype=torch.bool)], dim=1)
            places = torch.arange(values.shape[1])[None]
            own = tiny.s2t_model(tiny.model_config(layout="padded")).eval().causal_lm
            found: torch.Tensor = own.model(
                inputs_embeds=values, attention_mask=mask.long(), position_ids=places, use_cache=False
            ).last_hidden_state
            return found[0, prompt.shape[1] - 1 :]

        length = response.shape[1]
        with torch.no_grad():
            torch.testing.assert_close(found_BRh[row, :length], plain(response)[:-1], rtol=1e-4, atol=1e-4)
            own = said.tokens_BR[row : row + 1, : int(said.mask_BR[row].sum())]
            wanted = plain(model.embed(own))
            torch.testing.assert_close(
                said.hidden_BRh[row][said.mask_BR[row]], wanted[: own.shape[1]], rtol=1e-3, atol=1e-4
            )
    other = (seen.response.to_padded(seen.hidden) - found_BRh)[batch.response_mask_BR]
    assert other.abs().max() > 0.01, "it must matter"


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
