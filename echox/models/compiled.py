"""Compiles the pointwise parts of transformers' layers: rotary embedding and gated activation, a region each.

What a family computes stays its own: its own rotary function and its own activation are compiled, each into one graph
forward and one backward. Flattened, they take rows of any number and length: a graph holds for every batch, in both
layouts, and there is one where gradients are needed, one where a forward alone runs, and one without gradients.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from echox.models.mixed import mix_into

ROTARY = "apply_rotary_pos_emb"
"""Name that transformers' attention modules have for their rotary function, which they take from their own file."""
_MAPS = ("gate_proj", "up_proj", "down_proj")

Compiler = Callable[[Callable[..., Any], bool], Callable[..., Any]]
"""Makes a faster function of one; the second argument says whether all sizes change, or only those that are marked."""


class CompiledParts(NamedTuple):
    """How many modules run compiled.

    Attributes:
        rotary: attention modules, which turn their queries and keys.
        gated: feed-forward modules, which multiply an activated half with another.
    """

    rotary: int
    gated: int


def by_inductor(function: Callable[..., Any], dynamic: bool) -> Callable[..., Any]:
    """One graph, or an error; Triton's kernels on a GPU, C++ on a CPU."""
    # A pool of processes that compile, in each rank, is more than a few small kernels are worth.
    compiled: Callable[..., Any] = torch.compile(
        function, fullgraph=True, dynamic=dynamic, options={"compile_threads": 1}
    )
    return compiled


def compile_pointwise(model: nn.Module, compiler: Compiler = by_inductor) -> CompiledParts:
    """Let attention and feed-forward modules of `model` run their pointwise parts compiled, at their first call.

    An attention module is one whose forward calls `apply_rotary_pos_emb` of its own file, on queries and keys. A
    feed-forward module computes down(act(gate(x)) * up(x)) with an activation that works element by element and has no
    parameters, which is tried on a small one of its class. Others stay as they are.

    Args:
        model: any module with such modules in it; tensors, hooks and names of classes stay.
        compiler: what compiles a function.
    """
    rotary = gated = 0
    for module in model.modules():
        kind: Any = type(module)
        if issubclass(kind, _Compiled):
            continue
        if (own := _rotary_of(kind)) is not None and _takes_rows(own):
            mix_into(module, _rotary_mixin(kind, compiler))
            rotary += 1
        elif (activation := _activation_of(module)) is not None and _is_gated(kind, activation):
            mix_into(module, _gated_mixin(activation, compiler))
            gated += 1
    return CompiledParts(rotary, gated)


class _Compiled(nn.Module):
    """Marks a class with a compiled part."""


@cache
def _rotary_mixin(kind: Any, compiler: Compiler) -> type[nn.Module]:
    """The forward of a class of attention, which finds a compiled function under the name of its rotary function.

    The class's file and all other users of the function go on with what they have.
    """
    forward = kind.forward
    scope = {**forward.__globals__, ROTARY: _Rotary(_rotary_of(kind), compiler)}
    rebound = types.FunctionType(forward.__code__, scope, forward.__name__, forward.__defaults__, forward.__closure__)
    rebound.__kwdefaults__ = forward.__kwdefaults__
    return type("_CompiledRotary", (_Compiled,), {"forward": rebound})


class _Rotary:
    """A family's rotary function, compiled for each number and width of heads.

    Those stay fixed in a graph, so that a kernel knows which numbers lie beside each other, and positions alone change.
    """

    def __init__(self, own: Any, compiler: Compiler) -> None:
        self._own = own
        self._compiler = compiler
        self._compiled: dict[tuple[int, ...], Callable[..., tuple[Tensor, Tensor]]] = {}

    def __call__(
        self, query_BHTD: Tensor, key_BKTD: Tensor, cos_BTD: Tensor, sin_BTD: Tensor, *others: Any, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """Turned queries and keys, in the shapes they came in."""
        rows, heads, length, width = query_BHTD.shape
        if others or options or rows * length == 1:  # of a single position a graph of its own would be made
            turned: tuple[Tensor, Tensor] = self._own(query_BHTD, key_BKTD, cos_BTD, sin_BTD, *others, **options)
            return turned
        parts = [*_positions(query_BHTD, key_BKTD), *(_of_all(part, rows) for part in (cos_BTD, sin_BTD))]
        for part in parts:
            torch._dynamo.maybe_mark_dynamic(part, 0)
        sizes = (heads, key_BKTD.shape[1], width, cos_BTD.shape[-1])
        if sizes not in self._compiled:
            self._compiled[sizes] = self._compiler(_copy_of(self._own), False)
        query_LHD, key_LKD = self._compiled[sizes](*parts)
        return _rows(query_LHD, rows), _rows(key_LKD, rows)


def _positions(*parts_BHTD: Tensor) -> list[Tensor]:
    """`[B, H, T, D]` to `[B * T, H, D]`; no copy where the heads of a position lie behind each other."""
    return [_merged(part.transpose(1, 2), part.shape[1], part.shape[3]) for part in parts_BHTD]


def _of_all(part_BTD: Tensor, rows: int) -> Tensor:
    """Cosine or sine `[1 or B, T, D]` to `[B * T, D]`."""
    return _merged(part_BTD.expand(rows, -1, -1), part_BTD.shape[2])


def _merged(part: Tensor, *sizes: int) -> Tensor:
    """`part` as `[-1, *sizes]`, no view for autograd: a graph of a view would hold for the shapes of its base alone."""
    merged: Tensor = torch.ops.aten._unsafe_view(part.contiguous(), (-1, *sizes))
    return merged


def _rows(turned_LHD: Tensor, rows: int) -> Tensor:
    return turned_LHD.view(rows, -1, *turned_LHD.shape[1:]).transpose(1, 2)


def _copy_of(function: Any) -> Any:
    """The same function with code of its own: Dynamo counts and limits the graphs of each code."""
    code = function.__code__.replace()
    copied = types.FunctionType(
        code, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied


def _rotary_of(kind: Any) -> Any:
    """The rotary function that the forward of a class calls; None where it calls none that can be replaced."""
    forward = kind.forward
    if not isinstance(forward, types.FunctionType) or ROTARY not in forward.__code__.co_names:
        return None
    own = forward.__globals__.get(ROTARY)
    return own if isinstance(own, types.FunctionType) and own.__closure__ is None else None


@cache
def _takes_rows(own: Any) -> bool:
    """Whether a rotary function turns positions of all rows as it turns rows, tried on a few numbers."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
        query, key, cos, sin = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 3, 8), *torch.randn(2, 2, 3, 8)
        parts = [*_positions(query, key), _of_all(cos, 2), _of_all(sin, 2)]
        try:
            found, wanted = own(*parts), own(query, key, cos, sin)
            return all(torch.equal(_rows(one, 2), other) for one, other in zip(found, wanted, strict=True))
        except (AttributeError, IndexError, TypeError, ValueError, RuntimeError):  # it wants something else
            return False


@dataclass(frozen=True)
class _Activation:
    """An activation without parameters; layers have one each, and those of one kind and state compute the same."""

    kind: type[nn.Module]
    state: str
    module: nn.Module = field(compare=False)

    @classmethod
    def of(cls, act: nn.Module) -> _Activation:
        own = {name: value for name, value in vars(act).items() if name not in vars(nn.Module())}
        return cls(type(act), repr(own), act)


def _activation_of(module: nn.Module) -> _Activation | None:
    """That of a module of three maps and an activation without tensors; None of another."""
    children = dict(module.named_children())
    act = children.get("act_fn")
    if act is None or children.keys() != {*_MAPS, "act_fn"} or module._parameters or act.state_dict():
        return None
    return _Activation.of(act)


@cache
def _gated_mixin(activation: _Activation, compiler: Compiler) -> type[nn.Module]:
    """The forward of a gated feed-forward module with this activation."""
    act = copy.deepcopy(activation.module)  # a model's own changes between training and evaluation

    def gated(gate_X: Tensor, up_X: Tensor) -> Tensor:
        out_X: Tensor = act(gate_X) * up_X
        return out_X

    compiled = compiler(_copy_of(gated), True)

    def forward(self: Any, x: Tensor) -> Tensor:
        """`[..., h]` to `[..., h]`."""
        gate, up = self.gate_proj(x), self.up_proj(x)
        out: Tensor = self.down_proj(compiled(_merged(gate), _merged(up)).view(gate.shape))
        return out

    return type("_CompiledGate", (_Compiled,), {"forward": forward})


@cache
def _is_gated(kind: Any, activation: _Activation) -> bool:
    """Whether modules of a class compute down(act(gate(x)) * up(x)), element by element, tried on a small one."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
        try:
            one = kind.__new__(kind)
            nn.Module.__init__(one)
            for name, sizes in zip(_MAPS, ((4, 6), (4, 6), (6, 4)), strict=True):
                one.add_module(name, nn.Linear(*sizes))
            act = one.act_fn = copy.deepcopy(activation.module)
            x_NTh = torch.randn(2, 3, 4)
            gate_NTf, up_NTf = one.gate_proj(x_NTh), one.up_proj(x_NTh)
            flat_NTf = act(_merged(gate_NTf)).view(gate_NTf.shape)
            return torch.allclose(one(x_NTh), one.down_proj(flat_NTf * up_NTf), atol=1e-6)
        except (AttributeError, IndexError, TypeError, ValueError, RuntimeError):  # it reads something else as well
            return False
