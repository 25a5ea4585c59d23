from __future__ import annotations

import torch
from torch.nn import functional as F

from echox.models.greedy import repeats
from echox.models.t2c import T2CDecoder, TextPart, text_part
from tests import tiny


def _text(rows: int = 6) -> TextPart:
    torch.manual_seed(7)
    mask = torch.arange(5)[None, :] < torch.tensor([[1], [5], [3], [2], [4], [5]])[:rows]
    return text_part(torch.randn(2, 32), torch.randn(rows, 5, 32), mask, torch.randn(3, 32))


def _as_hugging_face(decoder: object) -> torch.nn.Module:
    """The same weights as a stock causal LM on units, its input table being projection(unit embedding)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **{**decoder.body.config.to_dict(), "vocab_size": tiny.WORDS + 2, "tie_word_embeddings": False}
    )
    model = LlamaForCausalLM(config).eval()
    model.model.load_state_dict(decoder.body.state_dict(), strict=False)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(decoder.projection(decoder.unit_embedding.weight))
        model.lm_head.weight.copy_(decoder.head.weight)
    return model


def test_batched_greedy_equals_hugging_face_generate_one_by_one() -> None:
    ended = 0
    for seed in range(4):
        decoder = tiny.t2c_decoder(seed=seed)
        stock, text = _as_hugging_face(decoder), _text().left_padded()
        ours = decoder.greedy(text, torch.full((6,), 20))
        for row in range(6):
            prompt = decoder.projection(text.values_BLh[row][text.mask_BL[row]])[None]
            expected = stock.generate(
                inputs_embeds=prompt, max_new_tokens=20, do_sample=False, eos_token_id=decoder.end,
                pad_token_id=decoder.end, suppress_tokens=[decoder.pad],
            )[0]  # fmt: skip
            expected = expected[expected != decoder.end]
            assert ours.words_NM[row][ours.mask_NM[row]].tolist() == expected.tolist()
            assert bool(ours.ended_N[row]) is (len(expected) < 20)
        ended += int(ours.ended_N.sum())
    assert 0 < ended < 24, "the random decoders should show both ended and runaway rows"


def test_batched_loss_equals_one_row_at_a_time() -> None:
    decoder, text = tiny.t2c_decoder(), _text()
    words = torch.randint(0, tiny.WORDS, (6, 7))
    lengths = torch.tensor([7, 0, 3, 5, 1, 7])
    mask = torch.arange(7)[None, :] < lengths[:, None]
    weight = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0, 1.0])
    total, count, _ = decoder.loss(text, words.masked_fill(~mask, 0), mask, weight)
    expected, tokens, joined = torch.zeros(()), 0, text.left_padded()
    for row in range(6):
        if not weight[row]:
            continue
        target = words[row, : lengths[row]]
        inputs = torch.cat([joined.values_BLh[row][joined.mask_BL[row]], decoder.unit_embedding(target)])
        hidden = decoder.body(inputs_embeds=decoder.projection(inputs)[None]).last_hidden_state[0]
        logits = decoder.head(hidden[-len(target) - 1 :])
        expected = expected + F.cross_entropy(logits, F.pad(target, (0, 1), value=decoder.end), reduction="sum")
        tokens += len(target) + 1
    assert int(count) == tokens
    torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-4)


def test_a_text_stride_sets_words_beside_their_text_in_training_and_in_decoding() -> None:
    decoder, text = tiny.t2c_decoder(), _text()
    decoder.text_stride = 2.5
    padded = torch.tensor([[False, True, True, True, True, True]])
    assert decoder._positions(padded[:, :4], None).tolist() == [[0, 0, 2.5, 5]]
    own = decoder.greedy(text.left_padded(), torch.full((6,), 20))
    logits = decoder(text, own.words_NM, own.mask_NM)
    logits[..., decoder.pad] = -torch.inf
    for row, length in enumerate(own.mask_NM.sum(1).tolist()):
        said = own.words_NM[row, :length].tolist() + ([decoder.end] if own.ended_N[row] else [])
        assert logits[row, : len(said)].argmax(-1).tolist() == said
    decoder.text_stride = None
    assert not torch.equal(decoder.greedy(text.left_padded(), torch.full((6,), 20)).words_NM, own.words_NM)


def test_limits_are_kept_row_by_row() -> None:
    decoder, text = tiny.t2c_decoder(), _text()
    limits = torch.tensor([1, 2, 3, 4, 5, 6])
    decoded = decoder.greedy(text.left_padded(), limits)
    assert bool((decoded.mask_NM.sum(1) <= limits).all())


def test_repeat_loops_are_found_and_ordinary_rows_are_not() -> None:
    rows = [[1, 2] * 10, [3] * 8 + [4] * 12, list(range(20)), [1, 2, 3] * 5 + [9] * 5, [0, 1, 2, 3] * 5]
    words = torch.tensor(rows)
    found = repeats(words, torch.ones_like(words, dtype=torch.bool))
    assert found.tolist() == [True, True, False, False, False]
    short = torch.arange(20)[None, :] < torch.tensor([[9], [6], [20], [20], [20]])
    assert repeats(words, short).tolist() == [False, False, False, False, False]


def _placing_text(layout: str = "packed") -> T2CDecoder:
    """A decoder that places its text by characters, and knows words of one to four units."""
    decoder = tiny.t2c_decoder(tiny.model_config(layout=layout))
    decoder.units_per_character = 1.5
    units = [1 + word % 4 for word in range(tiny.WORDS)]
    decoder.word_units_U = torch.tensor([*units, 0, 0], dtype=torch.float32)
    return decoder


def _text_of_characters() -> TextPart:
    torch.manual_seed(7)
    mask = torch.arange(5)[None, :] < torch.tensor([[1], [5], [3], [2], [4], [5]])
    characters = torch.randint(1, 9, (6, 5))
    return text_part(torch.randn(2, 32), torch.randn(6, 5, 32), mask, torch.randn(3, 32), characters)


def test_text_placed_by_characters_is_where_its_units_are_expected_in_training_and_in_decoding() -> None:
    torch.manual_seed(3)
    mask = torch.tensor([[True, True, True], [True, False, False]])
    characters = torch.tensor([[4, 1, 6], [2, 5, 5]])
    text = text_part(torch.randn(2, 32), torch.randn(2, 3, 32), mask, torch.randn(1, 32), characters)
    decoder = _placing_text("padded")
    words = torch.tensor([[3, 0, 2], [1, 5, 0]])  # 4, 1 and 3 units; 2 and 2
    lengths = torch.tensor([[6], [4]])
    places = decoder._places(lengths, 9, text.starts_NS, words)
    assert places[0].tolist() == [0, 0, 0, 6.0, 7.5, 0, 4, 5, 8]
    assert places[1, :6].tolist() == [0, 0, 0, 0, 2, 4]
    asked = text.left_padded()
    assert decoder._positions(asked.mask_BL, text.starts_NS).tolist() == [[0, 0, 0, 6.0, 7.5, 0], [0, 0, 0, 0, 0, 0]]


def test_what_is_decoded_by_characters_is_what_training_predicts_packed_or_padded() -> None:
    text = _text_of_characters()
    logits = {}
    for layout in ("packed", "padded"):
        decoder = _placing_text(layout)
        own = decoder.greedy(text.left_padded(), torch.full((6,), 20), text.starts_NS)
        logits[layout] = decoder(text, own.words_NM, own.mask_NM)
        known = F.pad(own.mask_NM, (1, 0), value=True)
        logits[layout] = logits[layout].masked_fill(~known[..., None], 0.0)
        own_logits = logits[layout].clone()
        own_logits[..., decoder.pad] = -torch.inf
        for row, length in enumerate(own.mask_NM.sum(1).tolist()):
            said = own.words_NM[row, :length].tolist() + ([decoder.end] if own.ended_N[row] else [])
            assert own_logits[row, : len(said)].argmax(-1).tolist() == said
    torch.testing.assert_close(logits["packed"], logits["padded"], rtol=1e-4, atol=1e-4)
    decoder.word_units_U = torch.ones_like(decoder.word_units_U)
    other = decoder.greedy(text.left_padded(), torch.full((6,), 20), text.starts_NS)
    assert not torch.equal(other.words_NM, own.words_NM), "a word's length should matter"


def test_hidden_history_changes_training_alone_and_leaves_the_text() -> None:
    decoder, text = tiny.t2c_decoder(), _text()
    words, mask = torch.randint(0, tiny.WORDS, (6, 7)), torch.ones(6, 7, dtype=torch.bool)
    plain = decoder(text, words, mask)
    decoder.history_dropout = 0.999999
    torch.testing.assert_close(decoder(text, words, mask), plain)
    hidden = decoder.train()(text, words, mask)
    assert not torch.allclose(hidden, plain)
    torch.testing.assert_close(hidden[:, 0], plain[:, 0])  # before the first word there is no history
    others = decoder(text, words.flip(1), mask)
    torch.testing.assert_close(others, hidden)  # nothing of the words is left


def test_a_window_hides_what_is_far_in_training_and_in_decoding() -> None:
    decoder, text = _placing_text("padded"), _text_of_characters()
    full = decoder.greedy(text.left_padded(), torch.full((6,), 20), text.starts_NS)
    decoder.window_units = 1e9
    wide = decoder.greedy(text.left_padded(), torch.full((6,), 20), text.starts_NS)
    assert torch.equal(wide.words_NM, full.words_NM)
    words, mask = torch.randint(0, tiny.WORDS, (6, 9)), torch.ones(6, 9, dtype=torch.bool)
    everything = decoder(text, words, mask)
    decoder.window_units = None
    torch.testing.assert_close(everything, decoder(text, words, mask), rtol=1e-4, atol=1e-4)

    decoder.window_units = 6.0
    own = decoder.greedy(text.left_padded(), torch.full((6,), 20), text.starts_NS)
    assert not torch.equal(own.words_NM[:, :3], full.words_NM[:, :3])
    logits = decoder(text, own.words_NM, own.mask_NM)
    logits[..., decoder.pad] = -torch.inf
    for row, length in enumerate(own.mask_NM.sum(1).tolist()):
        said = own.words_NM[row, :length].tolist() + ([decoder.end] if own.ended_N[row] else [])
        assert logits[row, : len(said)].argmax(-1).tolist() == said


def test_through_one_layer_a_window_is_as_wide_as_it_says() -> None:
    decoder, text = _placing_text("padded"), _text_of_characters()
    decoder.body.layers = decoder.body.layers[:1]
    decoder.window_units = 5.0
    words, mask = torch.full((6, 9), 3), torch.ones(6, 9, dtype=torch.bool)  # four units each: at 4, 8, 12, ...
    before = decoder(text, words, mask)
    words = words.clone()
    words[:, 4] = 7  # four units too, from 16 to 20
    changed = (decoder(text, words, mask) - before).abs().amax((0, 2)) > 1e-6
    assert changed.tolist() == [False] * 5 + [True, True] + [False] * 3
