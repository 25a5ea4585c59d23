"""Fetches files of a model hub's repository at one commit, and compares each with the hash that the hub records for it.

A commit is 40 hexadecimal digits and names its files for good; a branch does not. Where only a branch is known, the
commit that it names at the first fetch is what every later one takes: trust on first use.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echox.errors import AlteredModelError
from echox.files import is_within, read_record, read_text, sha256_file, write_atomically

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

log = logging.getLogger(__name__)

TIMEOUT_S = 3.0
"""Seconds the model hub gets to answer before other sources are used."""
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """Files of one commit of a repository.

    Attributes:
        repository: "organisation/name".
        revision: the commit, 40 hexadecimal digits.
        files: relative name to SHA-256, as they came, after each was compared with the hub's own record.
    """

    repository: str
    revision: str
    files: dict[str, str]

    def record(self) -> dict[str, Any]:
        """JSON types that `recorded` reads."""
        return {"repository": self.repository, "revision": self.revision, "files": self.files}


def is_commit(revision: str) -> bool:
    """Whether a revision is a commit and not the name of a branch or a tag, which may move."""
    return bool(_COMMIT.fullmatch(revision))


def fetch(
    repository: str, patterns: Sequence[str], folder: Path, *, revision: str | None, lock: Path | None = None
) -> Snapshot | None:
    """Download files of a repository into `folder`, where the hub answers quickly.

    Args:
        repository: "organisation/name".
        patterns: names or patterns of its files.
        folder: where they go, under the same relative names.
        revision: the commit; None where none is known: then that of `lock`, else what the hub calls its newest.
        lock: file that keeps the commit and the hashes of the first fetch, which later ones have to repeat.

    Returns:
        What came; None where the hub cannot be reached (offline, no such repository, too slow).

    Raises:
        AlteredModelError: the hub answers with another commit, a file is not what the hub records, or not what came at
            the first fetch.
    """
    if revision is not None and not is_commit(revision):
        raise ValueError(f"{revision} is no commit of 40 hexadecimal digits")
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        return None
    known = None if lock is None else recorded(lock, repository)
    wanted = revision or (known.revision if known else None)
    try:
        siblings, found = _download(repository, patterns, folder, wanted)
    except AlteredModelError:
        raise
    except Exception as error:  # the hub client raises its transport's errors, which change with its version
        log.info("event=hub_unreachable repo=%s reason=%s", repository, type(error).__name__)
        return None
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    files = {each.rfilename: _checked(folder, each, repository) for each in siblings}
    snapshot = Snapshot(repository=repository, revision=found, files=files)
    if known is not None and known.revision == found:
        _compare(known.files, snapshot)
    if lock is not None:
        lock.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(lock, json.dumps(snapshot.record(), indent=1, sort_keys=True) + "\n")
    return snapshot


def recorded(lock: Path, repository: str) -> Snapshot | None:
    """The first fetch that a lock file keeps of a repository; None where it keeps none."""
    content = read_record(lock.parent, lock.name)
    revision, files = content.get("revision"), content.get("files")
    if content.get("repository") != repository or not isinstance(revision, str) or not is_commit(revision):
        return None
    return Snapshot(repository=repository, revision=revision, files=files if isinstance(files, dict) else {})


def _download(
    repository: str, patterns: Sequence[str], folder: Path, revision: str | None
) -> tuple[list[RepoSibling], str]:
    """The hub's own record of the files, and their commit, after they were downloaded."""
    from huggingface_hub import HfApi, snapshot_download

    info = HfApi().model_info(repository, revision=revision, files_metadata=True, timeout=TIMEOUT_S)
    commit = info.sha or ""
    if not is_commit(commit) or commit != (revision or commit):
        raise AlteredModelError(
            f"the model hub answers with commit {commit or '(none)'} of {repository} where {revision} was asked for",
            fix="check HF_ENDPOINT and any mirror in between",
        )
    siblings = [each for each in info.siblings or () if _matches(each.rfilename, patterns)]
    snapshot_download(repository, revision=commit, allow_patterns=list(patterns), local_dir=folder)
    return siblings, commit


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def _checked(folder: Path, sibling: RepoSibling, repository: str) -> str:
    """SHA-256 of a file that is what the hub records: SHA-256 of a large one, SHA-1 of the git blob of a small one."""
    path = folder / sibling.rfilename
    if not is_within(folder, path) or not path.is_file():
        raise AlteredModelError(f"{sibling.rfilename} of {repository} did not arrive", fix="fetch it again")
    digest = sha256_file(path)
    large = sibling.lfs is not None
    expected, found = (sibling.lfs.sha256, digest) if sibling.lfs is not None else (sibling.blob_id, git_blob(path))
    if expected is None or found != expected:
        raise AlteredModelError(
            f"{sibling.rfilename} of {repository} has {'SHA-256' if large else 'git hash'} {found[:12]}… instead of "
            f"{(expected or 'none')[:12]}…, which the hub records",
            fix="do not use it; check HF_ENDPOINT and any mirror in between, and fetch it again",
        )
    return digest


def git_blob(path: Path) -> str:
    """SHA-1 of a file as git names its content."""
    hasher = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            hasher.update(block)
    return hasher.hexdigest()


def _compare(first: Mapping[str, Any], now: Snapshot) -> None:
    for name, digest in now.files.items():
        if first.get(name, digest) != digest:
            raise AlteredModelError(
                f"{name} of {now.repository} has SHA-256 {digest[:12]}… and had {str(first[name])[:12]}… when commit "
                f"{now.revision[:12]} was fetched first",
                fix="do not use it: what a commit names never changes",
            )


def verify_download(folder: Path, largest: int) -> str | None:
    """Compare the files of a folder that `hf download --local-dir` filled with the hashes it keeps there.

    Args:
        folder: of the model.
        largest: bytes of the largest file that is read.

    Returns:
        The commit they are of; None where the folder keeps no such record, or one of several commits.

    Raises:
        AlteredModelError: a file is not what the hub delivered.
    """
    records = folder / ".cache" / "huggingface" / "download"
    commits = set()
    for record in sorted(records.rglob("*.metadata")) if is_within(folder, records) else ():
        path = folder / record.relative_to(records).with_suffix("")
        try:
            commit, etag, *_ = read_text(record, 1000).splitlines()
        except (OSError, ValueError):
            continue
        if not path.is_file():
            continue
        commits.add(commit)
        if path.stat().st_size > largest:
            continue
        found = sha256_file(path) if len(etag) == 64 else git_blob(path)
        if found != etag:
            raise AlteredModelError(
                f"Model file {path.name} was altered: its hash is {found[:12]}… instead of {etag[:12]}…, which the hub "
                f"recorded for commit {commit[:12]}",
                where=str(folder),
                fix=f"Delete {path} and fetch it again.",
            )
    commit = commits.pop() if len(commits) == 1 else ""
    return commit if is_commit(commit) else None
