"""Resolves the paths of the project, the download cache, models, datasets and run folders.

A recipe names models and datasets either by folder or by a short name below the cache, so that one recipe works on a
laptop and on a cluster. Nothing here downloads; a missing folder is an error that says how to get it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from echox.errors import DataError, MissingModelError

_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


@dataclass(frozen=True)
class KnownModel:
    """Files a published model needs here, so that a download leaves out the copies in other formats."""

    files: tuple[str, ...]
    weights: tuple[str, ...]
    gated: bool = False


def _shards(count: int) -> tuple[str, ...]:
    names = (f"model-{index:05d}-of-{count:05d}.safetensors" for index in range(1, count + 1))
    return (*names, "model.safetensors.index.json")


KNOWN_MODELS: dict[str, KnownModel] = {
    "meta-llama/Llama-3.2-3B-Instruct": KnownModel(
        ("config.json", "generation_config.json", *_TOKENIZER), _shards(2), gated=True
    ),
    "meta-llama/Llama-3.1-8B-Instruct": KnownModel(
        ("config.json", "generation_config.json", *_TOKENIZER), _shards(4), gated=True
    ),
    "openai/whisper-large-v3": KnownModel(
        ("config.json", "generation_config.json", "preprocessor_config.json", "vocab.json", "merges.txt", *_TOKENIZER),
        ("model.safetensors",),
    ),
}
DEMO_MODELS = (
    "openai/whisper-base",
    "HuggingFaceTB/SmolLM2-135M-Instruct",
    "rhasspy/en_US-joe-medium",
    "Xenova/whisper-small",
    "microsoft/dnsmos",
)


def cache_dir() -> Path:
    """Folder of downloads, models and datasets: $ECHOX_CACHE, by default ~/.cache/echox. It may not exist yet."""
    return Path(os.environ.get("ECHOX_CACHE") or "~/.cache/echox").expanduser()


def project_root() -> Path:
    """Folder that holds the packages `echox` and `launch`; in a checkout, the repository root."""
    return Path(__file__).resolve().parents[2]


def resolve_file(ref: str) -> Path:
    """A file or folder a recipe names: relative paths start at the current folder, then at the project root.

    Returns the first that exists; where none does, the one below the current folder.
    """
    path = Path(ref).expanduser()
    if path.is_absolute() or path.exists():
        return path
    below_root = project_root() / path
    return below_root if below_root.exists() else path


def is_url(place: str) -> bool:
    """Whether a place is a URL rather than a folder."""
    return "://" in place


def storage_folder(storage: str) -> Path:
    """The folder of runs on this node: the storage itself, or where this node keeps its copy of an object store's.

    A relative folder starts at the current one. The copy lies below the cache, under a name made from the URL.
    """
    if not is_url(storage):
        return Path(storage).expanduser()
    place = storage.rstrip("/")
    readable = re.sub(r"[^A-Za-z0-9.]+", "-", place)[:80]
    return cache_dir() / "runs" / f"{readable}-{hashlib.sha256(place.encode()).hexdigest()[:8]}"


def run_dir(storage: str, name: str) -> Path:
    """Folder of one run on this node: `<storage>/<name>`, see `storage_folder`."""
    return storage_folder(storage) / name


def model_place(ref: str) -> Path:
    """Where the folder of a model is or would be, whether or not it is there."""
    given = Path(ref).expanduser()
    return given if given.is_dir() else cache_dir() / "models" / ref


def resolve_model(ref: str, *, weights: bool = True) -> Path:
    """Folder of a model given by path, or by name below $ECHOX_CACHE/models.

    Args:
        ref: an existing folder, or `org/name`.
        weights: also require the weight files; False for random initialisation, which needs config and tokenizer only.

    Raises:
        MissingModelError: no such folder, or it lacks files; says which and how to get them.
    """
    folder = model_place(ref)
    if not folder.is_dir():
        raise MissingModelError(
            f"model {ref} was not found: it is no folder, and {folder} does not exist",
            fix=how_to_get(ref, weights=weights),
        )
    absent = missing_files(ref, folder, weights=weights)
    if absent:
        raise MissingModelError(
            f"model {ref} is incomplete: {_some(absent)} missing",
            where=str(folder),
            fix=how_to_get(ref, weights=weights, folder=folder),
        )
    return folder


def missing_files(ref: str, folder: Path, *, weights: bool = True) -> list[str]:
    """Names of the files `folder` still lacks to be usable as model `ref`; empty when it is complete."""
    if not any(folder.iterdir()):
        return ["every file"]
    if not (folder / "config.json").is_file():
        # A Piper voice is one ONNX file and its JSON; everything else here is a Hugging Face folder.
        return [] if any(folder.glob("*.onnx")) else ["config.json"]
    known = KNOWN_MODELS.get(ref)
    absent = [name for name in known.files if not (folder / name).is_file()] if known else []
    # Newer tokenizer folders leave this file out; its content is in tokenizer_config.json.
    absent = [name for name in absent if name != "special_tokens_map.json"]
    if not weights:
        return absent
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        return absent + [name for name in shards if not (folder / name).is_file()]
    if any(any(folder.glob(pattern)) for pattern in ("*.safetensors", "*.bin", "*.onnx", "onnx/*.onnx", "*.pt")):
        return absent
    return absent + list(known.weights if known else ("model.safetensors",))


def how_to_get(ref: str, *, weights: bool = True, folder: Path | None = None) -> str:
    """One sentence with the command that fetches model `ref` to the place where it is looked for."""
    if ref in DEMO_MODELS:
        return "run `make demo`, which fetches and checks it"
    target = str(folder) if folder else f"{_cache_for_people()}/models/{ref}"
    known = KNOWN_MODELS.get(ref)
    if known is None and ref.count("/") != 1:
        return "give an existing folder, or the name of a model as org/name"
    wanted = "" if known is None else " " + " ".join(known.files + (known.weights if weights else ()))
    licence = "accept its licence on the model's page, `hf auth login`, then " if known and known.gated else ""
    return f"{licence}`hf download {ref}{wanted} --local-dir {target}`, or give the folder where you have it"


def resolve_data(ref: str) -> Path:
    """Folder of shards given by path, or by name below $ECHOX_CACHE/data.

    Raises:
        DataError: neither exists.
    """
    return _below_data(ref, "dataset", Path.is_dir)


def resolve_data_file(ref: str) -> Path:
    """A file that belongs to a corpus, such as its unit language: by path, or by name below $ECHOX_CACHE/data.

    Raises:
        DataError: neither exists.
    """
    return _below_data(ref, "file", Path.is_file)


def _below_data(ref: str, noun: str, exists: Callable[[Path], bool]) -> Path:
    given = resolve_file(ref)
    below_cache = cache_dir() / "data" / ref
    for path in (given, below_cache):
        if exists(path):
            return path
    fix = "run `echox shards build demo`" if ref.startswith("demo/") else "build it, or correct the path in the recipe"
    raise DataError(f"{noun} {ref} was not found, neither as a path nor as {below_cache}", fix=fix)


def _cache_for_people() -> str:
    return "$ECHOX_CACHE" if os.environ.get("ECHOX_CACHE") else "~/.cache/echox"


def _some(names: list[str], limit: int = 4) -> str:
    shown = ", ".join(names[:limit])
    return (
        f"{shown} and {len(names) - limit} more are"
        if len(names) > limit
        else shown + (" are" if len(names) > 1 else " is")
    )
