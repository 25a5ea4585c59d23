"""Archives come through the machine's own clients, and nothing in them runs before its hash is known."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from echox.errors import NetworkError
from echox.files import sha256_file
from echox.release.download import Package, fetch_archive


def test_a_source_archive_is_not_built_to_look_into_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index, mark = tmp_path / "index", tmp_path / "mark"
    index.mkdir()
    archive = index / "planted-1.0.tar.gz"
    setup = (
        f"from pathlib import Path\nfrom setuptools import setup\nPath({str(mark)!r}).touch()\nsetup(name='planted')"
    )
    with tarfile.open(archive, "w:gz") as tar:
        for name, text in (("setup.py", setup), ("PKG-INFO", "Metadata-Version: 1.0\nName: planted\nVersion: 1.0\n")):
            member = tarfile.TarInfo(f"planted-1.0/{name}")
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text.encode()))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("PIP_NO_BUILD_ISOLATION", "0")  # the build would find the setuptools of this environment
    package = Package(client="pip", name="planted", version="1.0", archive=archive.name, sha256=sha256_file(archive))
    with pytest.raises(NetworkError, match="Could not download the pip package planted 1.0"):
        fetch_archive(package, tmp_path / "downloads")
    assert not mark.exists()
