"""Keeps frozen weights as buffers during training, and identifies the folders they came from by hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from echox.errors import AlteredModelError, MissingModelError
from echox.files import sha256_file, write_atomically

if TYPE_CHECKING:
    import torch
    from torch import nn

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".npz")


class FrozenModel(TypedDict):
    """Identity of a frozen model: its folder, one SHA-256 over names and hashes, and the hash of each weight file."""

    path: str
    sha256: str
    files: dict[str, str]


def replicate_as_buffers(module: nn.Module, device: torch.device, dtype: torch.dtype) -> frozenset[str]:
    """Turn every frozen parameter into a non-persistent buffer on `device`; return the buffers' names.

    ZeRO-3 partitions every Parameter and leaves buffers alone, so that each rank keeps frozen weights whole and nothing
    of them is gathered or saved. Tensors shared between modules stay shared. Floating tensors take `dtype`.
    """
    converted: dict[int, torch.Tensor] = {}
    names: set[str] = set()
    for prefix, child in module.named_modules():
        for name, parameter in list(child._parameters.items()):
            if parameter is None or parameter.requires_grad:
                continue
            if id(parameter) not in converted:
                to = dtype if parameter.is_floating_point() else parameter.dtype
                converted[id(parameter)] = parameter.detach().to(device=device, dtype=to)
            del child._parameters[name]
            child.register_buffer(name, converted[id(parameter)], persistent=False)
            names.add(f"{prefix}.{name}" if prefix else name)
    return frozenset(names)


def identify(folders: Mapping[str, Path], cache: Path | None = None) -> dict[str, FrozenModel]:
    """Identity of every frozen model: its folder and one sha256 over the names and hashes of its weight files.

    Args:
        folders: model name to folder.
        cache: JSON file that remembers hashes by path, size and modification time; None hashes always.

    Raises:
        MissingModelError: a folder is absent or holds no weight file.
    """
    known: dict[str, dict[str, Any]] = _read_cache(cache)
    before = json.dumps(known, sort_keys=True)
    found = {name: _identify_one(name, Path(folder), known) for name, folder in sorted(folders.items())}
    if cache is not None and json.dumps(known, sort_keys=True) != before:
        _write_cache(cache, known)
    return found


def compare_identities(saved: Mapping[str, FrozenModel], current: Mapping[str, FrozenModel]) -> None:
    """Raise AlteredModelError unless the frozen models are the ones a checkpoint was trained beside."""
    for name in sorted(saved.keys() | current.keys()):
        old, new = saved.get(name), current.get(name)
        if old is None or new is None:
            which = "was not used when the checkpoint was written" if old is None else "is not part of this run"
            raise AlteredModelError(
                f"frozen model '{name}' {which}", fix="continue with the recipe of the run, or use another run name"
            )
        if old["sha256"] != new["sha256"]:
            changed = sorted(
                file for file in {*old["files"], *new["files"]} if old["files"].get(file) != new["files"].get(file)
            )
            raise AlteredModelError(
                f"frozen model '{name}' is not the one the checkpoint was trained beside: "
                f"sha256 {new['sha256'][:12]} now, {old['sha256'][:12]} then (changed: {', '.join(changed)})",
                where=str(new["path"]),
                fix="put the original files back, or start a new run under another name",
            )


def _identify_one(name: str, folder: Path, known: dict[str, dict[str, Any]]) -> FrozenModel:
    files = (
        sorted(path for path in folder.rglob("*") if path.suffix in _WEIGHT_SUFFIXES and path.is_file())
        if folder.is_dir()
        else []
    )
    if not files:
        raise MissingModelError(f"frozen model '{name}' has no weight files", where=str(folder))
    hashes = {path.relative_to(folder).as_posix(): _hash_cached(path, known) for path in files}
    whole = hashlib.sha256("\n".join(f"{file} {digest}" for file, digest in hashes.items()).encode()).hexdigest()
    return {"path": str(folder), "sha256": whole, "files": hashes}


def _hash_cached(path: Path, known: dict[str, dict[str, Any]]) -> str:
    stat = path.stat()
    stamp = {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    entry = known.get(str(path.resolve()))
    if entry is not None and {key: entry.get(key) for key in stamp} == stamp:
        return str(entry["sha256"])
    digest = sha256_file(path)
    known[str(path.resolve())] = {**stamp, "sha256": digest}
    return digest


def _read_cache(cache: Path | None) -> dict[str, dict[str, Any]]:
    if cache is None or not cache.is_file():
        return {}
    try:
        loaded = json.loads(cache.read_text())
    except (OSError, ValueError):
        return {}
    return loaded if isinstance(loaded, dict) else {}


def _write_cache(cache: Path, known: dict[str, dict[str, Any]]) -> None:
    cache.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(cache, json.dumps(known, indent=1, sort_keys=True))
