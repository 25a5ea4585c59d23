"""Keeps all that trains in a few flat parameters; modules see views of them under the names that they always had.

ZeRO-3 works in Python on every trainable tensor: it slices each for every rank, hooks its gradient and the module that
owns it, and gathers it by itself. An LLM with LoRA has hundreds: on 512 ranks the host needs seconds for a step. Here
the tensors of one learning rate and one weight decay are one parameter. What is done with a tensor by name
(checkpoints, checks, exports) goes through `FlatTrainables.tensors`, which says where in which parameter it lies.

Each rank keeps the flat parameters whole in the dtype that the model computes in, in memory that stays where it is, and
gathers them once after each update; master weights, moments and gradients are sharded as ever. ZeRO-3's own way, which
gathers before a module's forward and lets go behind it, would gain nothing: the views that autograd saves keep the
memory until the backward has been through them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

ALIGNMENT = 64
"""Elements; tensors begin at multiples of it, as fast kernels want."""
HOLDER = "flat_trainables"
"""Name of the module within the stage that owns the flat parameters; it has no forward, so ZeRO-3 never gathers it."""


class Place(NamedTuple):
    """Where a named tensor lies.

    Attributes:
        name, shape: as the model has it.
        flat: number of the flat parameter.
        start: its first element there.
    """

    name: str
    shape: torch.Size
    flat: int
    start: int

    @property
    def stop(self) -> int:
        """The element behind its last."""
        return self.start + self.shape.numel()

    def within(self, start: int, stop: int) -> tuple[int, int]:
        """First element, and the one behind the last, of the part that lies in a range of the flat parameter.

        Both count from the tensor's own first element; they are equal where nothing does.
        """
        first = min(max(start, self.start), self.stop)
        return first - self.start, max(first, min(stop, self.stop)) - self.start


@dataclass(frozen=True)
class Group:
    """Names of the trainable tensors that have one learning rate and one weight decay."""

    rate: str
    decays: bool
    names: tuple[str, ...]


class FlatTrainables(nn.Module):
    """Owns the flat parameters of a stage.

    Args:
        stage: its trainable parameters are taken away from the modules that have them.
        groups: all of their names, once.
        ranks: the flat parameters have a multiple of so many elements.

    Attributes:
        flats: the flat parameters.
        groups: of each of them.
        tensors: where each named tensor lies, in the order of the model.
    """

    def __init__(self, stage: nn.Module, groups: Sequence[Group], ranks: int) -> None:
        super().__init__()
        named = {name: parameter for name, parameter in stage.named_parameters() if parameter.requires_grad}
        owners = _owners(stage)
        stacks = _stacks(stage)
        self.groups: list[Group] = []
        # Beside the module's own table: ZeRO-3 gathers what is looked up there during a forward.
        self.flats: list[Any] = []
        self._blocks: list[list[_Block]] = []
        places: dict[str, Place] = {}
        for group in groups:
            for dtype in sorted({named[name].dtype for name in group.names}, key=str):
                names = [name for name in group.names if named[name].dtype == dtype]
                blocks = list(_blocks(names, named, owners, stacks))
                size = sum(block.padded for block in blocks)
                padding = -size % (ranks * ALIGNMENT)
                data = torch.zeros(size + padding, dtype=dtype, device=named[names[0]].device)
                start = 0
                for block in blocks:
                    at = start
                    for name in block.names:
                        places[name] = Place(name, named[name].shape, len(self.flats), at)
                        if data.device.type != "meta":
                            data[at : places[name].stop].copy_(named[name].detach().reshape(-1))
                        at = places[name].stop
                    start += block.padded
                self.groups.append(Group(group.rate, group.decays, tuple(names)))
                self._blocks.append([*blocks, _Block((), torch.Size((0,)), padding, ())])
                flat = nn.Parameter(data)
                self.register_parameter(f"{group.rate}_{len(self.flats)}", flat)
                self.flats.append(flat)
        self.tensors = [places[name] for name in named]
        for name in named:
            for module, attribute in owners[id(named[name])]:
                del module._parameters[attribute]
        with torch.no_grad():
            self.bind()

    def bind(self) -> None:
        """Give every module views of what it trains; they take part in the graph where gradients are enabled."""
        for flat, blocks in zip(self.flats, self._blocks, strict=True):
            pieces = flat.split([block.padded for block in blocks])
            for piece, block in zip(pieces, blocks, strict=True):
                if block.slots:
                    size = block.shape.numel()
                    view = (piece if size == block.padded else piece[:size]).view(block.shape)
                    for owner, attribute in block.slots:
                        owner.__dict__[attribute] = view  # a module's own way would look through its dictionaries


class _Block(NamedTuple):
    """Tensors that one view covers: one of them, or several stacked along their first axis."""

    names: tuple[str, ...]
    shape: torch.Size
    padded: int
    slots: tuple[tuple[Any, str], ...]


def _owners(stage: nn.Module) -> Mapping[int, list[tuple[nn.Module, str]]]:
    """Modules and attributes of every parameter: a shared one has several."""
    found: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
    for module in stage.modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                found[id(parameter)].append((module, attribute))
    return found


def _stacks(stage: nn.Module) -> dict[int, tuple[tuple[Any, str], list[nn.Parameter]]]:
    """What modules want stacked (`stacked_weights`), by the first parameter's identity."""
    found: dict[int, tuple[tuple[Any, str], list[nn.Parameter]]] = {}
    for module in stage.modules():
        for owner, attribute, members in getattr(module, "stacked_weights", tuple)():
            weights = [member.weight for member in members]
            found[id(weights[0])] = ((owner, attribute), weights)
    return found


def _blocks(
    names: Sequence[str],
    named: Mapping[str, nn.Parameter],
    owners: Mapping[int, list[tuple[nn.Module, str]]],
    stacks: Mapping[int, tuple[tuple[Any, str], list[nn.Parameter]]],
) -> Iterator[_Block]:
    name_of = {id(named[name]): name for name in names}
    stacked = {
        id(weight)
        for _, weights in stacks.values()
        if all(id(each) in name_of for each in weights)
        for weight in weights[1:]
    }
    for name in names:
        parameter = named[name]
        if id(parameter) in stacked:
            continue
        slot, weights = stacks.get(id(parameter), (None, []))
        if slot is not None and all(id(each) in name_of for each in weights):
            rows = sum(each.shape[0] for each in weights)
            shape, members = torch.Size((rows, *parameter.shape[1:])), tuple(name_of[id(each)] for each in weights)
            yield _Block(members, shape, _aligned(shape.numel()), (slot,))
        else:
            yield _Block((name,), parameter.shape, _aligned(parameter.numel()), tuple(owners[id(parameter)]))


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def whole(flat: Any, buffer: Tensor) -> None:
    """Gather a flat parameter's slices of all ranks into `buffer`, in one collective operation."""
    import deepspeed.comm as dist

    dist.all_gather_into_tensor(buffer, flat.ds_tensor.detach().to(buffer.device, non_blocking=True))


class Piece(NamedTuple):
    """What a rank holds of a named tensor.

    Attributes:
        place: the tensor.
        start, stop: the part's first element, and the one behind its last, of the tensor.
        offset: of the part within the rank's slice of the flat parameter.
    """

    place: Place
    start: int
    stop: int
    offset: int


def pieces(trainables: FlatTrainables, rank: int, ranks: int) -> Iterator[Piece]:
    """A rank's part of every named tensor, which may be empty; ZeRO-3 gives all ranks slices of one size."""
    for place in trainables.tensors:
        size = trainables.flats[place.flat].ds_numel // ranks
        start, stop = place.within(rank * size, (rank + 1) * size)
        yield Piece(place, start, stop, min(max(place.start - rank * size, 0), size))
