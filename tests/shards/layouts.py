"""Tiny copies of corpora on disk, and plain webdataset to read back what was built of them."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import webdataset

from shards.builder.corpus_build import Settings, build_corpus
from shards.corpora.registry import CORPORA
from shards.corpus import Request

RATE = 16_000


def clip(seed: int, seconds: float = 0.3, rate: int = RATE) -> np.ndarray:
    """A tone of 200 + 20 * seed Hz with a little noise, 16-bit."""
    time = np.arange(round(seconds * rate)) / rate
    noise = np.random.default_rng(seed).normal(size=len(time))
    return np.asarray(8000 * np.sin(2 * np.pi * (200 + 20 * seed) * time) + 30 * noise, dtype=np.int16)


def encoded(samples: np.ndarray, rate: int = RATE, kind: str = "WAV", subtype: str | None = None) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=kind, subtype=subtype)
    return buffer.getvalue()


def put(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def put_lines(path: Path, rows: Sequence[Any]) -> Path:
    return put(path, "".join(json.dumps(row) + "\n" for row in rows))


def put_archive(path: Path, examples: Any, sounds: Mapping[str, bytes]) -> Path:
    """`data.json` first, then the sounds, gzip'd: an archive of EchoX-Dialogues."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as tar:
        for name, data in {"data.json": json.dumps(examples).encode(), **sounds}.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def build(name: str, source: Path, out: Path, *, task: str | None = None, split: str = "train", **more: Any) -> Any:
    """Build a corpus; samples as webdataset reads them, by id, and the ledger."""
    corpus = CORPORA[name]
    wanted = {name: more.pop(name) for name in ("answers", "history", "audio_root") if name in more}
    request = Request(task=corpus.tasks[0] if task is None else task, split=split, **wanted)
    build_corpus(corpus, source, out, request, Settings(**{"max_rejected": 1.0, **more}))
    return read(out), ledger(out)


def read(out: Path) -> dict[str, dict[str, Any]]:
    """Samples by id, in the order of the shards; `json` decoded, sound as 16-bit samples."""
    described = json.loads((out / "dataset.json").read_text())
    urls = [str(out / shard["name"]) for shard in described["shards"]]
    found = {}
    for sample in webdataset.WebDataset(urls, shardshuffle=False, empty_check=False):
        meta = sample["json"] = json.loads(sample["json"])
        for member in ("question.flac", "answer.flac"):
            assert (member in sample) == (meta[member.replace(".flac", "_s")] is not None)
            if member in sample:
                sample[member], rate = soundfile.read(io.BytesIO(sample[member]), dtype="int16")
                assert rate == RATE and sample[member].ndim == 1
                assert meta[member.replace(".flac", "_s")] == round(len(sample[member]) / RATE, 3)
        assert meta["id"] not in found
        found[meta["id"]] = sample
    assert len(found) == described["samples"]
    return found


def ledger(out: Path) -> dict[str, str]:
    rows = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    return {row["id"]: row["reason"] for row in rows}


def pitch(samples: np.ndarray) -> float:
    """The loudest frequency, Hz."""
    return float(np.argmax(np.abs(np.fft.rfft(samples))) * RATE / len(samples))
