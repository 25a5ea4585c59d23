"""Gives modules of other libraries another forward or another way to move, by a class put before their own."""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import nn


def mix_into(module: nn.Module, mixin: type[nn.Module]) -> None:
    """Put a class before that of `module`, once; tensors, hooks and the name stay as they are."""
    if not isinstance(module, mixin):
        kinds: tuple[Any, Any] = (mixin, type(module))
        module.__class__ = _mixed(*kinds)


@cache
def _mixed(mixin: Any, kind: Any) -> Any:
    """Both classes in one, under the name of the second, which transformers' own code may ask for."""
    return type(kind.__name__, (mixin, kind), {"__module__": kind.__module__})
