"""Holds a conversation over a WebSocket: questions while they are spoken, answers while they come."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from starlette.websockets import WebSocketDisconnect

from echox.audio.io import SAMPLE_RATE
from echox.errors import DataError, EchoXError
from echox.serve.messages import event_message, parse_object, parse_options
from echox.serve.refusals import RefusedError, bearer, check_token, status_of
from echox.serve.worker import CANCELLED, BusyError
from echox.speak.events import Done, Event

if TYPE_CHECKING:
    from starlette.websockets import WebSocket

    from echox.serve.limits import Limits
    from echox.serve.worker import Question, Session, Worker

_BYTES_A_S = 2 * SAMPLE_RATE
_CLOSE = 4000
"""What a closing code has above the status of HTTP that says the same."""


class _Gone(Exception):
    """The other side left, or takes nothing any more."""


@dataclass(eq=False)
class _Turn:
    """A question and its answer.

    Attributes:
        question: without its sound.
        pcm16: its sound so far.
        session: once it was asked.
        cancelled: whether nothing but `Done` is to come.
    """

    question: Question
    pcm16: bytearray = field(default_factory=bytearray)
    session: Session | None = None
    cancelled: bool = False


class Conversations:
    """Holds those of a server.

    Args:
        worker: answers.
        limits: of questions and connections.
        token: what a connection must give, in the header or with its first message; None: nothing.

    Attributes:
        count: how many are open.
    """

    def __init__(self, worker: Worker, limits: Limits, token: str | None) -> None:
        self._worker, self._limits, self._token = worker, limits, token
        self.count = 0

    async def hold(self, socket: WebSocket) -> None:
        """Hold one, up to its end."""
        await socket.accept()
        self.count += 1
        conversation = Conversation(socket, self._worker, self._limits, self._token)
        try:
            if self.count > self._limits.conversations:
                fix = "try again in some seconds"
                await conversation.close(BusyError(f"{self._limits.conversations} conversations are open", fix=fix))
                return
            await conversation.hold()
        finally:
            self.count -= 1


class Conversation:
    """One connection.

    Args:
        socket: accepted.
        worker: answers.
        limits: of it.
        token: what it must give; None: nothing.
    """

    def __init__(self, socket: WebSocket, worker: Worker, limits: Limits, token: str | None) -> None:
        self._socket, self._worker, self._limits = socket, worker, limits
        self._token, self._given = token, bearer(socket)
        self._turn: _Turn | None = None
        self._events: asyncio.Queue[tuple[_Turn, Event | EchoXError]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._active = self._refilled = time.monotonic()
        self._allowance = float(limits.messages_s)

    async def hold(self) -> None:
        """Listen and tell until either side ends it; an answer to which nobody listens any more is cancelled."""
        tasks = [asyncio.create_task(each()) for each in (self._listen, self._tell, self._watch)]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            ended = await asyncio.gather(*tasks, return_exceptions=True)
            if self._turn is not None and self._turn.session is not None:
                self._worker.cancel(self._turn.session)
        errors = [error for error in ended if isinstance(error, EchoXError)]
        if errors:
            await self.close(errors[0])
        for error in ended:
            if isinstance(error, Exception) and not isinstance(error, EchoXError | _Gone):
                raise error

    async def close(self, error: EchoXError) -> None:
        """Say why it ends, and end it."""
        try:
            await self._send(error)
            async with asyncio.timeout(self._limits.idle_s):
                await self._socket.close(_CLOSE + status_of(error))
        except (_Gone, TimeoutError, RuntimeError):
            return

    async def _listen(self) -> None:
        while True:
            message = await self._socket.receive()
            if message["type"] == "websocket.disconnect":
                raise _Gone
            self._active = time.monotonic()
            said: str | bytes = message.get("bytes") or message.get("text") or ""
            self._count(said)
            if isinstance(said, bytes):
                self._hear(said)
            else:
                self._obey(parse_object(said, "the message"))

    def _count(self, message: str | bytes) -> None:
        """Take a message only where it is not too large, and not one of too many."""
        limits, now = self._limits, time.monotonic()
        if len(message) > limits.message_bytes:
            fix = "send sound in pieces of some 20 to 100 ms"
            raise RefusedError(f"a message has more than {limits.message_bytes >> 10} KiB", fix=fix, status=413)
        self._allowance = min(limits.messages_s, self._allowance + (now - self._refilled) * limits.messages_s)
        self._allowance, self._refilled = self._allowance - 1, now
        if self._allowance < 0:
            fix = "send sound in pieces of some 20 to 100 ms"
            raise RefusedError(f"there are more than {limits.messages_s} messages a second", fix=fix, status=429)

    def _obey(self, message: dict[str, Any]) -> None:
        match message.pop("type", None):
            case "start":
                self._start(message)
            case "end":
                self._ask()
            case "cancel":
                self._cancel()
            case other:
                what = f"there is no message of type {str(other)[:40]!r}"
                raise DataError(what, fix="send start, sound, end or cancel")

    def _start(self, message: dict[str, Any]) -> None:
        check_token(str(message.pop("token", self._given)), self._token)
        if self._turn is not None and not self._turn.cancelled:
            raise DataError("a question starts before the last one is answered", fix="send cancel, or wait for done")
        self._turn = _Turn(parse_options(message, self._limits, also=("token",)))

    def _hear(self, pcm16: bytes) -> None:
        turn, limits = self._spoken(), self._limits
        if len(pcm16) % 2:
            raise DataError(f"a piece of sound has {len(pcm16)} bytes", fix="send whole samples of two bytes")
        turn.pcm16 += pcm16
        if len(turn.pcm16) > limits.question_s * _BYTES_A_S:
            fix = "ask a shorter question"
            raise RefusedError(f"the question is longer than {limits.question_s:g} s", fix=fix, status=413)

    def _ask(self) -> None:
        turn = self._spoken()
        if not turn.pcm16:
            raise DataError("the question has no sound", fix="send 16-bit samples of 16 kHz after start")
        audio = np.frombuffer(bytes(turn.pcm16), "<i2").astype(np.float32) / np.float32(32768)
        turn.pcm16.clear()
        turn.session = self._worker.ask(replace(turn.question, audio=audio), lambda event: self._notify(turn, event))

    def _cancel(self) -> None:
        """End the answer, or the question; where there is none, its `Done` has just been sent."""
        turn = self._turn
        if turn is None or turn.cancelled:
            return
        turn.cancelled = True
        if turn.session is None:
            self._events.put_nowait((turn, CANCELLED))
        else:
            self._worker.cancel(turn.session)

    def _spoken(self) -> _Turn:
        """The question that is being spoken."""
        if self._turn is None or self._turn.cancelled or self._turn.session is not None:
            raise DataError("no question has started", fix="send start first")
        return self._turn

    def _notify(self, turn: _Turn, event: Event | EchoXError) -> None:
        """In the worker's thread."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._events.put_nowait, (turn, event))

    async def _tell(self) -> None:
        while True:
            turn, event = await self._events.get()
            if isinstance(event, EchoXError):
                raise event
            if isinstance(event, Done) and turn is self._turn:
                self._turn, self._active = None, time.monotonic()
            if isinstance(event, Done) or not turn.cancelled:
                await self._send(event)

    async def _watch(self) -> None:
        """End it where neither side has anything to say."""
        idle_s = self._limits.idle_s
        while (left := idle_s if self._answering else self._active + idle_s - time.monotonic()) > 0:
            await asyncio.sleep(left)
        fix = "connect again for the next question"
        raise RefusedError(f"nothing has come for {idle_s:g} s", fix=fix, status=408)

    @property
    def _answering(self) -> bool:
        return self._turn is not None and self._turn.session is not None

    async def _send(self, event: Event | EchoXError) -> None:
        text, pcm16 = event_message(event)
        try:
            async with asyncio.timeout(self._limits.idle_s):
                await self._socket.send_text(text)
                if pcm16:
                    await self._socket.send_bytes(pcm16)
        except (TimeoutError, OSError, RuntimeError, WebSocketDisconnect) as error:  # it takes nothing, or has left
            raise _Gone from error
