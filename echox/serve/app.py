"""The HTTP application: a page, what it serves, and streamed answers."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from echox.errors import DataError, EchoXError
from echox.serve.messages import event_line, parse_question
from echox.serve.page import PAGE
from echox.serve.worker import BusyError
from echox.speak.events import Done, Event

if TYPE_CHECKING:
    from starlette.requests import Request

    from echox.serve.limits import Limits
    from echox.serve.worker import Session, Worker

LOOPBACK = ("localhost", "127.0.0.1", "::1")
_PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline' blob:; worker-src blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class _TooLarge(Exception):
    """A request is larger than it may be."""


def build_app(
    worker: Worker, limits: Limits, *, name: str = "", token: str | None = None, hosts: Sequence[str] = LOOPBACK
) -> Starlette:
    """The application.

    Args:
        worker: is started and stopped with it.
        limits: of questions.
        name: what is served, for readers.
        token: what a request must carry as `Authorization: Bearer`; None: nothing.
        hosts: names by which it may be called, so that a page of elsewhere cannot pass for this machine; `*`: any.
    """

    @asynccontextmanager
    async def running(app: Starlette) -> AsyncIterator[None]:
        worker.start()
        yield
        await run_in_threadpool(worker.stop)

    async def page(request: Request) -> Response:
        return HTMLResponse(PAGE, headers={"Content-Security-Policy": _PAGE_POLICY})

    async def about(request: Request) -> Response:
        refused = _refusal(request, token)
        opened, waiting = worker.load
        return refused or JSONResponse({"name": name, **asdict(limits), "in_progress": opened, "in_queue": waiting})

    async def answer(request: Request) -> Response:
        refused = _refusal(request, token)
        if refused is not None:
            return refused
        try:
            body = await _body(request, limits.body_bytes)
            is_json = request.headers.get("content-type", "").partition(";")[0].strip() == "application/json"
            question = await run_in_threadpool(parse_question, body, is_json, request.query_params, limits)
            heard: asyncio.Queue[Event | EchoXError] = asyncio.Queue()
            loop = asyncio.get_running_loop()
            session = worker.ask(question, lambda event: _tell(loop, heard, event))
        except _TooLarge:
            return _error(413, f"the request is larger than {limits.body_bytes >> 20} MiB", "ask a shorter question")
        except BusyError as error:
            return _error(503, error.what, error.fix, {"Retry-After": "5"})
        except DataError as error:
            return _error(422, error.what, error.fix)
        lines = _lines(session, heard)
        return StreamingResponse(lines, media_type="application/x-ndjson", headers={"Cache-Control": "no-store"})

    routes = [
        Route("/", page),
        Route("/about", about),
        Route("/answer", answer, methods=["POST"]),
    ]
    middleware = [Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))]
    return Starlette(routes=routes, middleware=middleware, lifespan=running)


def _tell(loop: asyncio.AbstractEventLoop, heard: asyncio.Queue[Event | EchoXError], event: Event | EchoXError) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(heard.put_nowait, event)


async def _lines(session: Session, heard: asyncio.Queue[Event | EchoXError]) -> AsyncIterator[bytes]:
    """Events up to the last one; an answer to which nobody listens any more is cancelled."""
    try:
        while True:
            event = await heard.get()
            yield event_line(event)
            if isinstance(event, Done | EchoXError):
                return
    finally:
        session.cancelled = True


async def _body(request: Request, most: int) -> bytes:
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > most:
            raise _TooLarge
        parts.append(part)
    return b"".join(parts)


def _refusal(request: Request, token: str | None) -> Response | None:
    origin = request.headers.get("origin")
    if origin is not None and origin.partition("://")[2] != request.headers.get("host"):
        return _error(403, "a page of another site asks", "open the page of this server")
    given = request.headers.get("authorization", "")
    if token is not None and not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
        return _error(401, "the token is missing or wrong", "use the address that `echox serve` printed")
    return None


def _error(status: int, what: str, fix: str, headers: dict[str, str] | None = None) -> Response:
    content: dict[str, Any] = {"error": what, "fix": fix}
    return JSONResponse(content, status, headers)
