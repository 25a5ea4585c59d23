"""Decides where frozen weights lie while a run trains: in ZeRO-3's partitions, once a node, or whole on each rank."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING, Any, Literal

from echox.errors import RecipeError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from echox.engine.world import World

Placement = Literal["shard", "hpz", "replicate"]
Asked = Literal["shard", "hpz", "replicate", "auto"]
AFFORDABLE = 0.25
"""Share of a rank's memory that frozen weights may take whole before `auto` divides them."""
HPZ_KEY = "zero_hpz_partition_size"


def choose_placement(asked: Asked, *, frozen_bytes: int, memory_bytes: int, nodes: int) -> Placement:
    """Where frozen weights go.

    Args:
        asked: by the recipe. `auto`: whole where they take at most a quarter of the memory, once a node where there are
            several, else in partitions. `hpz` on one node: partitions, which are in that node already.
        frozen_bytes: of all frozen weights as they compute.
        memory_bytes: of the rank that has the least.
        nodes: on which the ranks are.
    """
    if asked == "replicate" or (asked == "auto" and frozen_bytes <= AFFORDABLE * memory_bytes):
        return "replicate"
    return "hpz" if asked != "shard" and nodes > 1 else "shard"


def place_frozen(
    asked: Asked, module: nn.Module, dtype: torch.dtype, world: World, config: dict[str, Any]
) -> Placement:
    """Choose for all ranks the same, and tell ZeRO-3 the size of a node in its configuration where that decides.

    A DeepSpeed JSON that sets `zero_hpz_partition_size` itself keeps it, and makes `hpz` of `shard`.

    Raises:
        RecipeError: the ranks of a group of so many are not on one node.
    """
    frozen = {id(p): p.numel() for p in module.parameters() if not p.requires_grad}
    hosts, memories = zip(*world.all_gather((socket.gethostname(), memory_of(world.device))), strict=True)
    nodes = len(set(hosts))
    placement = choose_placement(
        asked,
        frozen_bytes=sum(frozen.values()) * dtype.itemsize,
        # On a CPU the ranks of a node share its memory.
        memory_bytes=min(
            m // (hosts.count(h) if world.device.type == "cpu" else 1) for h, m in zip(hosts, memories, strict=True)
        ),
        nodes=nodes,
    )
    zero = config["zero_optimization"]
    if placement == "replicate":
        return placement
    group = int(zero.get(HPZ_KEY, 1))
    if placement == "hpz" and group == 1:
        group = zero[HPZ_KEY] = world.size // nodes
        check_groups(hosts, group)
    return "hpz" if group > 1 else "shard"


def check_groups(hosts: tuple[str, ...], group: int) -> None:
    """Raise RecipeError unless every `group` ranks in a row, of which there is a whole number, have one host."""
    for first in range(0, len(hosts), group):
        own = hosts[first : first + group]
        if len(own) < group or len(set(own)) > 1:
            raise RecipeError(
                f"engine.frozen_placement=hpz keeps the frozen weights once a node, and ranks {first} to "
                f"{first + len(own) - 1} are not one of {len(set(hosts))} nodes of {group} ranks each",
                fix="start as many ranks on every node, one node after the other, or set it to shard",
            )


def memory_of(device: torch.device) -> int:
    """Bytes that a GPU has, or the whole machine."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
