"""Calls a Hugging Face causal LM in parts, and checks at load that the parts make what its own class computes.

Training needs them apart: the embedding of text that stands beside speech vectors, the decoder over rows in either
layout, and the head on the few states that predict a response. What a family does beside these (Granite and Cohere
scale their logits, Gemma caps them) is known to its class alone, so the class is asked rather than imitated.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from echox.errors import RecipeError
from echox.models.ragged import Layout, join, lengths_to_mask

_LENGTHS = (7, 4)
"""Tokens of the two rows of `check_parts`."""
_ROUNDING = {torch.float16: 0.05, torch.bfloat16: 0.1}
"""Largest relative difference that is rounding; 1e-3 for other types."""


def decoder_of(causal_lm: Any) -> Any:
    """The layers with embedding and last norm below the head: `model`, `transformer`, `gpt_neox`."""
    return getattr(causal_lm, _decoder_name(causal_lm))


def decoder_layers(causal_lm: Any) -> nn.ModuleList:
    """The decoder's layers, in order.

    Raises:
        RecipeError: the model has no list of as many modules as its configuration has layers.
    """
    parent, name = _place_of_layers(causal_lm)
    layers = getattr(parent, name)
    assert isinstance(layers, nn.ModuleList)
    return layers


def logits_of(causal_lm: Any, hidden: Tensor, *, within: nn.Module | None = None) -> Tensor:
    """Logits `[..., V]` that the model's class makes of last hidden states `[..., h]`, in the model's dtype.

    The class's own forward runs, with a decoder that has computed these states already.

    Args:
        causal_lm: the model.
        hidden: the states.
        within: the head, where this is called in a job of it: its hooks, which ran for the job, then run no more.
    """
    hidden_BTh = hidden if hidden.dim() == 3 else hidden.reshape(1, -1, hidden.shape[-1])
    out = type(causal_lm).forward(_Decoded(causal_lm, hidden_BTh, within), inputs_embeds=hidden_BTh, use_cache=False)
    logits: Tensor = out.logits
    return logits if hidden.dim() == 3 else logits.reshape(*hidden.shape[:-1], logits.shape[-1])


@torch.no_grad()
def check_parts(causal_lm: Any, layout: Layout) -> None:
    """Compare embedding, decoder over rows, and head with the class's own forward, on two rows of a few tokens.

    As many layers run as it takes to have one of each kind, at least two. A model on the meta device is not checked.
    No random number is drawn.

    Raises:
        RecipeError: a part differs; says which, and what to do.
    """
    table = causal_lm.get_input_embeddings()
    if table.weight.device.type == "meta":
        return
    decoder, name = decoder_of(causal_lm), type(causal_lm).__name__
    lengths_N = torch.tensor(_LENGTHS, device=table.weight.device)
    mask_NT = lengths_to_mask(lengths_N, max(_LENGTHS))
    places_NT = torch.arange(mask_NT.numel(), device=mask_NT.device).view_as(mask_NT)
    tokens_NT = (places_NT + 1) * (len(table.weight) // (mask_NT.numel() + 2))
    with _evaluating_first_layers(causal_lm), _named(f"{name} cannot be called in parts", None):
        alone = []
        for tokens_T, length in zip(tokens_NT, _LENGTHS, strict=True):
            tokens_1T = tokens_T[None, :length]
            own = causal_lm(input_ids=tokens_1T, use_cache=False).logits
            hidden = decoder(input_ids=tokens_1T, use_cache=False).last_hidden_state
            _compare(f"{name} makes logits of its last hidden states in a way that", logits_of(causal_lm, hidden), own)
            embedded = decoder(inputs_embeds=table(tokens_1T), use_cache=False).last_hidden_state
            _compare(f"{name} reads more of a token than its embedding, so that", embedded, hidden)
            alone.append(hidden[0])
        with _named(f"{name} cannot compute {layout} rows", layout):
            row = join([table(tokens_NT)], [mask_NT], layout)
            hidden = decoder(inputs_embeds=row.values, use_cache=False, **row.rows.causal()).last_hidden_state
        wanted = row.rows.from_padded(nn.utils.rnn.pad_sequence(alone, batch_first=True))
        _compare(f"{name} computes rows side by side such that", hidden[row.rows.real], wanted[row.rows.real], layout)


@contextmanager
def _named(what: str, layout: Layout | None) -> Iterator[None]:
    """Turn what a model's own code ends with into a RecipeError."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise RecipeError(f"{what}: {error}", fix=_other(layout)) from error


def _compare(what: str, found: Tensor, wanted: Tensor, layout: Layout | None = None) -> None:
    """Raise RecipeError unless `[..., x]` and `[..., x]` are the same at every position but for rounding."""
    error, scale = (found.float() - wanted.float()).norm(dim=-1), wanted.float().norm(dim=-1)
    difference = float((error / scale.clamp(min=1e-12)).max())
    if not difference <= _ROUNDING.get(wanted.dtype, 1e-3):
        rows = "speech cannot be spliced in" if layout is None else f"{layout} rows differ from single ones"
        raise RecipeError(f"{what} {rows} (by {difference:.1%})", fix=_other(layout))


def _other(layout: Layout | None) -> str:
    return "set model.layout: padded" if layout == "packed" else "use an LLM of another family for model.llm.path"


@contextmanager
def _evaluating_first_layers(causal_lm: Any) -> Iterator[None]:
    """Leave the model with its first layers in eval mode, and put everything back at the end."""
    modes = [(module, module.training) for module in causal_lm.modules()]
    parent, name = _place_of_layers(causal_lm)
    layers = getattr(parent, name)
    setattr(parent, name, layers[: _layers_of_every_kind(causal_lm.config)])
    causal_lm.eval()
    try:
        yield
    finally:
        setattr(parent, name, layers)
        for module, mode in modes:
            module.training = mode


def _layers_of_every_kind(config: Any) -> int:
    kinds = getattr(config, "layer_types", None) or ()
    return max(2, *(1 + kinds.index(kind) for kind in set(kinds)), 0)


def _place_of_layers(causal_lm: Any) -> tuple[nn.Module, str]:
    """The module that holds the list of layers, and the list's name in it."""
    count = causal_lm.config.num_hidden_layers
    for parent in decoder_of(causal_lm).modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == count:
                return parent, name
    raise RecipeError(
        f"{type(causal_lm).__name__} has no list of {count} layers",
        fix="use an LLM of another family for model.llm.path",
    )


def _decoder_name(causal_lm: Any) -> str:
    name: str = causal_lm.base_model_prefix
    return name if name in dict(causal_lm.named_children()) else "model"


class _Decoded:
    """A causal LM as its own forward sees it, whose decoder returns states that are there already."""

    def __init__(self, causal_lm: Any, hidden_BTh: Tensor, within: nn.Module | None) -> None:
        self._causal_lm = causal_lm
        self._within = within
        self._name = _decoder_name(causal_lm)
        self._states = _States(getattr(causal_lm, self._name), hidden_BTh)

    def __getattr__(self, name: str) -> Any:
        if name == self._name:
            return self._states
        found = getattr(self._causal_lm, name)
        return found if self._within is None or found is not self._within else _Unhooked(found)


class _Unhooked:
    """A module whose forward runs without its hooks."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._module.forward(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class _States:
    """The decoder, whose attributes a head may read, and at the same time what it returns: states and nothing else."""

    def __init__(self, decoder: Any, hidden_BTh: Tensor) -> None:
        self._decoder = decoder
        self._hidden_BTh = hidden_BTh

    def __call__(self, *_: Any, **__: Any) -> _Output:
        return _Output(self._hidden_BTh)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._decoder, name)


class _Output:
    """A decoder's output of which only the last hidden states are there."""

    def __init__(self, hidden_BTh: Tensor) -> None:
        self.last_hidden_state = hidden_BTh

    def __getitem__(self, place: int) -> Tensor | None:
        return self.last_hidden_state if place == 0 else None

    def __getattr__(self, name: str) -> None:
        return None
