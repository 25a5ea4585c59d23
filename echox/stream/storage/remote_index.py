"""Builds a local catalogue of shards that are behind URLs, for servers that no index can be written to."""

from __future__ import annotations

import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

from braceexpand import braceexpand

from echox.errors import DataError
from echox.stream.format.catalogue import ELSEWHERE
from echox.stream.format.indexing import CatalogueBuilder, Progress
from echox.stream.format.scan import scan_shard
from echox.stream.storage.remote import FsspecRemote, open_remote
from echox.stream.storage.retry import Retry


def index_remote(
    urls: str, out: Path, *, optional: Collection[str] = (), progress: Progress | None = None
) -> dict[str, Any]:
    """Make a local catalogue of shards behind URLs, each read once from end to end.

    Args:
        urls: the shards, such as `https://host/set/part-{000..127}.tar`, or the folder of an object store.
        out: folder for the catalogue and `dataset.json`, which then is the dataset.
        optional: extensions that a sample may lack.
        progress: called after every shard.

    Returns:
        The content of `dataset.json`, which says where the shards are.

    Raises:
        DataError: shards of several folders, none at all, neither on a web server nor in an object store, or what
            `scan_shard` and `CatalogueBuilder` refuse.
        TransientReadError: a shard could not be fetched.
    """
    base, names = list_remote(urls)
    if not ELSEWHERE.fullmatch(base):
        fix = "put the shards behind a web server or into an object store, or index them in their own folder"
        raise DataError("a dataset may not say that its shards are at such a location", where=base, fix=fix)
    remote, retry = open_remote(base), Retry()
    out.mkdir(parents=True, exist_ok=True)
    with CatalogueBuilder(out, optional) as builder, tempfile.TemporaryDirectory(dir=out, prefix=".fetch-") as scratch:
        for done, name in enumerate(names, 1):
            path = Path(scratch) / name

            def fetch(path: Path = path, name: str = name) -> None:
                with path.open("wb") as file:
                    file.writelines(remote.stream(name))

            retry(fetch, "fetching the shard", remote.where(name))
            builder.add(name, scan_shard(path, optional))
            path.unlink()
            if progress:
                progress(done, len(names), builder.samples)
        return builder.finish(base)


def list_remote(urls: str) -> tuple[str, list[str]]:
    """Folder and file names of shards named by URL.

    Raises:
        DataError: several folders, or a folder that cannot be listed or holds no shards.
    """
    if urls.endswith(".tar"):
        places = [url.rsplit("/", 1) for url in braceexpand(urls)]
        if len({base for base, _ in places}) > 1:
            raise DataError("the shards are in several folders", where=urls, fix="index each folder by itself")
        return places[0][0], [name for _, name in places]
    remote = open_remote(urls)
    if not isinstance(remote, FsspecRemote):
        fix = "name the shards, such as https://host/set/part-{000..127}.tar"
        raise DataError("the files of this location cannot be listed", where=urls, fix=fix)
    names = sorted(name for name in remote.names() if name.endswith(".tar"))
    if not names:
        raise DataError("There are no shards *.tar", where=urls, fix="name a folder of WebDataset shards")
    return urls.rstrip("/"), names
