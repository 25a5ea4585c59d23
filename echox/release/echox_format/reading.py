"""Reads the tensors of a release after their names, shapes and types were compared with what belongs to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from echox.errors import CheckpointError, MissingModelError
from echox.files import names_inside, read_json
from echox.release.folders import belongs

if TYPE_CHECKING:
    from torch import Tensor

INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"
TYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
"""Number formats that a release may be in, by their names in the file."""


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a file says of one tensor.

    Attributes:
        file: where it lies.
        shape: of the tensor.
        dtype: as safetensors writes it.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: str


def read_headers(release: Path) -> tuple[dict[str, Header], list[str]]:
    """Every tensor of a release, and what is wrong with its files.

    Raises:
        MissingModelError: there are no safetensors files.
    """
    from safetensors import SafetensorError, safe_open

    names, problems = _files(release)
    found: dict[str, Header] = {}
    for name in names:
        path = release / name
        try:
            with safe_open(str(path), "pt") as file:
                for key in file.keys():  # noqa: SIM118  # an opened file is no mapping
                    part = file.get_slice(key)
                    found[key] = Header(file=path, shape=tuple(part.get_shape()), dtype=part.get_dtype())
        except FileNotFoundError:
            problems.append(f"{name} is missing")
        except (SafetensorError, OSError) as error:
            problems.append(f"{name} cannot be read, it is damaged or cut short: {error}")
    return found, problems


def _files(release: Path) -> tuple[list[str], list[str]]:
    if not (release / INDEX).is_file():
        if not (release / WHOLE).is_file() or not belongs(release, release / WHOLE):
            raise MissingModelError(
                f"there are neither {WHOLE} nor {INDEX}", where=str(release), fix="name the folder of a whole release"
            )
        return [WHOLE], []
    try:
        index = read_json(release / INDEX)
        names = sorted({str(name) for name in index["weight_map"].values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [], [f"{INDEX} cannot be read: {error}"]
    outside = [name for name in names if not (names_inside(name) and belongs(release, release / name))]
    return [name for name in names if name not in outside], [
        f"{INDEX} names a file outside of the folder: {name!r:.80}" for name in outside
    ]


def compare(headers: Mapping[str, Header], expected: Mapping[str, tuple[int, ...]]) -> tuple[list[str], list[str]]:
    """What is wrong with the tensors that a release should have, and the names of those that it should not."""
    problems = [f"{name} is missing" for name in expected if name not in headers]
    for name, shape in expected.items():
        if name not in headers:
            continue
        header = headers[name]
        if header.shape != shape:
            problems.append(f"{name} is {_shown(header.shape)}, config.json makes it {_shown(shape)}")
        elif header.dtype not in TYPES:
            problems.append(f"{name} is of type {header.dtype}, not one of {', '.join(TYPES.values())}")
    return problems, sorted(headers.keys() - expected.keys())


def read_all(headers: Mapping[str, Header], names: list[str]) -> dict[str, Tensor]:
    """Tensors of these names.

    Raises:
        CheckpointError: one cannot be read, or holds numbers that are not finite; names them.
    """
    from safetensors import SafetensorError, safe_open

    tensors: dict[str, Tensor] = {}
    for path in sorted({headers[name].file for name in names}):
        try:
            with safe_open(str(path), "pt") as file:
                tensors |= {name: file.get_tensor(name) for name in names if headers[name].file == path}
        except (SafetensorError, OSError) as error:
            what = f"{path.name} cannot be read: {error}"
            raise CheckpointError(what, where=str(path), fix="copy it again") from error
    bad = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
    if bad:
        raise refused(path.parent, [f"{name} holds numbers that are not finite" for name in bad])
    return tensors


def refused(release: Path, problems: list[str]) -> CheckpointError:
    """The error that lists all problems of a release."""
    fix = "copy the release again, or name another"
    if len(problems) == 1:
        return CheckpointError(f"the release cannot be imported: {problems[0]}", where=str(release), fix=fix)
    shown = [f"  - {problem}" for problem in problems[:_MOST]]
    rest = [f"  - and {len(problems) - _MOST} more"] if len(problems) > _MOST else []
    first = f"the release {release} cannot be imported, for {len(problems)} reasons:"
    return CheckpointError("\n".join([first, *shown, *rest, "Nothing was written."]), fix=fix)


_MOST = 40
"""Problems that are shown one by one."""


def _shown(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a single number"
