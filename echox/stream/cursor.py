"""Where a stream stands, as one small record for all ranks, and whether a stream may go on from such a record.

It holds no rank, worker or random state: any world size, split and thread count continues the same stream.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from echox.errors import CheckpointError
from echox.stream.accounting import Accounts
from echox.stream.sampling.blend import Blend, BlendVersion
from echox.stream.sampling.plan import Plan, StepAddress

VERSION = 2
_FIELDS = {
    **{name: f"data.budget.{name}" for name in ("by", "size", "micro_batches")},
    "padded": "padding under data.budget (model.layout)",
    "repeat": "repeat in data.train",
    "blend": "blending by weight in data.train",
    "format": "the version of the plan",
}


def record(plan: Plan, address: StepAddress, accounts: Accounts) -> dict[str, Any]:
    """The state after the step before `address`; JSON types."""
    cursors = plan.order.cursors(address.epoch, address.window)
    booked = accounts.to_json()
    sources = [
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
        **address._asdict(),
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


def differences(plan: Plan, saved: Mapping[str, Any]) -> list[str]:
    """What of datasets, plan and seed is not as it was, a clause each, by the recipe's names."""
    found: list[str] = []
    if plan.seed != saved["seed"]:
        found.append(f"seed is {plan.seed} and was {saved['seed']}")
    before, now = saved["sources"], plan.data()
    if len(before) != len(now):
        found.append(f"data.train has {len(now)} sources and had {len(before)}")
    for index, (old, new) in enumerate(zip(before, now, strict=False)):
        for name in ("task", "fingerprint"):
            if old[name] != new[name]:
                what = f"data.train.{index} ({new['path']})"
                found.append(f"the {name} of {what} is {_short(new[name])} and was {_short(old[name])}")
    parameters = plan.parameters()
    for name in sorted(parameters.keys() | saved["plan"].keys()):
        values = parameters.get(name), saved["plan"].get(name)
        if values[0] != values[1]:
            found.append(f"{_FIELDS.get(name, f'data.{name}')} is {values[0]} and was {values[1]}")
    return found


def resume(
    plan: Plan, saved: Mapping[str, Any], accounts: Accounts, *, accept_new_data: bool, where: str
) -> tuple[StepAddress, list[str]]:
    """Bring plan and accounts to a saved state.

    New weights of a blend hold from the first window that has not begun.

    Returns:
        The next step, and what is new, a clause each.

    Raises:
        CheckpointError: datasets, plan or seed are others, and that was not accepted; names what.
    """
    if saved.get("version") != VERSION:
        raise CheckpointError(f"the stream's record has version {saved.get('version')}, not {VERSION}", where=where)
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
        new += _reweight(plan, [BlendVersion.from_json(version) for version in saved["blend"]], wanted, address)
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
