"""Counts what a computation would do to a GPU: kernels, host syncs, sizes of tensors. On the CPU, by dispatch."""

from __future__ import annotations

import ast
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[1]
NOT_A_KERNEL = {"aten._unsafe_view.default", "aten.empty.memory_format", "aten.lift_fresh.default"}
WAITS = {"aten._local_scalar_dense.default", "aten.nonzero.default", "aten.masked_select.default"}
_ASKED = {"tolist", "item", "cpu", "numpy", "nonzero", "masked_select", "unique", "tensor", "as_tensor"}
"""Functions that bring numbers from the device, or Python's numbers to it."""


class Kernels(TorchDispatchMode):
    """Notes every operator with the shapes it gets, forward and backward; views are no kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[tuple[str, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = func._schema.returns[0].alias_info if func._schema.returns else None
        if str(func) not in NOT_A_KERNEL and (returned is None or returned.is_write):
            shapes = tuple(
                (tuple(arg.shape), arg.dtype) if isinstance(arg, Tensor) else arg
                for arg in torch.utils._pytree.tree_leaves((args, kwargs or {}))
            )
            self.noted.append((str(func), shapes))
        return func(*args, **(kwargs or {}))

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let compiled functions stay compiled in here."""
        return True

    def count(self, *names: str) -> int:
        return sum(name in names for name, _ in self.noted)

    def by_name(self) -> Counter[str]:
        return Counter(name for name, _ in self.noted)


class Largest(TorchDispatchMode):
    """The largest tensor that an operator makes, by the elements of its storage, and the operator."""

    def __init__(self) -> None:
        super().__init__()
        self.elements, self.operator = 0, ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        returned = func._schema.returns[0].alias_info if func._schema.returns else None
        if returned is not None and not returned.is_write:
            return found  # a view
        for tensor in torch.utils._pytree.tree_leaves(found):
            if isinstance(tensor, Tensor):
                elements = tensor.untyped_storage().nbytes() // tensor.element_size()
                if elements > self.elements:
                    self.elements, self.operator = elements, str(func)
        return found


class Sync(NamedTuple):
    """One time that the host would wait for the device, and the line of ours from which."""

    what: str
    file: str
    line: int

    @property
    def marked(self) -> bool:
        """Whether the statement says so: "host sync"."""
        return self.line in _marked_lines(self.file, "host sync")

    @property
    def unless_known(self) -> bool:
        """Whether the statement says that it is none where the host knows the numbers."""
        return self.line in _marked_lines(self.file, "host sync, where not known")


class Syncs:
    """Notes host syncs in a `with` block, forward and backward.

    Those are operators whose result the host reads or whose size depends on values (`item`, `tolist`, `nonzero`, masks
    as an index, `repeat_interleave` of unknown size), copies to the host, and tensors made of Python's numbers.
    """

    def __init__(self) -> None:
        self.noted: list[Sync] = []
        self._modes = (_Asked(self), _Dispatched(self))

    def __enter__(self) -> Self:
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)

    def note(self, what: str) -> None:
        frame = sys._getframe()
        while frame is not None:
            path = Path(frame.f_code.co_filename)
            if path.is_relative_to(ROOT / "echox"):
                self.noted.append(Sync(what, str(path.relative_to(ROOT)), frame.f_lineno))
                return
            frame = frame.f_back  # type: ignore[assignment]
        self.noted.append(Sync(what, "", 0))

    def outside(self, *files: str) -> list[Sync]:
        return [sync for sync in self.noted if sync.file not in files]


class _Asked(TorchFunctionMode):
    def __init__(self, syncs: Syncs) -> None:
        super().__init__()
        self._syncs = syncs

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        sizeless = name == "repeat_interleave" and kwargs.get("output_size") is None
        if name in _ASKED - {"item", "nonzero", "masked_select"} or sizeless:
            self._syncs.note(name)
        return func(*args, **kwargs)


class _Dispatched(TorchDispatchMode):
    def __init__(self, syncs: Syncs) -> None:
        super().__init__()
        self._syncs = syncs

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        masked = str(func).startswith("aten.index") and any(
            isinstance(part, Tensor) and part.dtype == torch.bool
            for part in torch.utils._pytree.tree_leaves(args[1] if len(args) > 1 and isinstance(args[1], list) else [])
        )
        if str(func) in WAITS or masked:
            self._syncs.note(str(func))
        return func(*args, **(kwargs or {}))


@cache
def _marked_lines(file: str, mark: str) -> frozenset[int]:
    """Lines of the innermost statements that have a comment with `mark`; none outside the project."""
    if not file:
        return frozenset()
    text = (ROOT / file).read_text(encoding="utf-8")
    lines = text.splitlines()
    found: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.stmt) and not isinstance(node, ast.FunctionDef | ast.ClassDef):
            head = node.body[0].lineno - 1 if getattr(node, "body", None) else node.end_lineno or node.lineno
            if any(mark in line.partition("#")[2] for line in lines[node.lineno - 1 : head]):
                found |= set(range(node.lineno, head + 1))
    return frozenset(found)
