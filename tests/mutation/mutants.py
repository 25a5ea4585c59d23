"""Makes mutants of a module: copies of its syntax tree, each with one small change that a test should notice."""

from __future__ import annotations

import ast
import copy
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

Step = tuple[str, int | None]
"""Field of a node, and index where the field is a list."""

COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
}
FACTORS = (ast.Mult, ast.BitAnd, ast.BitOr)
"""Operators of which one side is left out: a mask or a weight that is no longer applied."""
_PAIRS = (("any", "all"), ("min", "max"), ("argmin", "argmax"), ("zeros", "ones"), ("zeros_like", "ones_like"),
          ("new_zeros", "new_ones"), ("cumsum", "cumprod"), ("minimum", "maximum"))  # fmt: skip
OPPOSITES = {name: other for pair in _PAIRS for name, other in (pair, pair[::-1])}
TRANSPARENT = frozenset(
    {"clamp", "masked_fill", "cumprod", "cumsum", "detach", "float", "long", "bool", "abs", "copy", "clone", "strip",
     "lower", "round", "log", "to", "sort", "eval", "requires_grad_", "left_padded", "softmax", "from_padded",
     "to_padded", "exp", "flatten", "scatter", "log_softmax"}
)  # fmt: skip
"""Methods whose receiver could pass for their result."""


@dataclass(frozen=True)
class Mutant:
    """One change of one module.

    Attributes:
        module: path of the file, from the root of the project.
        line: text of the line that the change begins on.
        operator: kind of the change.
        change: what it replaces by what, as source.
        nth: which one it is of those that read the same, from 0.
        lines: first and last line of the statement, or of its header.
        in_function: False for what runs at import.
        edit: where in the syntax tree, and the node that comes there; None deletes a statement.
    """

    module: str
    line: str
    operator: str
    change: str
    nth: int
    lines: tuple[int, int]
    in_function: bool
    edit: tuple[tuple[Step, ...], ast.AST | None]

    @property
    def id(self) -> str:
        """Ten hex digits that stay the same while other lines of the module change."""
        return self.rank("")[:10]

    def rank(self, seed: str) -> str:
        """Place in the order in which a seed selects mutants."""
        text = "\n".join((seed, self.module, self.line, self.operator, self.change, str(self.nth)))
        return hashlib.sha256(text.encode()).hexdigest()

    def apply(self, tree: ast.Module) -> ast.Module:
        """The module with the change; what is not changed is shared with `tree`."""
        path, new = self.edit
        mutated = copy.copy(tree)
        node: Any = mutated
        for number, (field, index) in enumerate(path, 1):
            old = getattr(node, field) if index is None else getattr(node, field)[index]
            last = number == len(path)
            put = copy.copy(old) if not last else copy.deepcopy(ast.Pass() if new is None else new)
            if last:
                ast.fix_missing_locations(ast.copy_location(put, old))
            if index is None:
                setattr(node, field, put)
            else:
                setattr(node, field, [*getattr(node, field)[:index], put, *getattr(node, field)[index + 1 :]])
            node = put
        return mutated


@dataclass(frozen=True)
class Rewritten(Mutant):
    """A mutant that was thought of: text in place of text."""

    source: str = ""

    def rank(self, seed: str) -> str:
        """Before every mutant that was generated."""
        return "" if seed else hashlib.sha256(f"{self.module}\n{self.change}".encode()).hexdigest()

    def apply(self, tree: ast.Module) -> ast.Module:
        """The module with the change."""
        return ast.parse(self.source)


def rewritten(name: str, module: str, source: str, old: str, new: str) -> Rewritten:
    """A mutant by its name.

    Raises:
        ValueError: the old text does not stand in the module exactly once.
    """
    if source.count(old) != 1:
        raise ValueError(f"{module} has {source.count(old)} times {old!r}")
    first = source[: source.index(old)].count("\n") + 1
    line = source.splitlines()[first - 1].strip()
    lines = (first, first + old.count("\n"))
    return Rewritten(module, line, "named", name, 0, lines, True, ((), None), source.replace(old, new))


def mutants_of(module: str, source: str) -> list[Mutant]:
    """Every mutant of a module, in the order of its lines; docstrings, annotations and raised messages stay."""
    tree, text = ast.parse(source), source.splitlines()
    found: list[Mutant] = []
    seen: dict[tuple[str, str, str], int] = {}
    for path, old, new, operator, lines, in_function in _Walk().module(tree):
        line = text[old.lineno - 1].strip()
        change = f"{_short(old)} -> {'' if new is None else _short(new)}".strip()
        key = (line, operator, change)
        seen[key] = seen.get(key, -1) + 1
        found.append(Mutant(module, line, operator, change, seen[key], lines, in_function, (path, new)))
    return found


def _short(node: ast.AST) -> str:
    text = " ".join(ast.unparse(node).split())
    return text if len(text) <= 90 else f"{text[:60]} … {text[-27:]}"


Found = tuple[tuple[Step, ...], Any, ast.AST | None, str, tuple[int, int], bool]


class _Walk:
    """Walks statements, remembering where it is and which names the function has assigned."""

    def __init__(self) -> None:
        self.path: list[Step] = []
        self.lines = (0, 0)
        self.depth = 0
        self.assigned: set[str] = set()

    def module(self, tree: ast.Module) -> Iterator[Found]:
        yield from self._body(tree, "body")

    def _found(self, old: ast.AST, new: ast.AST | None, operator: str) -> Found:
        return tuple(self.path), old, new, operator, self.lines, self.depth > 0

    def _body(self, node: ast.AST, field: str) -> Iterator[Found]:
        for index, statement in enumerate(getattr(node, field)):
            self.path.append((field, index))
            yield from self._statement(statement, first=index == 0)
            self.path.pop()

    def _statement(self, node: ast.stmt, *, first: bool) -> Iterator[Found]:
        if isinstance(node, ast.Import | ast.ImportFrom | ast.Assert | ast.Global | ast.Pass):
            return
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            return  # a docstring, or the ellipsis of a protocol
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield from self._definition(node)
            return
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        inner = getattr(node, "body", None)
        end = (inner[0].lineno - 1 if inner[0].lineno > node.lineno else node.lineno) if inner else node.end_lineno
        before, self.lines = self.lines, (node.lineno, end or node.lineno)
        if self._deletable(node):
            yield self._found(node, None, "delete")
        if isinstance(node, ast.AugAssign) and type(node.op) in ARITHMETIC:
            yield self._found(node, ast.AugAssign(node.target, ARITHMETIC[type(node.op)](), node.value), "arithmetic")
        if isinstance(node, ast.Raise):
            self.lines = before
            return
        if isinstance(node, ast.If | ast.While):
            self.path.append(("test", None))
            yield self._found(node.test, ast.UnaryOp(ast.Not(), node.test), "negate")
            self.path.pop()
        if isinstance(node, ast.Return) and node.value is not None:
            self.path.append(("value", None))
            if isinstance(node.value, ast.Tuple) and len(node.value.elts) > 1:
                first_two = [node.value.elts[1], node.value.elts[0], *node.value.elts[2:]]
                yield self._found(node.value, ast.Tuple(first_two, ast.Load()), "return")
            elif not isinstance(node.value, ast.Constant):
                yield self._found(node.value, ast.Constant(None), "return")
            self.path.pop()
        if isinstance(node, ast.Assign):
            self.assigned |= {name.id for t in node.targets for name in ast.walk(t) if isinstance(name, ast.Name)}
        for field, value in ast.iter_fields(node):
            if field in ("annotation", "targets", "target") and not isinstance(node, ast.For):
                continue
            if field in ("body", "orelse", "finalbody") and isinstance(value, list):
                yield from self._body(node, field)
            elif field == "handlers":
                for index, handler in enumerate(value):
                    self.path.append((field, index))
                    yield from self._body(handler, "body")
                    self.path.pop()
            else:
                yield from self._field(field, value)
        self.lines = before

    def _definition(self, node: ast.FunctionDef | ast.ClassDef) -> Iterator[Found]:
        before, self.lines = self.lines, (node.lineno, node.body[0].lineno - 1)
        names, self.assigned = self.assigned, set()
        if isinstance(node, ast.FunctionDef):
            self.assigned = {argument.arg for argument in ast.walk(node.args) if isinstance(argument, ast.arg)}
            self.path.append(("args", None))
            for field in ("defaults", "kw_defaults"):
                yield from self._field(field, getattr(node.args, field))
            self.path.pop()
            self.depth += 1
        yield from self._body(node, "body")
        self.depth -= isinstance(node, ast.FunctionDef)
        self.lines, self.assigned = before, names

    def _deletable(self, node: ast.stmt) -> bool:
        if isinstance(node, ast.Assign):
            places = ast.Attribute | ast.Subscript
            return all(isinstance(t, places) or getattr(t, "id", None) in self.assigned for t in node.targets)
        return isinstance(node, ast.Expr | ast.AugAssign | ast.Break | ast.Continue | ast.Raise)

    def _field(self, field: str, value: Any) -> Iterator[Found]:
        if isinstance(value, ast.AST):
            self.path.append((field, None))
            yield from self._expression(value)
            self.path.pop()
        elif isinstance(value, list):
            for index, item in enumerate(value):
                if isinstance(item, ast.AST):
                    self.path.append((field, index))
                    yield from self._expression(item)
                    self.path.pop()

    def _expression(self, node: ast.AST) -> Iterator[Found]:
        if isinstance(node, ast.JoinedStr):
            return
        for new, operator in _changes(node):
            yield self._found(node, new, operator)
        for field, value in ast.iter_fields(node):
            if field != "annotation":
                yield from self._field(field, value)


def _changes(node: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    match node:
        case ast.Compare():
            for index, old in enumerate(node.ops):
                for new in COMPARISONS[type(old)]:
                    ops = [*node.ops[:index], new(), *node.ops[index + 1 :]]
                    yield ast.Compare(node.left, ops, node.comparators), "compare"
        case ast.BinOp(left, op, right):
            if type(op) in ARITHMETIC:
                yield ast.BinOp(left, ARITHMETIC[type(op)](), right), "arithmetic"
            if isinstance(op, FACTORS):
                yield left, "drop factor"
                yield right, "drop factor"
        case ast.BoolOp(op, values):
            yield ast.BoolOp(ast.Or() if isinstance(op, ast.And) else ast.And(), values), "boolean"
            for index in range(len(values)):
                rest = [*values[:index], *values[index + 1 :]]
                yield rest[0] if len(rest) == 1 else ast.BoolOp(op, rest), "drop factor"
        case ast.UnaryOp(ast.Not() | ast.Invert() | ast.USub(), operand):
            yield operand, "boolean" if not isinstance(node.op, ast.USub) else "arithmetic"
        case ast.Constant(bool() as value):
            yield ast.Constant(not value), "constant"
        case ast.Constant(int() | float() as value):
            yield ast.Constant(value + 1), "constant"
            yield ast.Constant(value - 1), "constant"
        case ast.IfExp(test, body, orelse):
            yield ast.IfExp(test, orelse, body), "negate"
        case ast.Slice(lower, upper, step):
            if lower is not None:
                yield ast.Slice(None, upper, step), "drop bound"
            if upper is not None:
                yield ast.Slice(lower, None, step), "drop bound"
        case ast.ListComp(elt, [ast.comprehension(target, iterable, [_, *rest])]):
            yield ast.ListComp(elt, [ast.comprehension(target, iterable, rest, 0)]), "drop condition"
        case ast.GeneratorExp(elt, [ast.comprehension(target, iterable, [_, *rest])]):
            yield ast.GeneratorExp(elt, [ast.comprehension(target, iterable, rest, 0)]), "drop condition"
        case ast.Call():
            yield from _calls(node)


def _calls(node: ast.Call) -> Iterator[tuple[ast.AST, str]]:
    func, positional = node.func, node.args
    if isinstance(func, ast.Attribute) and func.attr in TRANSPARENT:
        yield func.value, "drop call"
    if isinstance(func, ast.Attribute) and func.attr in OPPOSITES:
        yield ast.Call(ast.Attribute(func.value, OPPOSITES[func.attr], ast.Load()), positional, node.keywords), "name"
    if isinstance(func, ast.Name) and func.id in OPPOSITES:
        yield ast.Call(ast.Name(OPPOSITES[func.id], ast.Load()), positional, node.keywords), "name"
    for index, keyword in enumerate(node.keywords):
        if keyword.arg is not None and keyword.arg not in ("strict", "device", "dtype"):
            rest = [*node.keywords[:index], *node.keywords[index + 1 :]]
            yield ast.Call(func, positional, rest), "drop argument"
    plain = len(positional) > 1 and not any(isinstance(a, ast.Starred | ast.Constant) for a in positional[:2])
    if plain and ast.dump(positional[0]) != ast.dump(positional[1]):
        yield ast.Call(func, [positional[1], positional[0], *positional[2:]], node.keywords), "swap arguments"
