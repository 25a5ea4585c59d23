"""Finds why a group of workers failed: which rank was the first, told apart from those that only lost their peer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from echox.errors import EchoXError, LaunchError, NetworkError, TransientReadError

Kind = Literal["error", "crash", "lost", "peer", "start", "drained"]

_LOST_PEER = re.compile(
    r"closed by peer|reset by peer|broken pipe|gloo/transport|remote process exited|ncclremoteerror|ncclsystemerror|"
    r"watchdog caught collective|collective operation timeout|socket timeout|recvvalue failed|connection refused|"
    r"communicator was aborted|connectfullmesh failed|process group .*abort",
    re.IGNORECASE,
)
_DEAD = ("RayActorError", "ActorDiedError", "ActorUnavailableError", "WorkerCrashedError", "NodeDiedError")
_CONTINUES = "submit the recipe again: it continues from its checkpoint"


@dataclass(frozen=True, kw_only=True)
class Cause:
    """What made a group of workers fail.

    Attributes:
        kind: `error` (the user can act on it, and trying again will not help), `crash` (an exception of a worker),
            `lost` (its process or node is gone), `peer` (all that is known is that ranks lost one), `start` (the
            workers could not be started), `drained` (a node was taken away with notice).
        rank: the rank that failed first, or None.
        error: what the user is told.
    """

    kind: Kind
    rank: int | None
    error: EchoXError


def find_cause(failure: BaseException, run_folder: Path, events: Iterable[Mapping[str, Any]] = ()) -> Cause:
    """The cause behind an error of Ray Train.

    Args:
        failure: a `TrainingFailedError`, with `worker_failures` or `controller_failure`.
        run_folder: where workers left tracebacks.
        events: `failed` events of the attempt, which say when each rank gave up.
    """
    if type(failure).__name__ == "PreemptionError":
        what = f"a node was taken away before the run had stopped: {first_line(failure)}"
        return Cause(kind="drained", rank=None, error=LaunchError(what, where=run_folder.name, fix=_CONTINUES))
    failures = {rank: unwrapped(error) for rank, error in sorted(getattr(failure, "worker_failures", {}).items())}
    if not failures:
        cause = unwrapped(getattr(failure, "controller_failure", failure))
        return Cause(
            kind="start",
            rank=None,
            error=LaunchError(
                f"Ray Train could not run the workers: {first_line(cause)}",
                where=run_folder.name,
                fix="check `ray status`: the cluster must have the CPUs and GPUs of recipe.scaling",
            ),
        )
    gave_up = {event["rank"]: float(event["time"]) for event in reversed(list(events))}
    order = sorted(
        failures, key=lambda rank: (gave_up.get(rank, float("inf")), not error_file(run_folder, rank).exists(), rank)
    )
    kinds = {rank: _kind(failures[rank]) for rank in order}
    # A dead process leaves no event, and its peers' errors come first: so kinds before times.
    for kind in ("error", "crash", "lost", "peer"):
        for rank in order:
            if kinds[rank] == kind:
                return Cause(kind=kind, rank=rank, error=_told(kind, rank, failures[rank], run_folder))
    raise AssertionError(kinds)


def error_file(run_folder: Path, rank: int) -> Path:
    """Where a rank leaves the traceback of an unexpected failure."""
    return run_folder / "errors" / f"rank-{rank:05d}.txt"


def unwrapped(error: BaseException) -> BaseException:
    """The exception a worker raised or died of, out of Ray's wrappers."""
    for _ in range(8):
        for name in ("_base_exc", "health_check_failure", "cause"):
            inner = getattr(error, name, None)
            if isinstance(inner, BaseException):
                error = inner
                break
        else:
            break
    return error


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


def lost_peer(text: str) -> bool:
    """Whether an error's text says no more than that another process is gone."""
    return bool(_LOST_PEER.search(text))


def may_pass(error: EchoXError) -> bool:
    """Whether trying again may help although the error is one a user can act on."""
    return isinstance(error, NetworkError | TransientReadError)


def _kind(error: BaseException) -> Kind:
    if isinstance(error, EchoXError):
        return "crash" if may_pass(error) else "error"
    if any(parent.__name__ in _DEAD for parent in type(error).__mro__):
        return "lost"
    return "peer" if lost_peer(f"{type(error).__name__}: {error}") else "crash"


def _told(kind: Kind, rank: int, error: BaseException, run_folder: Path) -> EchoXError:
    if isinstance(error, EchoXError):
        return error
    said = f"{type(error).__name__}: {first_line(error)}"
    if kind == "crash":
        path = error_file(run_folder, rank)
        here = path.exists()
        return LaunchError(
            f"worker {rank} failed: {said}",
            where=str(path) if here else run_folder.name,
            fix=f"{'read the traceback in that file' if here else 'look into the job log'}, then {_CONTINUES}",
        )
    if kind == "lost":
        return LaunchError(
            f"worker {rank} was lost: {said}",
            where=run_folder.name,
            fix=f"check memory and the node's health, then {_CONTINUES}",
        )
    return LaunchError(
        f"a worker was lost, and worker {rank} was the first to notice: {said}",
        where=run_folder.name,
        fix=f"`echox logs {run_folder.name} --errors` shows what each rank said; then {_CONTINUES}",
    )
