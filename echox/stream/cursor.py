"""Saves a stream's position as one small record for all ranks, and decides whether a stream may resume from it.

It holds no rank, worker or random state: any world size, split and thread count continues the same stream.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict, cast

from echox.errors import CheckpointError
from echox.stream.accounting import Accounts
from echox.stream.sampling.blend import Blend, BlendVersion
from echox.stream.sampling.plan import DatasetRecord, Plan, StepAddress

VERSION = 2
_FIELDS = {
    **{name: f"data.budget.{name}" for name in ("by", "size", "micro_batches")},
    "padded": "padding under data.budget (model.layout)",
    "repeat": "repeat in data.train",
    "blend": "blending by weight in data.train",
    "format": "the version of the plan",
}


class SourceRecord(DatasetRecord):
    """One source of the stream: how far its order had come at the start of the window, and what it has given."""

    window_starts: dict[str, int]
    consumed: dict[str, float]


class QuarantineRecord(TypedDict):
    """Samples that were dropped: their number, the sum of their hashes, and how many of each kind of damage."""

    samples: int
    multiset: str
    kinds: dict[str, int]


class StreamRecord(TypedDict):
    """Where a stream stands; JSON types.

    Attributes:
        version: of this record.
        seed, plan, plan_hash: of the order: seed, parameters of the plan, and their hash.
        sources: the datasets, in order.
        blend: versions of the weights; None for a union.
        epoch, window, step: address of the next step.
        samples, tokens: seen so far.
        multiset: sum of the hashes of all visits.
        quarantined: what was dropped.
        passed_over: samples left out by rewinding.
    """

    version: int
    seed: int
    plan: dict[str, Any]
    plan_hash: str
    sources: list[SourceRecord]
    blend: list[dict[str, Any]] | None
    epoch: int
    window: int
    step: int
    samples: int
    tokens: float
    multiset: str
    quarantined: QuarantineRecord
    passed_over: int


def record(plan: Plan, address: StepAddress, accounts: Accounts) -> StreamRecord:
    """The state after the step before `address`; JSON types."""
    cursors = plan.order.cursors(address.epoch, address.window)
    booked = accounts.to_json()
    sources: list[SourceRecord] = [
        {**source, "window_starts": cursor, "consumed": consumed}
        for source, cursor, consumed in zip(plan.data(), cursors, booked["sources"], strict=True)
    ]
    return {
        "version": VERSION,
        "seed": plan.seed,
        "plan": plan.parameters(),
        "plan_hash": plan.digest(),
        "sources": sources,
        "blend": [version.to_json() for version in plan.order.versions] if isinstance(plan.order, Blend) else None,
        "epoch": address.epoch,
        "window": address.window,
        "step": address.step,
        "samples": accounts.seen,
        "tokens": float(accounts.table[:, 2].sum()),
        "multiset": booked["multiset"],
        "quarantined": {
            "samples": accounts.quarantined,
            "multiset": booked["quarantined_multiset"],
            "kinds": booked["kinds"],
        },
        "passed_over": booked["passed_over"],
    }


def differences(plan: Plan, saved: StreamRecord) -> list[str]:
    """What of datasets, plan and seed is not as it was, a clause each, by the recipe's names."""
    found: list[str] = []
    if plan.seed != saved["seed"]:
        found.append(f"seed is {plan.seed} and was {saved['seed']}")
    before, now = saved["sources"], plan.data()
    if len(before) != len(now):
        found.append(f"data.train has {len(now)} sources and had {len(before)}")
    for index, (old, new) in enumerate(zip(before, now, strict=False)):
        what = f"data.train.{index} ({new['path']})"
        if old["task"] != new["task"]:
            found.append(f"the task of {what} is {new['task']} and was {old['task']}")
        if old["fingerprint"] != new["fingerprint"]:
            now_is, was = _short(new["fingerprint"]), _short(old["fingerprint"])
            found.append(f"the fingerprint of {what} is {now_is} and was {was}")
    parameters = plan.parameters()
    for name in sorted(parameters.keys() | saved["plan"].keys()):
        values = parameters.get(name), saved["plan"].get(name)
        if values[0] != values[1]:
            found.append(f"{_FIELDS.get(name, f'data.{name}')} is {values[0]} and was {values[1]}")
    return found


def resume(
    plan: Plan, record: Mapping[str, Any], accounts: Accounts, *, accept_new_data: bool, where: str
) -> tuple[StepAddress, list[str]]:
    """Bring plan and accounts to a saved state.

    New weights of a blend hold from the first window that has not begun.

    Returns:
        The next step, and what is new, a clause each.

    Raises:
        CheckpointError: datasets, plan or seed are others, and that was not accepted; names what.
    """
    if record.get("version") != VERSION:
        raise CheckpointError(f"the stream's record has version {record.get('version')}, not {VERSION}", where=where)
    saved = cast(StreamRecord, record)
    new = differences(plan, saved)
    if new and not accept_new_data:
        raise CheckpointError(
            f"this run would not continue the stream of its checkpoint: {'; '.join(new)}",
            where=where,
            fix="put it back, use another run name, or begin a new epoch on the new data with --accept-new-data",
        )
    address = StepAddress(saved["epoch"], saved["window"], saved["step"])
    if new:
        return StepAddress(address.epoch + 1, 0, 0), new
    quarantined = saved["quarantined"]
    accounts.load(
        {
            "sources": [source["consumed"] for source in saved["sources"]],
            "multiset": saved["multiset"],
            "quarantined_multiset": quarantined["multiset"],
            "kinds": quarantined["kinds"],
            "passed_over": saved["passed_over"],
        }
    )
    if isinstance(plan.order, Blend):
        wanted = plan.order.versions[-1]
        new += _reweight(plan, [BlendVersion.from_json(version) for version in saved["blend"] or []], wanted, address)
    return address, new


def _reweight(plan: Plan, versions: list[BlendVersion], wanted: BlendVersion, address: StepAddress) -> list[str]:
    assert isinstance(plan.order, Blend)
    plan.order = plan.order.with_versions(versions)
    last = versions[-1]
    if (last.weights, last.by) == (wanted.weights, wanted.by):
        return []
    begins = address.window + (address.step > 0)
    plan.order = plan.order.reweighted(begins, wanted.weights, wanted.by)
    return [f"weights by {wanted.by} are {list(wanted.weights)} from window {begins} on and were {list(last.weights)}"]


def _short(value: str) -> str:
    return value[:12]
