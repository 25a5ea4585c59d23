"""Families of causal LMs, tiny and random, against their own Hugging Face classes: losses and greedy answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from echox.config.model_schema import LoraConfig
from echox.errors import RecipeError
from echox.models import causal_lm as parts
from echox.models import chunked_heads
from echox.models.causal_lm import check_parts, logits_of
from echox.models.packed_attention import use_packed_attention
from echox.models.ragged import rows_of
from echox.models.s2t import S2TModel
from echox.models.speech import CtcScores, SpeechOutput
from echox.release.pretrained import add_lora, load_causal_lm
from echox.stages.s2t import response_loss
from echox.stream.batch import SpeechBatch
from tests import tiny

COMMON = {
    "vocab_size": tiny.VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
ALTERNATING = ["sliding_attention", "full_attention"]
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
        "tie_word_embeddings": True,
    },
    "qwen2": {},
    "qwen3": {},
    "gemma2": {
        "final_logit_softcapping": 4.0,
        "attn_logit_softcapping": 1.5,
        "query_pre_attn_scalar": 16,
        "sliding_window": 5,
        "layer_types": ALTERNATING,
        "tie_word_embeddings": False,  # tied, random and scaled by sqrt(h), they repeat one token
    },
    "gemma3_text": {
        "query_pre_attn_scalar": 16,
        "sliding_window": 5,
        "layer_types": ALTERNATING,
        "tie_word_embeddings": False,
    },
    "mistral": {"sliding_window": 5},
    "phi3": {"sliding_window": 5},
    "granite": {
        "logits_scaling": 4.0,
        "embedding_multiplier": 6.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.2,
    },
    "olmo2": {},
    "smollm3": {"no_rope_layers": [1, 0], "no_rope_layer_interval": 2},
    "cohere": {"logit_scale": 0.25},
    "cohere2": {"logit_scale": 0.25, "sliding_window": 5, "layer_types": ALTERNATING},
    "gpt_oss": {"sliding_window": 5, "layer_types": ALTERNATING, "num_local_experts": 4, "num_experts_per_tok": 2},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 5},
    "gpt_neox": {},
    "gpt2": {"n_inner": 48},
}
LLAMA4 = {"attention_chunk_size": 5, "intermediate_size_mlp": 48, "num_local_experts": 2, "pad_token_id": 0}
LAYOUTS = ("packed", "padded")


def build(family: str, **more: Any) -> Any:
    """A random model of Hugging Face's class, with the attention that the class has by default."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**COMMON, **FAMILIES[family], **more})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "sinks" in name or "bias" in name:  # what classes start at a constant
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


class SpokenText(nn.Module):
    """A front end that hears perfectly: the speech vectors are the embeddings of what was said."""

    def __init__(self, llm: Any, tokens_BV: Tensor, mask_BV: Tensor, layout: str) -> None:
        super().__init__()
        self._embedded = [llm.get_input_embeddings()(tokens_BV)]
        self._rows = rows_of(mask_BV.sum(1), tokens_BV.shape[1], layout)  # type: ignore[arg-type]

    def forward(self, *_: Any, **__: Any) -> SpeechOutput:
        speech = self._rows.from_padded(self._embedded[0])
        return SpeechOutput(
            speech, self._rows, self._rows.positions, speech, CtcScores(self._rows.positions), self._rows
        )


def spoken(batch: SpeechBatch) -> tuple[Tensor, Tensor]:
    """What the rows of a batch say: tokens `[B, V]` and their mask."""
    generator = torch.Generator().manual_seed(8)
    lengths_B = torch.tensor([3 + 2 * (row % 4) for row in range(len(batch.ids))])
    mask_BV = torch.arange(int(lengths_B.max())) < lengths_B[:, None]
    return torch.randint(12, tiny.VOCABULARY, mask_BV.shape, generator=generator), mask_BV


def rows(batch: SpeechBatch) -> Iterator[tuple[list[int], list[int]]]:
    """Prompt and response of each row, as text tokens."""
    tokens_BV, mask_BV = spoken(batch)
    for row in range(len(batch.ids)):
        prompt = [batch.before_BP[row], tokens_BV[row][mask_BV[row]], batch.after_BQ[row][batch.after_mask_BQ[row]]]
        yield torch.cat(prompt).tolist(), batch.response_BR[row][batch.response_mask_BR[row]].tolist()


def s2t(folder: Path, layout: str, batch: SpeechBatch) -> S2TModel:
    """The model in `folder` as a recipe loads it, with LoRA that changes nothing yet."""
    llm = load_causal_lm(str(folder), torch.float32)
    wrapped = add_lora(llm, LoraConfig(r=2, alpha=2, dropout=0.0, targets=("auto",)))
    model = S2TModel(SpokenText(llm, *spoken(batch), layout), wrapped, layout=layout)  # type: ignore[arg-type]
    check_parts(llm, model.layout)
    return model.eval()


@dataclasses.dataclass(frozen=True)
class Stock:
    """A family as Hugging Face computes it.

    Attributes:
        folder: its weights.
        batch: rows of uneven lengths.
        loss: of their responses.
        end, answers: a token that ends one answer early, and the greedy answers without it.
    """

    folder: Path
    batch: SpeechBatch
    loss: Tensor
    end: int
    answers: list[list[int]]


@pytest.fixture(scope="module", params=FAMILIES)
def stock(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Stock:
    """The class's own model on the same rows."""
    model, batch = build(request.param), tiny.speech_batch(4)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    with torch.no_grad():
        loss = own_loss(model, batch)
        free = [greedy(model, prompt) for prompt, _ in rows(batch)]
    assert len({token for answer in free for token in answer}) > 3, "a model that says one thing tests nothing"
    end = max(free[0], key=free[0].index)  # the one that comes latest
    cut = [answer[: answer.index(end)] if end in answer else answer for answer in free]
    return Stock(folder, batch, loss, end, cut)


def greedy(model: Any, prompt: list[int]) -> list[int]:
    """Twelve tokens after one prompt."""
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0)
    return [int(token) for token in out[0, len(prompt) :]]


def own_loss(model: Any, batch: SpeechBatch) -> Tensor:
    """Hugging Face's loss: right-padded rows, labels on the response alone."""
    texts = [(prompt + response, [-100] * len(prompt) + response) for prompt, response in rows(batch)]
    longest = max(len(tokens) for tokens, _ in texts)
    ids, labels = (
        torch.tensor([row + [fill] * (longest - len(row)) for row in column])
        for column, fill in zip(zip(*texts, strict=True), (0, -100), strict=True)
    )
    mask = torch.arange(longest) < torch.tensor([len(tokens) for tokens, _ in texts])[:, None]
    loss: Tensor = model(input_ids=ids, attention_mask=mask.long(), labels=labels).loss
    return loss


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_text_loss_is_hugging_faces_own(stock: Stock, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked_heads, "CHUNK_ELEMENTS", 5 * tiny.VOCABULARY)
    batch, model = stock.batch, s2t(stock.folder, layout, stock.batch)
    with torch.no_grad():
        term, _ = response_loss(model, model(batch), batch)
    torch.testing.assert_close(term.total / term.count, stock.loss, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_greedy_answer_is_hugging_faces_own(stock: Stock, layout: str) -> None:
    ours = s2t(stock.folder, layout, stock.batch).generate(stock.batch, stock.end, 12)
    assert [tokens[mask].tolist() for tokens, mask in zip(ours.tokens_BR, ours.mask_BR, strict=True)] == stock.answers


def test_gradients_through_a_capped_attention_are_those_of_padded_rows(tmp_path: Path) -> None:
    build("gemma2").save_pretrained(tmp_path)
    batch, found = tiny.speech_batch(4), []
    for layout in LAYOUTS:
        torch.manual_seed(2)  # LoRA starts at random
        model = s2t(tmp_path, layout, batch)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
        response_loss(model, model(batch), batch)[0].total.backward()
        found.append({name: part.grad for name, part in model.named_parameters() if part.requires_grad})
    packed, padded = found
    assert packed.keys() == padded.keys() and len(packed) == 2 * 2 * 7
    for name, gradient in packed.items():
        torch.testing.assert_close(gradient, padded[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_head_of_a_llama_is_its_last_linear_map_bit_for_bit(dtype: torch.dtype) -> None:
    llm = tiny.causal_lm().to(dtype)
    for shape in [(2, 7, 32), (1, 9, 32), (5, 32), (0, 32)]:
        hidden = torch.randn(shape, dtype=dtype)
        assert torch.equal(logits_of(llm, hidden), llm.lm_head(hidden))


def test_a_head_that_is_not_the_classes_own_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = build("granite")
    check_parts(llm, "padded")
    monkeypatch.setattr(parts, "logits_of", lambda causal_lm, hidden, **_: causal_lm.lm_head(hidden))
    with pytest.raises(RecipeError, match=r"GraniteForCausalLM makes logits .* cannot be spliced in \(by 300.0%\)"):
        check_parts(llm, "padded")


def test_an_llm_that_reads_tokens_beside_their_embeddings_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = build("llama")
    embed = llm.model.forward

    def by_token(*, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, **more: Any) -> Any:
        scaled = None if input_ids is None else llm.model.embed_tokens(input_ids) * (1 + input_ids[..., None] % 2)
        return embed(inputs_embeds=inputs_embeds if scaled is None else scaled, **more)

    monkeypatch.setattr(llm.model, "forward", by_token)
    with pytest.raises(RecipeError, match="LlamaForCausalLM reads more of a token than its embedding"):
        check_parts(llm, "padded")


def test_a_layer_that_looks_across_packed_rows_is_found_at_load() -> None:
    llm = build("llama")
    use_packed_attention(llm)
    check_parts(llm, "packed")
    layer = llm.model.layers[1]
    own = layer.forward
    layer.forward = lambda x, **more: own(x + x.roll(1, 1), **more)  # as a convolution over time would
    with pytest.raises(RecipeError, match=r"LlamaForCausalLM computes rows .* Fix: set model.layout: padded"):
        check_parts(llm, "packed")


@pytest.mark.parametrize(
    ("family", "more", "message"),
    [
        ("bloom", {"n_layer": 2, "n_head": 4}, "BloomForCausalLM does not let its attention be replaced"),
        ("llama4_text", LLAMA4, "Llama4ForCausalLM has layers of kind chunked_attention"),
        ("stablelm", {}, "StableLmAttention was not told of its rows"),
        ("moshi", {"sliding_window": 5}, "MoshiAttention wants a window of 5 that it does not name"),
    ],
)
def test_what_packed_rows_cannot_compute_is_refused_with_the_way_out(
    family: str, more: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FAMILIES, family, {})
    llm = build(family, **more)
    check_parts(llm, "padded")
    with pytest.raises(RecipeError, match=f"{message}.*Fix: set model.layout: padded"):
        use_packed_attention(llm)
        check_parts(llm, "packed")


def test_the_check_leaves_the_model_and_the_random_state_as_they_were() -> None:
    llm = build("gemma3_text").train()
    llm.model.layers[1].eval()
    layers, state = llm.model.layers, torch.get_rng_state()
    check_parts(llm, "padded")
    assert llm.model.layers is layers and torch.equal(torch.get_rng_state(), state)
    assert llm.training and llm.model.layers[0].training and not llm.model.layers[1].training


def test_the_check_runs_one_layer_of_each_kind_and_none_without_weights() -> None:
    ran: list[int] = []
    more = {"num_hidden_layers": 8, "layer_types": ["sliding_attention"] * 3 + ["full_attention"] * 5}
    llm = build("gemma3_text", **more)
    for number, layer in enumerate(llm.model.layers):
        layer.register_forward_hook(lambda *_, number=number: ran.append(number))
    check_parts(llm, "padded")
    assert set(ran) == {0, 1, 2, 3}
    ran.clear()
    check_parts(llm.to("meta"), "padded")
    assert ran == []
