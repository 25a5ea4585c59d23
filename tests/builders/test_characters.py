"""Characters of tokens that are words, letters, or single bytes of a letter: in all, as many as the text has."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from echox.builders.characters import token_characters
from echox.builders.setup import ctc_tokens
from echox.builders.stages import build_t2c_stage
from echox.models.t2c_text import T2CText
from echox.stages.losses import ctc_loss
from tests import tiny
from tests.builders.test_prompt import tokenizer

TEXTS = [
    "Where is Lima?",
    "Она завела прядь за ухо. ЩУКА!",
    "今天天气很好。",
    "น้ำตกอยู่ที่นี่",
    "آج موسم اچھا ہے۔",
    "a😀b",
]


def ids(made: Any, text: str) -> list[int]:
    return list(made(text, add_special_tokens=False).input_ids)


def sentencepiece() -> Any:
    """Words, and bytes for all that is none, as Llama's first tokenizers have them."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "a", "b", "я", "好"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    bpe = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))
    bpe.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>")


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", ["byte-level", "byte fallback"])
def test_the_tokens_of_a_text_have_as_many_characters_as_the_text(text: str, kind: str) -> None:
    made = tokenizer(None) if kind == "byte-level" else sentencepiece()
    characters, tokens = token_characters(made), ids(made, text)
    assert sum(characters[token] for token in tokens) == len(text)
    assert len(tokens) > len(text) or text.isascii(), "what is tested here is still needed"


def test_whole_tokens_count_what_they_spell_and_special_ones_stay_as_they_were() -> None:
    made = tokenizer(None)
    characters = token_characters(made)
    assert characters[made.convert_tokens_to_ids("<|im_end|>")] == len("<|im_end|>")
    assert characters[ids(made, "a")[0]] == 1 and len(characters) == len(made)


def test_a_t2c_places_a_cyrillic_text_by_its_letters() -> None:
    """As long a text in ASCII has as many characters before its last one, in half the tokens."""
    made = tokenizer(None)
    torch.manual_seed(0)
    table = torch.nn.Embedding(len(made), 32)
    placed = T2CText(None, token_characters(made))
    stage = build_t2c_stage(tiny.t2c_decoder(), table, tiny.PREFIX, tiny.HEADER, placed)
    russian, english = (torch.tensor([ids(made, text)]) for text in ("Она завела.", "She puts it"))
    before = []
    for text_BT in (russian, english):
        starts_NS = stage.text(text_BT, torch.ones_like(text_BT, dtype=torch.bool)).starts_NS
        assert starts_NS is not None
        before.append(starts_NS[0, len(tiny.PREFIX) : -len(tiny.HEADER)].tolist())
    assert before[0][:5] == [0, 1, 1, 2, 2] and before[0][-1] == before[1][-1] == 10
    assert len(before[0]) == 20 and len(before[1]) == 11


def test_ctc_has_a_class_for_each_byte_of_a_cyrillic_transcript_and_its_loss_is_torchs() -> None:
    made = tokenizer(None)
    tokens = ids(made, "мама мыла раму")
    classes = ctc_tokens(len(made), tokens).tolist()
    assert classes[0] == len(made) and classes[1:] == sorted(set(tokens))
    target = torch.tensor([[classes.index(token) for token in tokens]])
    frames, size = 60, target.shape[1]
    logits = torch.randn(1, frames, len(classes), generator=torch.Generator().manual_seed(0))
    chosen = logits.gather(
        2, torch.cat([torch.zeros(1, 1, dtype=torch.long), target], 1)[:, None].expand(1, frames, -1)
    )
    lengths = torch.tensor([size])
    found = ctc_loss(logits.logsumexp(-1), chosen, target, torch.tensor([frames]), lengths, torch.ones(1))
    wanted = torch.nn.functional.ctc_loss(
        logits.log_softmax(-1).transpose(0, 1), target, torch.tensor([frames]), lengths, reduction="sum"
    )
    torch.testing.assert_close(found.total, wanted, atol=1e-3, rtol=1e-4)
    assert size > len("мама мыла раму")
