"""`echox doctor`: each gap is found, and only what keeps training from running fails."""

from __future__ import annotations

import http.server
import py_compile
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from echox import doctor


def test_the_lock_is_read_and_compared(tmp_path: Path) -> None:
    lock = tmp_path / "requirements.lock"
    lock.write_text("numpy==0.0.1\ntorch==0.1\nno-such-package==1.0\n")
    tested = doctor.read_lock(lock)
    assert tested == {"numpy": "0.0.1", "torch": "0.1", "no-such-package": "1.0"}
    findings = {finding.subject: finding for finding in doctor._packages(tested)}
    assert findings["torch"].state == "note" and "tested with 0.1" in findings["torch"].detail
    assert "no-such-package absent" in findings["tested set"].detail and "numpy" in findings["tested set"].detail
    assert doctor.read_lock(tmp_path / "none") == {}


def test_a_missing_pinned_package_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PINNED", ("no-such-package",))
    finding = doctor._packages({})[0]
    assert (finding.state, finding.fix) == ("fail", "run `make env`")


def test_a_local_build_tag_is_the_same_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "version", lambda name: "2.11.0+cu130")
    assert doctor._packages({"torch": "2.11.0"})[0].state == "ok"


def test_modules_that_are_compiled_in_every_process_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = tmp_path / "package" / "__init__.py"
    source.parent.mkdir()
    source.touch()
    monkeypatch.setattr(doctor, "find_spec", lambda name: SimpleNamespace(origin=str(source)))
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    assert doctor._bytecode().state == "ok"
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    finding = doctor._bytecode()
    assert finding.state == "note" and finding.fix.endswith(f"compileall -q -j 0 {tmp_path}`")
    py_compile.compile(str(source))
    assert doctor._bytecode().state == "ok"


def test_no_compiler_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert doctor._compiler().state == "ok"
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    finding = doctor._compiler()
    assert finding.state == "fail" and "g++ and ninja" in finding.detail


def test_a_check_that_breaks_is_a_finding() -> None:
    def _accelerator() -> doctor.Finding:
        raise OSError("libc10_cuda.so: cannot open")

    finding = doctor._guarded(_accelerator)
    assert (finding.subject, finding.state) == ("accelerator", "fail") and "libc10_cuda" in finding.detail


def test_gpus_that_are_left_alone_are_no_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ECHOX_DEVICE", "cpu")
    finding = doctor._accelerator()
    assert finding.state == "ok" and "ECHOX_DEVICE=cpu" in finding.detail


def test_a_listening_head_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
        monkeypatch.setenv("RAY_ADDRESS", f"http://127.0.0.1:{server.server_port}")
        assert doctor._ray().state == "ok"
    finally:
        server.shutdown()
        server.server_close()
    assert doctor._ray().state == "note"


@pytest.mark.parametrize("state", ["ok", "note", "fail"])
def test_the_exit_code_follows_the_worst_finding(
    state: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    finding = doctor.Finding("thing", state, "what", "repair it")  # type: ignore[arg-type]
    monkeypatch.setattr(doctor, "examine", lambda: [finding])
    assert doctor.run(doctor.argparse.Namespace(json=False)) == int(state == "fail")
    assert "fix: repair it" in capsys.readouterr().out
