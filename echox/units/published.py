"""Reads centroids that others have published: `.npy`, `.npz`, or scikit-learn's k-means as joblib dumps it.

A joblib dump is a pickle with the bytes of the arrays between its opcodes. To load a pickle is to run what it says, so
nothing here does: the opcodes are read as data, every class and call in them becomes an inert record of its name, and
the arrays are cut out where they lie. Layout: `NumpyArrayWrapper` of joblib 0.10 and later, uncompressed, with and
without the alignment of joblib 1.2.
"""

from __future__ import annotations

import io
import math
import pickletools
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from echox.errors import DataError
from echox.files import read_regular
from echox.units.kmeans import KMeans, read_npz

if TYPE_CHECKING:
    from numpy.typing import NDArray

ACCEPTED = ".npy, .npz (centroids, cluster_centers_ or one array alone), or an uncompressed joblib dump of a k-means"
_CENTRES = "cluster_centers_"
_LARGEST = 256 << 20
"""Bytes of a file of centroids."""
_WRAPPER = "joblib.numpy_pickle.NumpyArrayWrapper"
_NUMBERS = re.compile(r"[fiu][1248]")
_VALUES = {
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINBYTES", "SHORT_BINBYTES"),
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}


def read_published(path: Path) -> KMeans:
    """The centroids of a file, float32 [clusters, features], with mean and scale where it has them.

    Raises:
        DataError: no such file, or not one of the formats in `ACCEPTED`.
    """
    try:
        data = read_regular(path, _LARGEST)
    except (OSError, ValueError) as error:
        said = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"Cannot read the centroids: {said}", where=str(path), fix="Correct it.") from error
    try:
        if data.startswith(b"PK\x03\x04"):
            return _from_npz(path)
        if data.startswith(b"\x93NUMPY"):
            return KMeans(_floats(np.load(io.BytesIO(data), allow_pickle=False)))
        if data.startswith(b"\x80"):
            return KMeans(_floats(_of_model(DumpReader(data).read())))
        raise ValueError("its first bytes are those of no known format")
    except (ValueError, EOFError, OSError, MemoryError, zipfile.BadZipFile) as error:
        raise DataError(
            f"There are no centroids to be read in the file: {error}",
            where=str(path),
            fix=f"Give {ACCEPTED}. Nothing in a file is executed; what cannot be read without is refused.",
        ) from error


def _from_npz(path: Path) -> KMeans:
    with np.load(path, allow_pickle=False) as file:
        names = file.files
    if "centroids" in names and {"mean", "scale"} <= set(names):
        return KMeans.load(path)
    found = [name for name in ("centroids", _CENTRES) if name in names] or names
    if len(found) != 1:
        raise ValueError(f"it holds {', '.join(names) or 'nothing'}, of which none is called centroids")
    return KMeans(_floats(read_npz(path, found[0])))


def _of_model(dumped: Any) -> Any:
    if isinstance(dumped, Inert) and isinstance(dumped.state, dict):
        return dumped.state.get(_CENTRES)
    return dumped


def _floats(found: Any) -> NDArray[np.float32]:
    if not isinstance(found, np.ndarray) or found.ndim != 2 or found.dtype.kind != "f":
        kind = f"{found.dtype} {list(found.shape)}" if isinstance(found, np.ndarray) else "no array"
        raise ValueError(f"a table of floating-point numbers [clusters, features] is wanted, and there is {kind}")
    return found.astype(np.float32)


@dataclass
class Inert:
    """A class, an object or a call that a pickle names, which was neither looked up nor run.

    Attributes:
        name: module and name, such as `sklearn.cluster._kmeans.MiniBatchKMeans`.
        args: what the class or function would be called with; None for the name alone.
        state: what the object would then be filled with.
    """

    name: str
    args: Any = None
    state: Any = None


class DumpReader:
    """Reads an uncompressed joblib dump as data.

    Args:
        data: the file.
    """

    def __init__(self, data: bytes) -> None:
        self._file = io.BytesIO(data)
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def read(self) -> Any:
        """What was dumped: plain values, arrays, and `Inert` for everything else.

        Raises:
            ValueError: an opcode that dumps of a k-means do not have, or an end too early.
        """
        try:
            for opcode, argument, _ in pickletools.genops(self._file):
                if opcode.name == "STOP":
                    return self._stack.pop()
                self._step(opcode.name, argument)
        except (IndexError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"the dump is damaged ({type(error).__name__} {error})") from error
        raise ValueError("the dump has no end")

    def _step(self, opcode: str, argument: Any) -> None:
        stack = self._stack
        match opcode:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                self._marks.append(len(stack))
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "TUPLE":
                stack.append(tuple(self._since_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(self._take(int(opcode[-1]))))
            case "APPEND":
                (item,) = self._take(1)
                stack[-1].append(item)
            case "APPENDS":
                items = self._since_mark()
                stack[-1].extend(items)
            case "SETITEM":
                key, value = self._take(2)
                stack[-1][key] = value
            case "SETITEMS":
                items = self._since_mark()
                stack[-1].update(zip(items[::2], items[1::2], strict=True))
            case "MEMOIZE":
                self._memo[len(self._memo)] = stack[-1]
            case "BINPUT" | "LONG_BINPUT":
                self._memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self._memo[argument])
            case "GLOBAL":
                stack.append(Inert(argument.replace(" ", ".")))
            case "STACK_GLOBAL":
                stack.append(Inert(".".join(self._take(2))))
            case "NEWOBJ" | "REDUCE":
                named, args = self._take(2)
                stack.append(Inert(named.name, args))
            case "BUILD":
                (state,) = self._take(1)
                stack[-1].state = state
                if stack[-1].name == _WRAPPER:
                    # Its bytes follow the opcode that completes it.
                    stack[-1] = self._array(state)
            case _ if opcode in _VALUES:
                stack.append(argument)
            case _ if opcode in _CONSTANTS:
                stack.append(_CONSTANTS[opcode])
            case _:
                raise ValueError(f"no dump of a k-means has the opcode {opcode}")

    def _take(self, count: int) -> list[Any]:
        if len(self._stack) < count:
            raise ValueError("the dump takes what it has not put there")
        taken = self._stack[-count:]
        del self._stack[-count:]
        return taken

    def _since_mark(self) -> list[Any]:
        start = self._marks.pop()
        taken = self._stack[start:]
        del self._stack[start:]
        return taken

    def _array(self, state: dict[str, Any]) -> NDArray[Any]:
        """The array whose bytes begin here."""
        shape, dtype = tuple(state["shape"]), _dtype(state["dtype"])
        if any(type(size) is not int or size < 0 for size in shape) or state["order"] not in ("C", "F"):
            raise ValueError(f"an array cannot have the shape {shape} in order {state['order']}")
        if state.get("numpy_array_alignment_bytes") is not None:
            (padding,) = self._file.read(1)
            self._file.seek(padding, io.SEEK_CUR)
        size = math.prod(shape) * dtype.itemsize
        data = self._file.read(size)
        if len(data) != size:
            raise ValueError(f"an array of {size} bytes ends after {len(data)}")
        return np.frombuffer(data, dtype).reshape(shape, order=state["order"])


def _dtype(described: Inert) -> np.dtype[Any]:
    code, order = described.args[0], described.state[1]
    if described.name != "numpy.dtype" or not _NUMBERS.fullmatch(code) or order not in ("<", ">", "|"):
        raise ValueError(f"an array holds {code!r} in byte order {order!r}, not plain numbers")
    found: np.dtype[Any] = np.dtype(order.replace("|", "<") + code)
    return found
