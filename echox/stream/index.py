"""What lies where in a folder of shards: byte ranges of every member and the metadata of every sample."""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from echox.errors import DataError


@dataclass(frozen=True)
class Sample:
    """One sample of a shard.

    Attributes:
        key: its name in the tar.
        shard: the tar file.
        members: extension to (offset, size) in bytes.
        meta: the decoded `json` member.
    """

    key: str
    shard: Path
    members: dict[str, tuple[int, int]]
    meta: dict[str, Any]

    def read(self, extension: str) -> bytes:
        """Bytes of one member.

        Raises:
            DataError: the member is absent or the shard ends early.
        """
        if extension not in self.members:
            raise DataError(
                f"sample {self.key} has no member {extension}", where=str(self.shard), fix="rebuild the shard"
            )
        offset, size = self.members[extension]
        with open(self.shard, "rb") as file:
            data = os.pread(file.fileno(), size, offset)
        if len(data) != size:
            raise DataError(
                f"sample {self.key} is cut short in member {extension}", where=str(self.shard), fix="rebuild the shard"
            )
        return data


@dataclass(frozen=True)
class ShardFolder:
    """All samples of one folder, in shard order.

    Attributes:
        path: the folder.
        fingerprint: hash of the shards' hashes, from `dataset.json`.
        samples: every sample.
    """

    path: Path
    fingerprint: str
    samples: list[Sample] = field(repr=False)

    @classmethod
    def open(cls, path: Path) -> ShardFolder:
        """Read `dataset.json` and walk the headers of its shards.

        Raises:
            DataError: no `dataset.json`, a shard missing, cut or not the recorded size, or a broken tar.
        """
        listing = path / "dataset.json"
        if not listing.is_file():
            raise DataError(
                "no dataset.json in the shard folder", where=str(path), fix="build the corpus, or mend data.*.path"
            )
        described = json.loads(listing.read_text())
        samples: list[Sample] = []
        for shard in described["shards"]:
            samples.extend(_walk(path / shard["name"], int(shard["bytes"])))
        if len(samples) != described["samples"]:
            raise DataError(
                f"{len(samples)} samples found where dataset.json lists {described['samples']}",
                where=str(path),
                fix="rebuild the corpus",
            )
        return cls(path, described["fingerprint"], samples)


def _walk(shard: Path, size: int) -> Iterable[Sample]:
    if not shard.is_file():
        raise DataError("a shard listed in dataset.json is missing", where=str(shard), fix="rebuild the corpus")
    found = shard.stat().st_size
    if found != size:
        raise DataError(
            f"the shard has {found:,} bytes where dataset.json records {size:,}: it was cut or replaced",
            where=str(shard),
            fix="rebuild or copy the shard again",
        )
    groups: dict[str, dict[str, tuple[int, int]]] = {}
    metas: dict[str, dict[str, Any]] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                groups.setdefault(key, {})[extension] = (member.offset_data, member.size)
                if extension == "json":
                    handle = tar.extractfile(member)
                    metas[key] = json.loads(handle.read()) if handle else {}
    except (tarfile.TarError, ValueError, OSError) as error:
        raise DataError(
            f"the shard cannot be read as a tar: {error}", where=str(shard), fix="rebuild the shard"
        ) from error
    for key, members in groups.items():
        if key not in metas:
            raise DataError(f"sample {key} has no json member", where=str(shard), fix="rebuild the shard")
        yield Sample(key, shard, members, metas[key])


def combined_fingerprint(folders: Iterable[ShardFolder]) -> str:
    """One hash over the fingerprints of several folders, in order."""
    return hashlib.sha256("".join(folder.fingerprint for folder in folders).encode()).hexdigest()
