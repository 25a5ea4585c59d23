"""Decides which cluster a command speaks to, and whether its head is this machine.

What is said explicitly wins over the environment: a run must never be stopped on another cluster than the one named. An
address is that of the dashboard, which serves Ray's job API; other forms that Ray has are refused, not reinterpreted.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from echox.config.locations import without_secrets
from echox.errors import LaunchError

VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
"""Where an address is looked for that no argument gives, in order."""
DEFAULT = "http://127.0.0.1:8265"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
_SAME_BOOT_S = 2.0


def api_address(given: str | None, environment: Mapping[str, str] = os.environ) -> str:
    """`http(s)://host[:port][/path]` of a cluster's job API: as given, else from the environment, else this machine's.

    Raises:
        LaunchError: what was named is no such address.
    """
    named = [("--address", given), *((name, environment.get(name)) for name in VARIABLES)]
    where, address = next(((where, value) for where, value in named if value), ("", DEFAULT))
    wrong = _mistake(address)
    if wrong:
        said = without_secrets(f"{where} {address}")
        raise LaunchError(f"{wrong} is not the address of a job API", where=said, fix=_fix(address))
    return address.rstrip("/")


@contextmanager
def without_variables() -> Iterator[None]:
    """Ray's client lets these variables win over the address that it is given; in the block they are not there."""
    hidden = {name: os.environ.pop(name) for name in VARIABLES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def heads(nodes: Any) -> list[tuple[str, float]]:
    """Host name and boot time of the head nodes in an answer of `/nodes?view=summary`."""
    found = []
    for node in nodes["data"]["summary"]:
        raylet = node["raylet"]
        if raylet.get("isHeadNode") and raylet.get("state", "ALIVE") == "ALIVE":
            found.append((str(raylet["nodeManagerHostname"]), float(node["bootTime"])))
    return found


def on_this_machine(address: str, nodes: Any) -> bool:
    """Whether the head behind an address runs here: a tunnel or a port-forward has a loopback address as well.

    Args:
        address: of the job API.
        nodes: what the head says of its nodes, see `heads`; None where it does not say.
    """
    import psutil

    if urlsplit(address).hostname not in LOOPBACK or nodes is None:
        return False
    here = socket.gethostname()
    return any(name == here and abs(boot - psutil.boot_time()) < _SAME_BOOT_S for name, boot in heads(nodes))


def _mistake(address: str) -> str:
    try:
        parts = urlsplit(address)
        port = parts.port
    except ValueError:
        return "this"
    if parts.scheme in ("http", "https"):
        if parts.username is not None or parts.password is not None:
            return "a URL with a login"
        return "" if parts.hostname and port != 0 and not parts.query and not parts.fragment else "this"
    if parts.scheme == "ray":
        return "a Ray Client address"
    return "auto" if address == "auto" else "an address without http://"


def _fix(address: str) -> str:
    if "@" in address:
        return "leave the login out; a token goes into RAY_AUTH_TOKEN or ~/.ray/auth_token"
    if "://" not in address and address != "auto" and not address.endswith(":6379"):
        return f"if that is the dashboard, write http://{address}"
    return "name the dashboard, such as http://HEAD:8265"
