"""Fetches through the real client of the model hub, from a small stand-in of its HTTP API."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from echox import doctor
from echox.errors import AlteredModelError
from echox.release import hub

FIRST, SECOND = "a" * 40, "b" * 40
ROOT = Path(__file__).resolve().parents[2]


def blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class StubHub(ThreadingHTTPServer):
    """One repository, `org/model`.

    Attributes:
        commits: commit to file to content.
        head: the commit that `main` names.
        then: the commit that `main` names as soon as it was asked for once; None where it does not move.
        claimed: the commit that it says it answers with, where that is not the one it was asked for.
        sent: contents that are sent in place of the true ones, as an altered mirror would.
        asked: paths of all requests.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        small, large = b'{"model_type": "x"}', b"w" * 5000
        self.commits = {
            FIRST: {"config.json": small, "model.safetensors": large, "README.md": b"words"},
            SECOND: {"config.json": small + b" ", "model.safetensors": large + b"!", "README.md": b"words"},
        }
        self.head = FIRST
        self.then: str | None = None
        self.claimed: str | None = None
        self.sent: dict[str, bytes] = {}
        self.asked: list[str] = []


class _Handler(BaseHTTPRequestHandler):
    server: StubHub

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path = self.path.partition("?")[0]
        self.server.asked.append(path)
        if "/tree/" in path:
            files = self.server.commits[path.rpartition("/tree/")[2]]
            return self._send(200, json.dumps([_entry(*file) for file in files.items()]).encode(), {})
        if path.startswith("/api/models/org/model"):
            revision = path.rpartition("/revision/")[2] if "/revision/" in path else "main"
            commit = self.server.head if revision == "main" else revision
            files = self.server.commits.get(commit)
            if files is None:
                return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            siblings = [_described(name, content) for name, content in files.items()]
            self.server.head = self.server.then or self.server.head
            described = {"id": "org/model", "sha": self.server.claimed or commit, "siblings": siblings}
            return self._send(200, json.dumps(described).encode(), {})
        if not path.startswith("/org/model/resolve/"):
            return self._send(404, b"{}", {})
        commit, _, name = path.removeprefix("/org/model/resolve/").partition("/")
        true = self.server.commits[commit][name]
        large = name.endswith("safetensors")
        etag = hashlib.sha256(true).hexdigest() if large else blob(true)
        content = self.server.sent.get(name, true)
        self._send(200, content if body else b"", {"X-Repo-Commit": commit, "ETag": f'"{etag}"'}, len(content))

    def _send(self, code: int, content: bytes, headers: dict[str, str], length: int | None = None) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


def _described(name: str, content: bytes) -> dict[str, Any]:
    described: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": blob(content)}
    if name.endswith("safetensors"):
        digest = hashlib.sha256(content).hexdigest()
        described["lfs"] = {"size": len(content), "sha256": digest, "pointerSize": 130}
    return described


def _entry(name: str, content: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": name, "size": len(content), "oid": blob(content)}
    if name.endswith("safetensors"):
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return entry


@pytest.fixture
def stub() -> Iterator[StubHub]:
    server = StubHub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


FETCH = """
import json, sys
from pathlib import Path
from echox.errors import AlteredModelError
from echox.release import hub
for folder, revision, lock in json.loads(sys.argv[1]):
    Path(folder).mkdir(parents=True)
    try:
        came = hub.fetch("org/model", ["*.json", "*.safetensors"], Path(folder), revision=revision,
                         lock=Path(lock) if lock else None)
        print(json.dumps(came and came.record()))
    except AlteredModelError as error:
        print(json.dumps(str(error)))
"""


def fetched(server: StubHub, *calls: tuple[Path, str | None, Path | None]) -> list[Any]:
    """What `hub.fetch` answers in a process whose HF_ENDPOINT is the server."""
    environment = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0"}
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    words = [(str(folder), revision, str(lock) if lock else None) for folder, revision, lock in calls]
    done = subprocess.run(
        [sys.executable, "-c", FETCH, json.dumps(words)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_commit_is_taken_whatever_the_branch_names_and_its_files_are_compared(stub: StubHub, tmp_path: Path) -> None:
    stub.head = SECOND
    (found,) = fetched(stub, (tmp_path / "m", FIRST, None))
    assert found["revision"] == FIRST
    assert found["files"] == {
        name: hashlib.sha256(stub.commits[FIRST][name]).hexdigest() for name in ("config.json", "model.safetensors")
    }
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == ["config.json", "model.safetensors"]
    assert not any("main" in path for path in stub.asked)


def test_the_first_fetch_of_a_branch_decides_for_those_that_follow(stub: StubHub, tmp_path: Path) -> None:
    lock = tmp_path / "locks" / "model.json"
    (first,) = fetched(stub, (tmp_path / "one", None, lock))
    assert first["revision"] == FIRST and json.loads(lock.read_text()) == first
    stub.head = SECOND
    (again,) = fetched(stub, (tmp_path / "two", None, lock))
    assert again == first
    # A hub that gives other bytes, with hashes to match, for a commit that was fetched before.
    stub.commits[FIRST]["config.json"] = b"{}"
    (told,) = fetched(stub, (tmp_path / "three", None, lock))
    assert "config.json of org/model has SHA-256" in told and "was fetched first" in told
    assert json.loads(lock.read_text()) == first


@pytest.mark.parametrize(
    ("name", "kind"), [("config.json", "git hash"), ("model.safetensors", "SHA-256")], ids=["small", "large"]
)
def test_a_file_that_is_not_what_the_hub_records_is_named(stub: StubHub, tmp_path: Path, name: str, kind: str) -> None:
    stub.sent[name] = bytes(reversed(stub.commits[FIRST][name].replace(b"w", b"v")))
    lock = tmp_path / "lock.json"
    (told,) = fetched(stub, (tmp_path / "m", FIRST, lock))
    assert f"{name} of org/model has {kind}" in told and "which the hub records" in told
    assert not lock.exists()


def test_a_hub_that_answers_with_another_commit_is_refused(stub: StubHub, tmp_path: Path) -> None:
    stub.claimed = "main-has-no-commit"
    (told,) = fetched(stub, (tmp_path / "m", None, None))
    assert "answers with commit main-has-no-commit" in told
    stub.claimed = SECOND
    (told,) = fetched(stub, (tmp_path / "n", FIRST, None))
    assert f"answers with commit {SECOND} of org/model where {FIRST} was asked for" in told


def test_a_branch_that_moves_during_the_fetch_gives_the_files_of_one_commit(stub: StubHub, tmp_path: Path) -> None:
    stub.then = SECOND
    (found,) = fetched(stub, (tmp_path / "m", None, None))
    assert stub.head == SECOND and found["revision"] == FIRST
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == stub.commits[FIRST]["model.safetensors"]


def test_no_hub_is_no_error_and_a_branch_is_no_pin(stub: StubHub, tmp_path: Path) -> None:
    stub.server_close()
    assert fetched(stub, (tmp_path / "m", FIRST, None)) == [None]
    with pytest.raises(ValueError, match="main is no commit"):
        hub.fetch("org/model", ["*"], tmp_path, revision="main")


def test_what_a_download_keeps_of_hashes_names_a_file_that_was_altered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ref = "openai/whisper-base"
    monkeypatch.setenv("ECHOX_CACHE", str(tmp_path))
    folder = tmp_path / "models" / ref
    records = folder / ".cache" / "huggingface" / "download"
    records.mkdir(parents=True)
    for name, content in {"config.json": b"{}", "model.safetensors": b"weights"}.items():
        (folder / name).write_bytes(content)
        etag = blob(content) if name == "config.json" else hashlib.sha256(content).hexdigest()
        (records / f"{name}.metadata").write_text(f"{FIRST}\n{etag}\n1.0\n")
    finding = doctor._model(ref)
    assert finding.state == "ok" and f"commit {FIRST[:12]}" in finding.detail
    for name in ("config.json", "model.safetensors"):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole.replace(b"w", b"v").replace(b"{", b"["))
        finding = doctor._model(ref)
        assert finding.state == "fail" and f"{name} was altered" in finding.detail
        with pytest.raises(AlteredModelError):
            hub.verify_download(folder, 1 << 30)
        assert hub.verify_download(folder, 1) == FIRST, "too large to be read"
        (folder / name).write_bytes(whole)


def test_the_doctor_compares_a_fetched_model_with_its_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from echox.release.checksums import SUMS_NAME, write_sums

    ref = "openai/whisper-base"
    monkeypatch.setenv("ECHOX_CACHE", str(tmp_path))
    folder = tmp_path / "models" / ref
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_text("w")
    assert "no hashes" in doctor._model(ref).detail
    write_sums(folder, {"kind": "hub", "repository": ref, "revision": FIRST})
    finding = doctor._model(ref)
    assert finding.state == "ok" and f"commit {FIRST[:12]}" in finding.detail
    (folder / "model.safetensors").write_text("v")
    finding = doctor._model(ref)
    assert finding.state == "fail" and "model.safetensors was altered" in finding.detail and finding.fix
    (folder / SUMS_NAME).write_text('{"files": [7]}')
    assert doctor._model(ref).state == "fail"
