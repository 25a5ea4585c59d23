"""Marks of the schema: which keys may change when a run is resumed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from echox.config import schema
from echox.config.schema import Recipe, change_of
from echox.config.section import Change, Free, Guarded, Section

FREE = {
    "name",
    "scale",
    "storage",
    "scaling",
    "tracking",
    "health",
    *(f"engine.{key}" for key in ("deepspeed", "frozen_placement", "activation_checkpointing", "validate_every")),
    *("engine.deterministic", "engine.compile"),
    *(f"engine.{key}" for key in ("checkpoint_every", "async_save", "keep", "keep_every", "keep_best", "log_every")),
    "model.echo.respond.batch",
    *(f"data.{key}" for key in ("valid", "micro_batch", "reader_threads", "prefetch", "quarantine")),
}
GUARDED = {
    "init",
    "seed",
    *(f"model.{part}.path" for part in ("llm", "speech_encoder")),
    *(f"data.{key}" for key in ("train", "global_batch", "batch_for", "budget", "window_shards", "pool", "weight_by")),
}


def keys(section: type[Section] = Recipe, prefix: str = "") -> Iterator[str]:
    """Every section, list and value of the schema."""
    for name, field in section.model_fields.items():
        yield prefix + name
        inner = schema.section_in(field.annotation)
        if inner is not None:
            yield from keys(inner, f"{prefix}{name}.")


def below(key: str, marked: set[str]) -> bool:
    return any(f"{key}.".startswith(f"{other}.") for other in marked)


def test_the_free_and_the_guarded_keys_are_these_and_no_others() -> None:
    """A key added to either list can change unnoticed in a resumed run: that is a decision, so it is made here too."""
    for key in keys():
        expected = Change.FREE if below(key, FREE) else Change.GUARDED if below(key, GUARDED) else Change.REFUSED
        assert change_of(key) is expected, key
    assert {key for key in FREE | GUARDED if key not in set(keys())} == set()


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("health.gone", Change.FREE),
        ("scaling.workers.0", Change.FREE),
        ("data.train.0.path", Change.GUARDED),
        ("init.other", Change.GUARDED),
        ("model.llm.path.0", Change.GUARDED),
        ("engine.gone", Change.REFUSED),
        ("data", Change.REFUSED),
        ("names", Change.REFUSED),
        ("new.key", Change.REFUSED),
    ],
)
def test_a_key_outside_the_schema_has_the_mark_of_its_section(key: str, change: Change) -> None:
    assert change_of(key) is change


def test_a_field_has_its_own_mark_before_that_of_its_section() -> None:
    class Inner(Section):
        seed: Guarded[int] = 1
        other: int = 1

    class Outer(Section):
        inner: Free[Inner | None] = None

    assert change_of("inner", Outer) is change_of("inner.other", Outer) is Change.FREE
    assert change_of("inner.seed", Outer) is Change.GUARDED
