"""The T2C decoder's limits, ends, heads and positions, against whole forwards of one row a word."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from echox.builders.stages import build_t2c
from echox.models.greedy import repeats
from echox.models.t2c import T2CDecoder, TextPart, text_part
from tests import tiny
from tests.stages import by_hand

LENGTHS = [1, 5, 3, 2, 4, 5]


def decoder_of(seed: int = 4, **t2c: Any) -> T2CDecoder:
    """A random decoder whose rows end, run away and differ."""
    config = tiny.model_config().t2c
    assert config is not None
    torch.manual_seed(seed)
    table = torch.nn.Embedding(tiny.VOCABULARY, 32)
    decoder = build_t2c(config.model_copy(update=t2c), words=tiny.WORDS, text_table=table, layout="packed")
    for parameter in decoder.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.5)
    return decoder.eval()


def texts() -> TextPart:
    torch.manual_seed(7)
    mask = torch.arange(5)[None, :] < torch.tensor(LENGTHS)[:, None]
    return text_part(torch.randn(2, 32), torch.randn(6, 5, 32), mask, torch.randn(3, 32))


def row_of(text: TextPart, row: int) -> torch.Tensor:
    return torch.cat([block[row][mask[row]] for block, mask in zip(text.blocks, text.masks, strict=True)])


def words_by_hand(decoder: T2CDecoder, text_Lh: torch.Tensor, most: int) -> tuple[list[int], bool]:
    """Greedy words of a row and whether it ended: the end may still come as the word after the last allowed one."""
    words: list[int] = []
    with torch.no_grad():
        while True:
            logits = by_hand.unit_logits(decoder, text_Lh, words)[-1][decoder.text_classes :]
            word = int(logits[: decoder.end + 1].argmax())
            if word == decoder.end or len(words) == most:
                return words, word == decoder.end
            words.append(word)


@pytest.mark.parametrize("head", ["units", "full_vocab"])
def test_each_row_is_decoded_up_to_its_own_limit_or_end(head: str) -> None:
    ended = run_away = 0
    for seed in range(5):
        decoder, text = decoder_of(seed, head=head), texts()
        assert decoder.head.out_features == tiny.WORDS + 2 + (tiny.VOCABULARY if head == "full_vocab" else 0)
        limits = [0, 1, 9, 14, 3, 6]
        found = decoder.greedy(text.left_padded(), torch.tensor(limits))
        rows = [words_by_hand(decoder, row_of(text, row), limits[row]) for row in range(6)]
        assert [w[m].tolist() for w, m in zip(found.words_NM, found.mask_NM, strict=True)] == [row for row, _ in rows]
        assert found.ended_N.tolist() == [end for _, end in rows]
        assert found.words_NM.shape[1] == max(1, *(len(row) for row, _ in rows))
        assert bool((found.words_NM[~found.mask_NM] == decoder.pad).all())
        ended += sum(end for _, end in rows)
        run_away += sum(not end for _, end in rows)
    assert ended > 3 and run_away > 3


def test_no_row_outgrows_the_positions_of_the_body() -> None:
    cases = set()
    for seed in range(3):
        decoder, text = decoder_of(seed, max_positions=24), texts()
        most = 24 - (2 + 5 + 3)
        found = decoder.greedy(text.left_padded(), torch.full((6,), 1000))
        for row in range(6):
            words, end = words_by_hand(decoder, row_of(text, row), most)
            assert found.words_NM[row][found.mask_NM[row]].tolist() == words and bool(found.ended_N[row]) is end
            cases.add((len(words) == most, end))
    assert (True, False) in cases


def test_a_text_that_fills_the_body_says_nothing() -> None:
    decoder, text = decoder_of(max_positions=8), texts()
    found = decoder.greedy(text.left_padded(), torch.full((6,), 30))
    assert not found.mask_NM.any() and found.words_NM.shape == (6, 1)
    assert found.ended_N.tolist() == [words_by_hand(decoder, row_of(text, row), 0)[1] for row in range(6)]


@pytest.mark.parametrize("head", ["units", "full_vocab"])
def test_the_loss_of_either_head_is_that_of_each_row(head: str) -> None:
    decoder, text = decoder_of(head=head), texts()
    words = [[3, 1], [], [7], [0, 11, 5, 2], [4], [9, 9, 9]]
    mask = torch.arange(4)[None, :] < torch.tensor([len(row) for row in words])[:, None]
    padded = torch.tensor([row + [6] * (4 - len(row)) for row in words])
    weight = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0, 1.0])
    loss = decoder.loss(text, padded, mask, weight)
    expected = torch.zeros(())
    for row in (0, 1, 3, 4, 5):
        logits = by_hand.unit_logits(decoder, row_of(text, row), words[row])
        target = torch.tensor([*words[row], decoder.end]) + decoder.text_classes
        expected = expected + F.cross_entropy(logits, target, reduction="sum")
    torch.testing.assert_close(loss.total, expected, rtol=1e-5, atol=1e-5)
    assert int(loss.tokens) == 2 + 0 + 4 + 1 + 3 + 5
    logits = decoder(text, padded, mask)
    for row, said in enumerate(words):
        alone = by_hand.unit_logits(decoder, row_of(text, row), said)
        torch.testing.assert_close(logits[row, : len(said) + 1], alone, rtol=1e-4, atol=1e-5)


def test_a_strided_row_has_its_positions_stretched_in_the_loss() -> None:
    decoder, text = decoder_of(text_stride=1.5), texts()
    words = torch.tensor([[3, 1, 8]]).expand(6, -1)
    found = decoder(text, words, torch.ones_like(words, dtype=torch.bool))
    for row in range(6):
        inputs = torch.cat([row_of(text, row), decoder.unit_embedding(words[row])])
        length = len(inputs) - 3
        places = torch.tensor([[1.5 * place for place in range(length)] + [0.0, 1.0, 2.0]])
        hidden = decoder.body(inputs_embeds=decoder.projection(inputs)[None], position_ids=places,
                              attention_mask=torch.ones(1, len(inputs), dtype=torch.long))  # fmt: skip
        expected = decoder.head(hidden.last_hidden_state[0, length - 1 :])
        torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-5)


def test_unit_and_text_embeddings_are_of_one_size_at_first() -> None:
    config = tiny.model_config().t2c
    assert config is not None
    table = torch.nn.Embedding(tiny.VOCABULARY, 32)
    torch.nn.init.normal_(table.weight, std=3.0)
    decoder = build_t2c(config, words=3000, text_table=table, layout="packed")
    assert float(decoder.unit_embedding.weight.std()) == pytest.approx(3.0, rel=0.05)
    assert decoder.unit_embedding.weight.requires_grad


def test_dropout_falls_on_the_input_while_training_alone() -> None:
    decoder, text = decoder_of(dropout=0.5), texts()
    words = torch.tensor([[3, 1, 8]]).expand(6, -1)
    mask = torch.ones_like(words, dtype=torch.bool)
    steady = decoder(text, words, mask)
    assert torch.equal(steady, decoder(text, words, mask))
    asked = text.left_padded()
    still = decoder.greedy(asked, torch.full((6,), 8))
    decoder.train()
    assert not torch.allclose(decoder(text, words, mask), steady)
    assert torch.equal(decoder.greedy(asked, torch.full((6,), 8)).words_NM, still.words_NM)


def test_a_loop_is_eight_times_the_same_of_up_to_four_words() -> None:
    chance = random.Random(3)
    rows = [[*range(period)] * times + [11] for period in range(1, 7) for times in (7, 8, 9)]
    rows += [[10, 11, *row] for row in rows]
    rows += [[chance.randrange(2) for _ in range(20)] for _ in range(60)]
    rows += [[5] * 8, [5] * 7, [0, 1] * 8, [0, 1] * 7 + [0], [], [1]]
    for group in (rows, rows[-4:], rows[-2:]):
        longest = max(map(len, group))
        words = torch.tensor([row + [0] * (longest - len(row)) for row in group])
        mask = torch.arange(longest)[None, :] < torch.tensor([len(row) for row in group])[:, None]
        assert repeats(words, mask).tolist() == [by_hand.looping(row) for row in group]
    assert 10 < sum(map(by_hand.looping, rows)) < 80


def test_a_decoder_has_units_alone_unless_it_is_told_otherwise() -> None:
    sizes = {"words": 5, "text_width": 8, "width": 8, "layers": 1, "heads": 2, "ffn": 8, "max_positions": 16}
    decoder = T2CDecoder(**sizes)
    assert decoder.head.out_features == decoder.unit_embedding.num_embeddings == 7
    assert (decoder.text_classes, decoder.text_stride, decoder.dropout.p) == (0, None, 0.0)
