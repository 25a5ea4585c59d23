"""`echox doctor`: reports what is installed, found and missing on this machine, and the fix for each gap."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import socket
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import cache_from_source, find_spec
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from echox.config.paths import DEMO_MODELS, KNOWN_MODELS, cache_dir, how_to_get, missing_files, project_root
from echox.device import DEVICE, cpu_is_wanted
from echox.errors import EchoXError
from echox.release import hub
from echox.release.checksums import SUMS_NAME, read_sums, verify

# The packages the design pins; the rest of requirements.lock follows from them.
PINNED = (
    "torch",
    "torchaudio",
    "deepspeed",
    "ray",
    "transformers",
    "peft",
    "webdataset",
    "mlflow",
    "soundfile",
)
_PROBE_S = 1.0
_HASHED_BYTES = 2 << 30
"""Of a model: larger ones would be read for minutes."""


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        subject: what was looked at.
        state: ok; note: training can run, something is absent or differs; fail: training cannot run.
        detail: what was found.
        fix: what to do, empty where nothing needs doing.
    """

    subject: str
    state: Literal["ok", "note", "fail"]
    detail: str
    fix: str = ""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Register `echox doctor`; returns its parser."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "doctor",
        help="show what is installed, found and missing, and how to fix it",
        description="Exit code 0 where training can run, 1 where it cannot.",
        epilog="example: echox doctor --json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Print every finding; 1 when one of them keeps training from running."""
    findings = examine()
    if args.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        marks = {"ok": "ok  ", "note": "note", "fail": "FAIL"}
        width = max(len(finding.subject) for finding in findings)
        for finding in findings:
            print(f"{marks[finding.state]}  {finding.subject:<{width}}  {finding.detail}")
            if finding.fix:
                print(f"{'':6}{'':<{width}}  fix: {finding.fix}")
    return int(any(finding.state == "fail" for finding in findings))


def examine() -> list[Finding]:
    """Everything this machine can be asked without starting anything."""
    findings = [_python(), *_packages(read_lock(project_root() / "requirements.lock"))]
    for check in (_bytecode, _accelerator, _machine, _compiler, _cache):
        findings.append(_guarded(check))
    findings += [_model(ref) for ref in (*DEMO_MODELS, *KNOWN_MODELS)]
    return [*findings, _corpus(), _ray()]


def read_lock(file: Path) -> dict[str, str]:
    """Package -> version of the tested set; empty where the file is not there."""
    if not file.is_file():
        return {}
    pairs = (line.partition("==") for line in file.read_text(encoding="utf-8").splitlines())
    return {name.strip(): tested.strip() for name, _, tested in pairs if tested}


def _guarded(check: Callable[[], Finding]) -> Finding:
    """A broken installation is a finding, not a crash of the program that should report it."""
    try:
        return check()
    except Exception as error:
        return Finding(check.__name__.strip("_"), "fail", f"{type(error).__name__}: {error}", "run `make env`")


def _python() -> Finding:
    return Finding("python", "ok", f"{platform.python_version()} ({sys.executable})")


def _bytecode() -> Finding:
    package = find_spec("transformers")
    origin = package.origin if package is not None else None
    if origin is None or not sys.dont_write_bytecode or Path(cache_from_source(origin)).is_file():
        return Finding("bytecode", "ok", "modules are compiled once")
    return Finding(
        "bytecode",
        "note",
        "PYTHONDONTWRITEBYTECODE is set: every process compiles its modules again, some 20 s of its start",
        f"unset it, or run once `{sys.executable} -m compileall -q -j 0 {Path(origin).parents[1]}`",
    )


def _packages(tested: dict[str, str]) -> list[Finding]:
    findings = []
    others: list[str] = []
    for name in dict.fromkeys((*PINNED, *tested)):
        want = tested.get(name)
        try:
            have = version(name)
        except PackageNotFoundError:
            if name in PINNED:
                findings.append(Finding(name, "fail", "not installed", "run `make env`"))
            else:
                others.append(f"{name} absent")
            continue
        same = want is None or have.partition("+")[0] == want
        if name in PINNED:
            detail = have if same else f"{have}; tested with {want}"
            findings.append(Finding(name, "ok" if same else "note", detail, "" if same else "run `make env`"))
        elif not same:
            others.append(f"{name} {have} (tested {want})")
    if not tested:
        findings.append(Finding("tested set", "note", "requirements.lock is not beside the packages"))
    elif others:
        shown = ", ".join(others[:5]) + (f" and {len(others) - 5} more" if len(others) > 5 else "")
        findings.append(
            Finding("tested set", "note", f"{len(others)} of {len(tested)} differ: {shown}", "run `make env`")
        )
    else:
        findings.append(Finding("tested set", "ok", f"all {len(tested)} packages as tested"))
    return findings


def _accelerator() -> Finding:
    import torch

    if cpu_is_wanted():
        return Finding("accelerator", "ok", f"{DEVICE}=cpu: GPUs, if there are any, are left alone")
    if not torch.cuda.is_available():
        return Finding("accelerator", "ok", "no CUDA device; training runs on the CPU in fp32 or bf16")
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    memory = min(torch.cuda.get_device_properties(i).total_memory for i in range(len(names))) / 2**30
    return Finding("accelerator", "ok", f"{len(names)} x {names[0]}, {memory:.0f} GiB each, CUDA {torch.version.cuda}")


def _machine() -> Finding:
    import psutil

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    free = psutil.virtual_memory().available / 2**30
    total = psutil.virtual_memory().total / 2**30
    detail = f"{cores} cores, {free:.0f} of {total:.0f} GiB memory free"
    if free < 12:
        return Finding("machine", "note", detail, "the demo wants 12 GiB free; close other programs")
    return Finding("machine", "ok", detail)


def _compiler() -> Finding:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    ninja = shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))
    if compiler and ninja:
        return Finding("compiler", "ok", f"{compiler}, {ninja}")
    absent = " and ".join(name for name, found in (("g++", compiler), ("ninja", ninja)) if not found)
    fix = "install a C++ compiler (apt-get install g++)" if not compiler else "run `make env`"
    return Finding("compiler", "fail", f"{absent} not found; DeepSpeed compiles an operator at its first start", fix)


def _cache() -> Finding:
    folder = cache_dir()
    nearest = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(nearest).free / 2**30
    detail = f"{folder}, {free:.0f} GiB free"
    if not os.access(nearest, os.W_OK):
        return Finding("cache", "fail", f"{folder} cannot be written", "set ECHOX_CACHE to a folder of yours")
    if free < 5:
        return Finding("cache", "note", detail, "the demo wants 5 GiB; set ECHOX_CACHE to a larger disk")
    return Finding("cache", "ok", detail)


def _model(ref: str) -> Finding:
    folder = cache_dir() / "models" / ref
    if not folder.is_dir():
        return Finding(ref, "note", "not here", how_to_get(ref))
    absent = missing_files(ref, folder)
    if absent:
        return Finding(ref, "note", f"incomplete: {', '.join(absent[:4])}", how_to_get(ref))
    return _verified(ref, folder)


def _verified(ref: str, folder: Path) -> Finding:
    """A complete model, compared with the hashes of its fetch where they were kept; a large one by its sizes alone."""
    try:
        if not (folder / SUMS_NAME).is_file():
            commit = hub.verify_download(folder, _HASHED_BYTES)
            known = f"as downloaded, commit {commit[:12]}" if commit else "not compared: no hashes of it are known"
            return Finding(ref, "ok", f"{folder}, {known}")
        sums = read_sums(folder)
        size = sum(int(entry["bytes"]) for entry in sums["files"].values())
        verify(folder, full=size <= _HASHED_BYTES)
    except EchoXError as error:
        return Finding(ref, "fail", error.what, error.fix)
    except (KeyError, TypeError, ValueError, AttributeError):
        return Finding(ref, "fail", f"{SUMS_NAME} of {folder} is none", f"delete {folder} and fetch it again")
    how = "hashes" if size <= _HASHED_BYTES else "sizes"
    revision = str(sums.get("source", {}).get("revision", ""))
    return Finding(ref, "ok", f"{folder}, {how} as fetched" + (f", commit {revision[:12]}" if revision else ""))


def _corpus() -> Finding:
    folder = cache_dir() / "data" / "demo"
    if not (folder / "corpus.json").is_file():
        return Finding("demo corpus", "note", "not built", "run `echox shards build demo`")
    sets = sorted(file.parent.name for file in folder.glob("*/dataset.json"))
    return Finding("demo corpus", "ok", f"{folder}: {', '.join(sets)}")


def _ray() -> Finding:
    """Whether a Ray head answers; asked over the network, so that this package needs no Ray to be examined."""
    address = os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS") or "http://127.0.0.1:8265"
    parts = urlsplit(address if "://" in address else f"//{address}")
    try:
        host, port = parts.hostname or "127.0.0.1", parts.port or 8265
        with socket.create_connection((host, port), timeout=_PROBE_S):
            return Finding("ray head", "ok", f"answers at {host}:{port}")
    except (OSError, ValueError) as error:
        detail = f"none answers at {address} ({error})"
        fix = "`make demo` starts one; for a cluster set RAY_ADDRESS=http://HEAD:8265"
        return Finding("ray head", "note", detail, fix)
