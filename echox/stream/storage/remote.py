"""Reads datasets behind a URL: `http(s)://`, whatever fsspec opens (`s3://`, `gs://`, ...), and `pipe:` commands.

`https://host/folder` and `s3://bucket/folder` name the folder of `dataset.json`. `pipe:COMMAND {}` runs a shell command
with the file's name in place of `{}` and reads its output; it cannot seek, so each shard comes as one stream. A recipe
may come from anywhere, so the command runs only where `$ECHOX_ALLOW_PIPE` says so, and never because a dataset does.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

import requests

from echox.config.locations import DATA_LOGIN, holds_secret, without_secrets
from echox.config.paths import resolve_data
from echox.errors import DataError
from echox.stream.storage.retry import PassingError

ALLOW_PIPE = "ECHOX_ALLOW_PIPE"
_BLOCK = 1 << 20
_TIMEOUT_S = (10, 60)
"""To connect, and between two bytes."""
_GONE = frozenset({400, 401, 403, 404, 405, 410})
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}


def is_remote(location: str | Path) -> bool:
    """Whether a location is a URL rather than a folder."""
    return isinstance(location, str) and ("://" in location or location.startswith("pipe:"))


def locate(ref: str) -> str | Path:
    """Where a dataset is that a recipe names: a URL as it is, else a folder by path or below $ECHOX_CACHE/data.

    Raises:
        DataError: there is no such folder.
    """
    return ref if is_remote(ref) else resolve_data(ref)


class Remote(ABC):
    """A folder elsewhere.

    Attributes:
        location: its URL.
        ranged: whether parts of a file can be asked for.
    """

    ranged = True

    def __init__(self, location: str) -> None:
        self.location = location

    def where(self, name: str) -> str:
        """Where a file is, for people."""
        return f"{self.location.rstrip('/')}/{name}"

    @abstractmethod
    def stream(self, name: str) -> Iterator[bytes]:
        """A whole file in blocks.

        Raises:
            PassingError: it failed on the way, or ended early.
            DataError: there is no such file, or it may not be read.
        """

    def part(self, name: str, start: int, stop: int, total: int) -> bytes:
        """Bytes `start` to `stop` of a file of `total` bytes.

        Raises:
            PassingError: it failed, or something else came.
            DataError: there is no such file, it may not be read, or it has another size.
        """
        raise DataError("parts of this location cannot be asked for", where=self.where(name))


def open_remote(location: str) -> Remote:
    """The right kind of remote folder.

    Raises:
        DataError: a URL of an unknown kind, one with a login or a signature, which catalogues and logs would keep, or
            one that needs a package which is not installed.
    """
    if holds_secret(location):
        raise DataError(f"the URL {without_secrets(location)} holds a secret", fix=DATA_LOGIN)
    if location.startswith("pipe:"):
        return PipeRemote(location)
    if location.startswith(("http://", "https://")):
        return HttpRemote(location)
    return FsspecRemote(location)


def open_filesystem(location: str, **options: Any) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path in it.

    Args:
        location: the URL.
        options: of fsspec's.

    Raises:
        DataError: a URL of an unknown kind, or one that needs a package which is not installed.
    """
    import fsspec

    scheme = location.partition("://")[0]
    package = _PACKAGES.get(scheme)
    if package and find_spec(package) is None:
        raise DataError(f"{scheme}:// needs the package {package}", where=location, fix=f"pip install {package}")
    try:
        fs, root = fsspec.url_to_fs(location.rstrip("/"), **options)
    except ValueError as error:
        raise DataError(f"URLs of this kind cannot be read: {error}", where=location, fix="correct it") from error
    return fs, root


class HttpRemote(Remote):
    """A folder of a web server that honours `Range`."""

    def __init__(self, location: str) -> None:
        super().__init__(location)
        self._local = threading.local()

    def stream(self, name: str) -> Iterator[bytes]:
        """See `Remote.stream`."""
        with self._get(name, {}) as response:
            expected = int(response.headers.get("Content-Length", -1))
            came = 0
            for block in _blocks(response):
                came += len(block)
                yield block
            if came != expected and expected >= 0:
                raise PassingError(f"{came} bytes came where {expected} were announced")

    def part(self, name: str, start: int, stop: int, total: int) -> bytes:
        """See `Remote.part`."""
        with self._get(name, {"Range": f"bytes={start}-{stop - 1}"}) as response:
            if response.status_code == 416:
                raise _other_size(
                    self.where(name), response.headers.get("Content-Range", "?").rpartition("/")[2], total
                )
            if response.status_code != 206:
                raise PassingError(
                    f"the server answered {response.status_code} with the whole file where 206 and a part were due"
                )
            given = response.headers.get("Content-Range", "")
            length = given.rpartition("/")[2]
            if length.isdigit() and int(length) != total:
                raise _other_size(self.where(name), length, total)
            if given != f"bytes {start}-{stop - 1}/{total}":
                raise PassingError(
                    f"the server sent {given or 'no Content-Range'} for bytes {start}-{stop - 1}/{total}"
                )
            data = b"".join(_blocks(response))
        if len(data) != stop - start:
            raise PassingError(f"{len(data)} bytes came where {stop - start} were asked for")
        return data

    def _get(self, name: str, headers: dict[str, str]) -> requests.Response:
        session = getattr(self._local, "session", None)
        if session is None:
            session = self._local.session = requests.Session()
        # Compressed on the way, the bytes would not be those that ranges and lengths speak of.
        headers = {"Accept-Encoding": "identity", **headers}
        try:
            response: requests.Response = session.get(
                self.where(name), headers=headers, timeout=_TIMEOUT_S, stream=True
            )
        except requests.RequestException as error:
            raise PassingError(reason(error)) from error
        if response.status_code in _GONE:
            response.close()
            raise DataError(
                f"the server answers {response.status_code} {response.reason}",
                where=self.where(name),
                fix="correct the URL, or upload the dataset there with its dataset.json and dataset.catalogue",
            )
        if response.status_code not in (200, 206, 416):
            response.close()
            raise PassingError(f"the server answers {response.status_code} {response.reason}")
        return response


class FsspecRemote(Remote):
    """A folder of an object store, or of anything else that fsspec opens."""

    def __init__(self, location: str) -> None:
        super().__init__(location)
        self.fs, self.root = open_filesystem(location)
        self._sizes: dict[str, int] = {}

    def stream(self, name: str) -> Iterator[bytes]:
        """See `Remote.stream`."""
        file = self._ask(name, lambda path: self.fs.open(path, "rb", cache_type="readahead"))
        with file:
            while block := self._ask(name, lambda _: file.read(8 * _BLOCK)):
                yield block

    def part(self, name: str, start: int, stop: int, total: int) -> bytes:
        """See `Remote.part`."""
        if name not in self._sizes:
            self._sizes[name] = int(self._ask(name, self.fs.size))
        if self._sizes[name] != total:
            raise _other_size(self.where(name), str(self._sizes.pop(name)), total)
        data: bytes = self._ask(name, lambda path: self.fs.cat_file(path, start=start, end=stop))
        if len(data) != stop - start:
            raise PassingError(f"{len(data)} bytes came where {stop - start} were asked for")
        return data

    def names(self) -> list[str]:
        """Files of the folder.

        Raises:
            DataError: there is no such folder, or it may not be listed.
        """
        try:
            return [path.rpartition("/")[2] for path in self.fs.ls(self.root, detail=False)]
        except OSError as error:
            raise DataError(f"the folder cannot be listed: {reason(error)}", where=self.location) from error

    def _ask(self, name: str, question: Callable[[str], Any]) -> Any:
        try:
            return question(f"{self.root}/{name}")
        except (FileNotFoundError, PermissionError) as error:
            kind = "there is no such file" if isinstance(error, FileNotFoundError) else "reading is not allowed"
            raise DataError(kind, where=self.where(name), fix="correct the URL or the credentials") from error
        except Exception as error:
            # Every store's client has errors of its own; what is neither absence nor refusal may pass.
            raise PassingError(reason(error)) from error


class PipeRemote(Remote):
    """The output of a shell command."""

    ranged = False

    def __init__(self, location: str) -> None:
        super().__init__(location)
        if os.environ.get(ALLOW_PIPE) != "1":
            raise DataError(
                "a pipe: location runs a shell command, which nobody has allowed here",
                where=location,
                fix=f"read the command, and set {ALLOW_PIPE}=1 if you trust it",
            )
        if "{}" not in location:
            raise DataError(
                "a pipe: location needs {} where the file's name goes",
                where=location,
                fix="write, for example, `pipe:curl -sf https://host/folder/{}`",
            )

    def where(self, name: str) -> str:
        """The command."""
        return self.location.removeprefix("pipe:").replace("{}", shlex.quote(name))

    def stream(self, name: str) -> Iterator[bytes]:
        """See `Remote.stream`."""
        with subprocess.Popen(
            self.where(name), shell=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as process:
            assert process.stdout is not None
            pipe: IO[bytes] = process.stdout
            while block := pipe.read(_BLOCK):
                yield block
        if process.returncode:
            raise PassingError(f"the command ended with exit code {process.returncode}")


def _blocks(response: requests.Response) -> Iterator[bytes]:
    try:
        yield from response.iter_content(_BLOCK)
    except requests.RequestException as error:
        raise PassingError(reason(error)) from error


def _other_size(place: str, found: str, recorded: int) -> DataError:
    return DataError(
        f"the shard has {found} bytes where the catalogue records {recorded}: it was cut or replaced",
        where=place,
        fix="upload it again, or index the dataset again",
    )


def reason(error: BaseException) -> str:
    """Kind and first line of an error of someone else's client."""
    return f"{type(error).__name__}: {error}".rstrip(": ").splitlines()[0][:200]
