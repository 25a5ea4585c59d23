"""Decides whose requests a server takes, and which status a refusal has, for HTTP and WebSockets alike."""

from __future__ import annotations

import hmac
from typing import TYPE_CHECKING

from echox.errors import DataError, EchoXError
from echox.serve.worker import BusyError

if TYPE_CHECKING:
    from starlette.requests import HTTPConnection


class RefusedError(EchoXError):
    """A request that a server does not take.

    Attributes:
        status: of HTTP.
    """

    def __init__(self, what: str, *, where: str = "", fix: str = "", status: int = 403) -> None:
        super().__init__(what, where=where, fix=fix)
        self.status = status


def status_of(error: EchoXError) -> int:
    """The status of HTTP that says what kind of error it is; a WebSocket closes with 4000 more."""
    if isinstance(error, RefusedError):
        return error.status
    return 503 if isinstance(error, BusyError) else 422 if isinstance(error, DataError) else 500


def check_origin(connection: HTTPConnection) -> None:
    """Programs name no origin; a page has to be the server's own.

    Raises:
        RefusedError: a page of another site asks.
    """
    origin = connection.headers.get("origin")
    if origin is not None and origin.partition("://")[2] != connection.headers.get("host"):
        raise RefusedError("a page of another site asks", fix="open the page of this server", status=403)


def check_token(given: str, token: str | None) -> None:
    """In constant time.

    Args:
        given: with the request.
        token: of the server; None: it asks for none.

    Raises:
        RefusedError: it is another.
    """
    if token is not None and not hmac.compare_digest(given.encode(), token.encode()):
        raise RefusedError(
            "the token is missing or wrong", fix="use the address that `echox serve` printed", status=401
        )


def bearer(connection: HTTPConnection) -> str:
    """The token of the header `Authorization: Bearer`; empty where there is none."""
    kind, _, given = connection.headers.get("authorization", "").partition(" ")
    return given if kind == "Bearer" else ""
