"""The application: a page, what it serves, and answers streamed over HTTP and WebSockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route, WebSocketRoute

from echox.errors import EchoXError
from echox.serve.converse import Conversations
from echox.serve.messages import event_line, parse_question
from echox.serve.page import PAGE
from echox.serve.refusals import RefusedError, bearer, check_origin, check_token, status_of
from echox.speak.events import Done, Event

if TYPE_CHECKING:
    from starlette.requests import HTTPConnection, Request
    from starlette.websockets import WebSocket

    from echox.serve.limits import Limits
    from echox.serve.worker import Session, Worker

LOOPBACK = ("localhost", "127.0.0.1", "::1")
_PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline' blob:; worker-src blob:; "
    "media-src blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def build_app(
    worker: Worker, limits: Limits, *, name: str = "", token: str | None = None, hosts: Sequence[str] = LOOPBACK
) -> Starlette:
    """The application.

    Args:
        worker: is started and stopped with it.
        limits: of questions.
        name: what is served, for readers.
        token: what a request must carry as `Authorization: Bearer`, or a conversation with its start; None: nothing.
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
        _check(request, token)
        opened, waiting = worker.load
        load = {"in_progress": opened, "in_queue": waiting, "in_conversation": conversations.count}
        return JSONResponse({"name": name, **asdict(limits), **load})

    async def answer(request: Request) -> Response:
        _check(request, token)
        body = await _body(request, limits.body_bytes)
        is_json = request.headers.get("content-type", "").partition(";")[0].strip() == "application/json"
        question = await run_in_threadpool(parse_question, body, is_json, request.query_params, limits)
        heard: asyncio.Queue[Event | EchoXError] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        session = worker.ask(question, lambda event: _tell(loop, heard, event))
        lines = _lines(worker, session, heard)
        return StreamingResponse(lines, media_type="application/x-ndjson", headers={"Cache-Control": "no-store"})

    async def converse(socket: WebSocket) -> None:
        try:
            check_origin(socket)
            if "authorization" in socket.headers:
                check_token(bearer(socket), token)
        except RefusedError as error:
            await socket.send_denial_response(_refused(error))
            return
        await conversations.hold(socket)

    async def refuse(request: Request, error: Exception) -> Response:
        assert isinstance(error, EchoXError)
        return _refused(error)

    conversations = Conversations(worker, limits, token)
    routes = [
        Route("/", page),
        Route("/about", about),
        Route("/answer", answer, methods=["POST"]),
        WebSocketRoute("/converse", converse),
    ]
    middleware = [Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))]
    return Starlette(routes=routes, middleware=middleware, lifespan=running, exception_handlers={EchoXError: refuse})


def _tell(loop: asyncio.AbstractEventLoop, heard: asyncio.Queue[Event | EchoXError], event: Event | EchoXError) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(heard.put_nowait, event)


async def _lines(worker: Worker, session: Session, heard: asyncio.Queue[Event | EchoXError]) -> AsyncIterator[bytes]:
    """Events up to the last one; an answer to which nobody listens any more is cancelled."""
    try:
        while True:
            event = await heard.get()
            yield event_line(event)
            if isinstance(event, Done | EchoXError):
                return
    finally:
        worker.cancel(session)


async def _body(request: Request, most: int) -> bytes:
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > most:
            what, fix = f"the request is larger than {most >> 20} MiB", "ask a shorter question"
            raise RefusedError(what, fix=fix, status=413)
        parts.append(part)
    return b"".join(parts)


def _check(connection: HTTPConnection, token: str | None) -> None:
    check_origin(connection)
    check_token(bearer(connection), token)


def _refused(error: EchoXError) -> Response:
    status = status_of(error)
    headers = {"Retry-After": "5"} if status == 503 else {}
    return JSONResponse({"error": error.what, "fix": error.fix}, status, headers)
