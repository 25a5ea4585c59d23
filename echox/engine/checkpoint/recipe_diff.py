"""Which changes of its recipe a run may go on with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

FREE = (
    "name",
    "scale",
    "storage",
    "scaling",
    "tracking",
    "health",
    *(f"engine.{key}" for key in ("deepspeed", "frozen_placement", "activation_checkpointing", "validate_every")),
    *(f"engine.{key}" for key in ("checkpoint_every", "async_save", "keep", "keep_every", "keep_best", "log_every")),
    *(f"data.{key}" for key in ("valid", "micro_batch", "reader_threads", "prefetch", "quarantine")),
)
"""What says where and how a run computes, but not what: it may change at every resume."""
GUARDED = (
    "init",
    "seed",
    *(f"model.{part}.path" for part in ("llm", "speech_encoder")),
    *(f"data.{key}" for key in ("train", "global_batch", "budget", "window_shards", "pool", "weight_by")),
)
"""What others watch more closely: frozen models by their hashes, the data by their fingerprints and plan."""


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Dotted key, old and new value of everything that differs; None where a side lacks the key."""
    old, new = dict(_leaves(before)), dict(_leaves(now))
    return [
        (key, old.get(key), new.get(key)) for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)
    ]


def refused_changes(
    before: Mapping[str, Any], now: Mapping[str, Any], allow: Sequence[str] = ()
) -> list[tuple[str, Any, Any]]:
    """The changes that would make another training of the run, unless `allow` names them.

    A word of `allow` names a key in full, a section, or any key or section of that last name: `lr` is `optim.lr`.
    """
    return [
        (key, old, new)
        for key, old, new in changes(before, now)
        if not _within(key, (*FREE, *GUARDED)) and not any(_names(word, key) for word in allow)
    ]


def _within(key: str, sections: Sequence[str]) -> bool:
    return any(key == section or key.startswith(f"{section}.") for section in sections)


def _names(word: str, key: str) -> bool:
    return _within(key, (word,)) or word in key.split(".")


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
