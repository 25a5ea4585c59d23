"""Seeds, captures, keeps and restores the random states of one process, so that a resumed run draws the same numbers.

They are kept as JSON: checkpoints travel between people, and to load a pickle is to run what it says.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echox.device import usable_gpus
from echox.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor


def seed_all(seed: int) -> None:
    """Seed Python, numpy and torch (all devices)."""
    import random

    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def capture() -> dict[str, Any]:
    """The states of Python, numpy, torch and the current GPU."""
    import random

    import numpy as np
    import torch

    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if usable_gpus() else None,
    }


def restore(state: dict[str, Any]) -> None:
    """Put back what `capture` returned."""
    import random

    import numpy as np
    import torch

    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and usable_gpus():
        torch.cuda.set_rng_state(state["cuda"])


def save(state: Mapping[str, Any], path: Path) -> None:
    """Write what `capture` returned; floats and integers come back as they are."""
    kind, keys, *rest = state["numpy"]
    kept = {
        "python": state["python"],
        "numpy": [kind, keys.tolist(), *rest],
        "torch": _text(state["torch"]),
        "cuda": None if state["cuda"] is None else _text(state["cuda"]),
    }
    path.write_text(json.dumps(kept), encoding="utf-8")


def restore_from(path: Path) -> None:
    """Put back what `save` wrote.

    Raises:
        CheckpointError: the file holds something else.
    """
    import numpy as np

    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        version, words, spare = kept["python"]
        kind, keys, *rest = kept["numpy"]
        restore(
            {
                "python": (version, tuple(words), spare),
                "numpy": (kind, np.array(keys, dtype=np.uint32), *rest),
                "torch": _bytes(kept["torch"]),
                "cuda": None if kept["cuda"] is None else _bytes(kept["cuda"]),
            }
        )
    except (ValueError, TypeError, KeyError, OverflowError, RuntimeError, RecursionError) as error:
        raise CheckpointError(
            f"the random states are not what a run writes: {type(error).__name__}: {error}",
            where=str(path),
            fix="resume from another checkpoint of the run",
        ) from error


def _text(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode("ascii")


def _bytes(text: str) -> Tensor:
    import torch

    return torch.frombuffer(bytearray(base64.b64decode(text, validate=True)), dtype=torch.uint8)


@contextmanager
def untouched() -> Iterator[None]:
    """Whatever the block draws, training afterwards draws as if the block had not run."""
    state = capture()
    try:
        yield
    finally:
        restore(state)
