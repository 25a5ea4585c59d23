"""Proves at the start, before models load, that all processes of a run work with the same things.

They see the same storage, run the same code on the same versions beside the same models, with room for checkpoints and
shared memory. What is wrong on any node is said at once, in one error, and not after hours by a save that fails.
"""

from __future__ import annotations

import hashlib
import platform
import shutil
import socket
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import echox
from echox.engine.storage_proof import FolderProof, ProofPlace, StoreProof, proof_name, seen, written
from echox.errors import EchoXError, LaunchError

if TYPE_CHECKING:
    from echox.engine.monitor.run_dir import RunDir
    from echox.engine.world import World

LEAST_FREE, LEAST_SHARED = 256 << 20, 256 << 20
"""Bytes on the storage, and in /dev/shm beside GPUs: containers have 64 MiB of it unless told otherwise."""
SKEW_S = 10.0
PACKAGES = ("torch", "deepspeed", "transformers", "peft", "ray", "mlflow", "numpy")
_EDGE = 1 << 20
_REDUCED = 64 << 20


@dataclass(frozen=True, kw_only=True)
class NodeReport:
    """What the first process of a node says of it.

    Attributes:
        rank, host: of the process.
        versions: package to version; Python's among them.
        code: hash over the project's modules.
        models: reference to a hash over its files, or "absent".
        free: bytes left on the storage; None where nobody can say.
        shared: bytes of /dev/shm; None where there is none.
        gpus: whether it trains on GPUs.
        problems: what it has found itself.
    """

    rank: int
    host: str
    versions: Mapping[str, str]
    code: str
    models: Mapping[str, str]
    free: int | None
    shared: int | None
    gpus: bool
    problems: Sequence[str] = field(default_factory=tuple)


@dataclass(frozen=True, kw_only=True)
class StartCheck:
    """Outcome of a start without mistakes.

    Attributes:
        hosts: nodes, by the first rank of each.
        seconds: that it took.
        allreduce_gb_s: bus bandwidth of an all-reduce between all ranks (NCCL's definition), GB/s; None of one rank.
        notes: what is odd and no mistake.
    """

    hosts: list[str]
    seconds: float
    allreduce_gb_s: float | None
    notes: list[str]


def check_start(
    folder: RunDir, models: Mapping[str, Path], world: World, *, least_busbw: float = 0.0, in_one_file: bool = False
) -> StartCheck:
    """Ask every node, compare, and measure an all-reduce; every rank calls it.

    On one node there is nothing to compare; room is looked at, and the all-reduce measured.

    Args:
        folder: of the run, on the storage that all nodes share, or in an object store.
        models: folder of each pretrained model, by the name that the recipe has for it.
        world: the processes.
        least_busbw: bandwidth below which the fabric is not what it should be.
        in_one_file: whether runs are tracked in a file of the storage.

    Raises:
        LaunchError: naming everything that is wrong on every node; on every rank.
    """
    began = time.monotonic()
    hosts = world.all_gather(socket.gethostname())
    leaders = [hosts.index(host) for host in dict.fromkeys(hosts)]
    leads = world.rank in leaders
    place = FolderProof(folder.path) if folder.store is None else StoreProof(folder.store)
    problems = _shared_storage(place, world, leaders) if len(leaders) > 1 or folder.store is not None else []
    report = report_node(world.rank, folder.path, models, gpus=world.device.type == "cuda") if leads else None
    clock = time.time()  # all ranks have just left the same collective
    gathered = world.all_gather((report, clock, problems))
    nodes = [node for node, _, _ in gathered if node is not None]
    clocks = {hosts[rank]: at for rank, (_, at, _) in enumerate(gathered)}
    found = [problem for _, _, those in gathered for problem in those]
    found += compare(nodes)
    if in_one_file and len(nodes) > 1:
        found.append(
            f"runs are tracked in a SQLite file, which {len(nodes)} nodes must not share; run on one of them `mlflow "
            "server --host 0.0.0.0 --backend-store-uri sqlite:////local/mlflow.db --artifacts-destination "
            "/local/artifacts`, and set tracking.uri=http://HOST:5000"
        )
    speed = None
    if world.size > 1 and not found:
        speed = min(world.all_gather(_allreduce_gb_s(world)))
        if speed < least_busbw:
            found.append(
                f"an all-reduce between the {world.size} ranks reaches {speed:.2f} GB/s, and "
                f"scaling.least_busbw={least_busbw:g}; NCCL_DEBUG=INFO shows the network it has taken"
            )
    if found:
        listed = "\n".join(f"  - {problem}" for problem in found)
        raise LaunchError(
            f"the {len(nodes)} nodes of this run do not fit together:\n{listed}\nNothing was trained.",
            where=place.where,
        )
    return StartCheck(
        hosts=list(dict.fromkeys(hosts)),
        seconds=round(time.monotonic() - began, 2),
        allreduce_gb_s=None if speed is None else round(speed, 3),
        notes=[*_skews(clocks), *_short_of_room(nodes)],
    )


def report_node(rank: int, folder: Path, models: Mapping[str, Path], *, gpus: bool) -> NodeReport:
    """What this machine has."""
    return NodeReport(
        rank=rank,
        host=socket.gethostname(),
        versions=installed(),
        code=code_hash(),
        models={name: model_hash(path) for name, path in models.items()},
        free=_free(folder),
        shared=_free(Path("/dev/shm"), whole=True),
        gpus=gpus,
    )


def compare(nodes: Sequence[NodeReport]) -> list[str]:
    """What is wrong among nodes: each is compared with the first, and with what a run needs."""
    found: list[str] = []
    for node in nodes:
        first, host = nodes[0], node.host
        found += node.problems
        found += _differences(node, first)
        for name, model in node.models.items():
            if model == "absent" and first.models[name] == "absent":
                continue  # the model's own error says how to get it
            if model != first.models[name]:
                here = "is absent" if model == "absent" else f"has other files than on {first.host}"
                found.append(f"{host}: model {name} {here}")
        if node.gpus and node.shared is not None and node.shared < LEAST_SHARED:
            found.append(
                f"{host}: /dev/shm has {node.shared / 2**20:.0f} MiB, too few for NCCL; start the container with "
                "--shm-size=8g, or mount a memory volume there"
            )
    return found


def installed() -> dict[str, str]:
    """Versions that must agree, where they are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@cache
def code_hash() -> str:
    """Hash over the project's own modules; 12 hexadecimal digits."""
    package = Path(echox.__file__).parent
    digest = hashlib.sha256()
    for folder in (package, package.parent / "launch"):
        for path in sorted(folder.rglob("*.py")):
            digest.update(f"{path.relative_to(package.parent).as_posix()}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def model_hash(folder: Path) -> str:
    """Hash over names, sizes, and first and last MiB of the files of a model; "absent" without any."""
    digest, files = hashlib.sha256(), sorted(path for path in folder.glob("*") if path.is_file())
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            digest.update(file.read(_EDGE))
            file.seek(max(0, size - _EDGE))
            digest.update(file.read(_EDGE))
    return digest.hexdigest()[:12] if files else "absent"


def _shared_storage(place: ProofPlace, world: World, leaders: Sequence[int]) -> list[str]:
    """Rank 0 writes a number that the others read, and they write one each that rank 0 reads; what this rank found."""
    nonce = world.broadcast(uuid.uuid4().hex)
    leads = world.rank in leaders
    found = written(place, nonce, world.rank) if leads and world.is_main else []
    stop = bool(world.broadcast(found))
    if leads and not world.is_main and not stop:
        if seen(place, nonce, 0):
            found = written(place, nonce, world.rank)
        else:
            found = [
                f"{socket.gethostname()}: what rank 0 writes to {place.where} cannot be read here: it is no place that "
                "the nodes share"
            ]
    good = [not problems for problems in world.all_gather(found)]
    if world.is_main and not found:
        missing = [rank for rank in leaders if good[rank] and not seen(place, nonce, rank)]
        found = [f"rank 0 cannot read what rank {rank} writes to {place.where}" for rank in missing]
    world.barrier()
    if leads:
        place.remove(proof_name(nonce, world.rank))
    return found


def _differences(node: NodeReport, first: NodeReport) -> Iterable[str]:
    for name in sorted({*node.versions, *first.versions}):
        here, there = (each.versions.get(name, "none") for each in (node, first))
        if here != there:
            yield f"{node.host}: {name} {here} where {first.host} has {there}"
    if node.code != first.code:
        yield f"{node.host}: the project's code is another than on {first.host} ({node.code}, {first.code})"


def _short_of_room(nodes: Sequence[NodeReport]) -> list[str]:
    # No mistake: a small run's checkpoints may fit, and a save that does not is borne.
    low = [node for node in nodes if node.free is not None and node.free < LEAST_FREE]
    return [f"{node.host}: {(node.free or 0) / 2**20:.0f} MiB are left on the storage" for node in low]


def _skews(clocks: Mapping[str, float]) -> list[str]:
    first = next(iter(clocks))
    ahead = {host: at - clocks[first] for host, at in clocks.items()}
    return [
        f"the clock of {host} differs from {first}'s by {by:.0f} s" for host, by in ahead.items() if abs(by) > SKEW_S
    ]


def _free(folder: Path, *, whole: bool = False) -> int | None:
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return _free(folder.parent) if folder != folder.parent and not whole else None
    return usage.total if whole else usage.free


def _allreduce_gb_s(world: World) -> float:
    import torch

    gpu = world.device.type == "cuda"
    size = _REDUCED if gpu else _REDUCED // 64
    tensor = torch.zeros(size // 4, device=world.device)
    repeats, began = 5, 0.0
    try:
        for turn in range(1 + repeats):  # the first one connects
            if turn == 1:
                torch.cuda.synchronize() if gpu else None
                began = time.monotonic()
            world.all_reduce(tensor)
        torch.cuda.synchronize() if gpu else None
    except RuntimeError as error:
        raise EchoXError(f"the ranks cannot add a tensor up: {str(error).splitlines()[0]}") from error
    return 2 * (world.size - 1) / world.size * size * repeats / (time.monotonic() - began) / 1e9
