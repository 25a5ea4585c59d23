"""Finds a running local Ray head or starts one, and stops only a head that this project started."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from echox.config.paths import cache_dir
from echox.errors import LaunchError
from launch.paths import HOME

MARK = "ECHOX_HEAD_ID"
"""Environment variable that every process of a head we started inherits; how its stragglers are recognised."""
FOLDER_PREFIX = "echox-ray-"
"""How the name of a head's temporary folder begins."""
DASHBOARD_PORT = 8265
START_S = 120.0
STOP_S = 3.0
"""What the head gets to end by itself; Ray 2.60 takes no notice of SIGTERM there, and is killed after it."""
OBJECT_STORE_BYTES = 200_000_000
# Ray's sockets lie below <temporary folder>/session_<60 characters>/sockets/, and a socket path may have 107 bytes.
TEMP_ROOT_LIMIT = 24


@dataclass(frozen=True, kw_only=True)
class Head:
    """A Ray head this project started.

    Attributes:
        pid: process that holds the head together; it ends every Ray process when it ends.
        created: start time of that process, so that a recycled pid is not mistaken for it.
        mark: value of `MARK` in every process of the head.
        address: `http://host:port` of its dashboard and job API.
        token_file: file with the token the head asks for.
        folder: Ray's temporary folder, removed when the head stops.
        starter: process that started it, and is expected to stop it.
        starter_created: start time of that process.
    """

    pid: int
    created: float
    mark: str
    address: str
    token_file: str
    folder: str
    starter: int
    starter_created: float

    def alive(self) -> bool:
        """Whether the process still runs."""
        return _runs(self.pid, self.created)

    def abandoned(self) -> bool:
        """Whether its starter is gone, so that no other process will stop it."""
        return not _runs(self.starter, self.starter_created)

    def environment(self) -> dict[str, str]:
        """Variables a process needs to talk to this head."""
        return {"RAY_ADDRESS": self.address, **token_environment(self.token_file)}


def token_environment(token_file: str) -> dict[str, str]:
    """Ray's variables for token authentication."""
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": token_file}


def registry_file() -> Path:
    """Where the head started last is remembered, for runs that outlive their starter."""
    return cache_dir() / "ray" / "head.json"


def remembered(registry: Path | None = None) -> Head | None:
    """The head an earlier command started and did not stop, if it still runs.

    The cache may be shared: what is remembered there counts only if the process and the folder are what we make, for
    the one may be killed and the other removed.
    """
    path = registry or registry_file()
    try:
        head = Head(**json.loads(path.read_text()))
        ours = path.stat().st_uid == os.geteuid() and _is_ours(head)
    except (OSError, ValueError, TypeError):
        return None
    return head if ours and head.alive() and answers(head.address) else None


def _is_ours(head: Head) -> bool:
    """Whether the process carries the head's mark, and the folder is one that `start_head` makes."""
    folder = Path(head.folder)
    try:
        marked = bool(head.mark) and psutil.Process(head.pid).environ().get(MARK) == head.mark
        made = folder.name.startswith(FOLDER_PREFIX) and not folder.is_symlink()
        return marked and made and folder.stat().st_uid == os.geteuid()
    except (OSError, psutil.Error):
        return False


def running_elsewhere() -> str | None:
    """Address of a head somebody else runs: $RAY_ADDRESS, or Ray's default port on this machine.

    One on the default port is used only if it has our Ray version and accepts our token; a head that refuses us is not
    ours to use.

    Raises:
        LaunchError: $RAY_ADDRESS is set and does not answer.
    """
    named = os.environ.get("RAY_ADDRESS")
    if named and named.startswith("http"):
        if not answers(named):
            raise LaunchError(f"no Ray head answers at RAY_ADDRESS={named}", fix="start it, or unset RAY_ADDRESS")
        return named
    address = f"http://127.0.0.1:{DASHBOARD_PORT}"
    return address if _ray_version(address) == _own_ray_version() else None


def start_head(*, cpus: int, dashboard_port: int | None = None, registry: Path | None = None) -> Head:
    """Start a head on this machine and wait until its job API answers (15 to 25 s, most of it the dashboard).

    It ends with this process: by `stop_head`, or, if this process is killed, by `launch/client/head_guard.py`.

    Args:
        cpus: CPUs the head offers.
        dashboard_port: port of dashboard and job API; None takes 8265, or the next free one.
        registry: file to remember the head in.

    Raises:
        LaunchError: the port is taken, or the head did not come up.
    """
    if dashboard_port is not None and not port_free(dashboard_port):
        raise LaunchError(
            f"port {dashboard_port} is already in use, so Ray's dashboard cannot have it",
            fix="leave the port out to take a free one, or stop the program that listens there",
        )
    path = (registry or registry_file()).absolute()
    for attempt in range(3):  # between finding a port free and Ray binding it, somebody else may take it
        port = dashboard_port or next_free(DASHBOARD_PORT)
        process, head, log = _spawn(cpus, port)
        start_guard(head, path)
        if _wait_until_up(process, head.address):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(asdict(head)))
            return head
        tail = log.read_text(errors="replace")[-2000:]
        _stop_processes(head)
        shutil.rmtree(head.folder, ignore_errors=True)
        if "in use" not in tail or dashboard_port is not None or attempt == 2:
            break
    reason = [line.strip() for line in tail.splitlines() if line.strip()][-1:] or ["it wrote nothing"]
    raise LaunchError(
        f"the Ray head did not come up: {reason[0][:300]}", fix="run `ray start --head --block` to see all it says"
    )


def stop_head(head: Head, registry: Path | None = None) -> None:
    """End every process of a head we started, and nothing else; removes its temporary folder."""
    _stop_processes(head)
    shutil.rmtree(head.folder, ignore_errors=True)
    path = registry or registry_file()
    with contextlib.suppress(OSError, ValueError):
        if json.loads(path.read_text()).get("mark") == head.mark:
            path.unlink()


def start_guard(head: Head, registry: Path) -> None:
    """Start the process that ends a head of ours when its starter is gone; it outlives its starter and its session."""
    words = [sys.executable, "-m", "launch.client.head_guard", json.dumps(asdict(head)), str(registry)]
    paths = [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]
    # Without the mark of a head that this process itself may belong to, which would end the guard with it.
    environment = {key: value for key, value in os.environ.items() if key != MARK}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    quiet = subprocess.DEVNULL
    subprocess.run(words, env=environment, stdin=quiet, stdout=quiet, stderr=quiet, start_new_session=True, check=False)


def processes_of(head: Head) -> list[psutil.Process]:
    """Every live process of a head: its tree, and processes elsewhere that carry its mark."""
    found: dict[int, psutil.Process] = {}
    with contextlib.suppress(psutil.NoSuchProcess):
        if head.alive():
            root = psutil.Process(head.pid)
            found = {process.pid: process for process in [root, *root.children(recursive=True)]}
    for process in psutil.process_iter():
        try:
            if process.pid not in found and process.environ().get(MARK) == head.mark:
                found[process.pid] = process
        except (psutil.Error, OSError):
            continue
    found.pop(os.getpid(), None)
    return list(found.values())


def port_free(port: int) -> bool:
    """Whether a port can be bound on every interface of this machine."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def next_free(start: int, count: int = 200) -> int:
    """The first free port from `start`.

    Raises:
        LaunchError: none of `count` ports is free.
    """
    for port in range(start, start + count):
        if port_free(port):
            return port
    raise LaunchError(f"ports {start} to {start + count - 1} are all in use", fix="stop some of those programs")


def answers(address: str) -> bool:
    """Whether something that speaks Ray's HTTP API listens there, token or not."""
    import requests

    try:
        status = requests.get(f"{address}/api/version", timeout=3).status_code
    except requests.RequestException:
        return False
    return status in (200, 401, 403)


def _spawn(cpus: int, port: int) -> tuple[subprocess.Popen[bytes], Head, Path]:
    root = tempfile.gettempdir()
    folder = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX, dir=root if len(root) <= TEMP_ROOT_LIMIT else "/tmp"))
    token_file, log, mark = folder / "token", folder / "head.log", secrets.token_hex(8)
    token_file.touch(mode=0o600)
    token_file.write_text(secrets.token_hex(32))
    client_port, agent_port = _free_ports(2)
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"),
        *("--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={port}", "--port=0"),
        *(f"--num-cpus={cpus}", f"--object-store-memory={OBJECT_STORE_BYTES}", f"--temp-dir={folder}"),
        *(f"--ray-client-server-port={client_port}", f"--dashboard-agent-listen-port={agent_port}"),
        # Ports chosen by the system: Ray's fixed range collides with the next Ray on the machine.
        *("--min-worker-port=0", "--max-worker-port=0", "--node-ip-address=127.0.0.1"),
    ]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    environment.pop("RAY_AUTH_TOKEN", None)
    environment |= {
        MARK: mark,
        HOME: os.environ.get(HOME, os.getcwd()),
        "RAY_USAGE_STATS_ENABLED": "0",
        # Ray nices its workers by 15; on one's own machine training is what the machine is for.
        "RAY_worker_niceness": "0",
        # A job's `python` is the first on the head's PATH.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        **token_environment(str(token_file)),
    }
    with log.open("wb") as file:
        # Its own session: Ctrl-C in the terminal reaches us, and we decide what ends and in which order.
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    head = Head(
        pid=process.pid,
        created=psutil.Process(process.pid).create_time(),
        mark=mark,
        address=f"http://127.0.0.1:{port}",
        token_file=str(token_file),
        folder=str(folder),
        starter=os.getpid(),
        starter_created=psutil.Process().create_time(),
    )
    return process, head, log


def _wait_until_up(process: subprocess.Popen[bytes], address: str) -> bool:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            return False
        if answers(address):
            return True
        time.sleep(0.3)
    return False


def _stop_processes(head: Head) -> None:
    """SIGTERM to the head, which ends its own; then SIGKILL to whatever of it is left."""
    known = processes_of(head)
    if head.alive():
        with contextlib.suppress(psutil.NoSuchProcess):
            psutil.Process(head.pid).terminate()
        psutil.wait_procs(known, timeout=STOP_S)
    left = {process.pid: process for process in [*known, *processes_of(head)]}
    for process in left.values():
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(list(left.values()), timeout=5)
    with contextlib.suppress(ChildProcessError, OSError):
        os.waitpid(head.pid, os.WNOHANG)


def _free_ports(count: int) -> list[int]:
    """Ports below the system's range for outgoing connections, so that none is taken between here and Ray."""
    found: list[int] = []
    start = 20_000 + secrets.randbelow(8_000)
    while len(found) < count:
        found.append(next_free(found[-1] + 1 if found else start))
    return found


def _runs(pid: int, created: float) -> bool:
    try:
        process = psutil.Process(pid)
        return bool(abs(process.create_time() - created) < 1 and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _ray_version(address: str) -> str | None:
    """Version of the Ray at an address that accepts our token, if any."""
    import requests

    from launch.client.jobs import token_header

    try:
        response = requests.get(f"{address}/api/version", timeout=3, headers=token_header())
        return str(response.json()["ray_version"]) if response.status_code == 200 else None
    except (requests.RequestException, ValueError, KeyError):
        return None


def _own_ray_version() -> str:
    from importlib.metadata import version

    return version("ray")
