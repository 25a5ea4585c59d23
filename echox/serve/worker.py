"""Answers the questions of all sessions in one thread, a bounded number of them at a time."""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from echox.errors import EchoXError, printable
from echox.serve.limits import Limits
from echox.speak.events import Done, Event, Transcript
from echox.speak.sampling import GREEDY, SeededSampling

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from echox.speak.answers import Answer
    from echox.speak.engine import Engine
    from echox.speak.pipeline import SpeechToSpeech
    from echox.speak.vocoder import Vocoder
    from echox.stream.dialogue import Turn

_IDLE_S = 0.2
"""How often a worker without a question looks whether it is to stop."""
_LOST_IN_A_ROW = 3
"""After as many steps that failed, and none that did not, a worker is not well."""
_STUCK_S = 120.0
"""A step that takes longer will not end."""


CANCELLED = Done("", "cancelled", 0, 0, 0)
"""The end of a question that was not begun to be answered."""


class BusyError(EchoXError):
    """As many questions wait as may."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked.

    Attributes:
        audio: 16 kHz mono.
        history: the turns before it.
        sampling: how tokens are picked.
        tokens: most text tokens of the answer.
        transcript: whether to say what was heard, once the answer is given.
    """

    audio: NDArray[np.float32]
    history: Sequence[Turn | Mapping[str, Any]] = ()
    sampling: SeededSampling = GREEDY
    tokens: int
    transcript: bool = False


class Session:
    """A question that was taken.

    Attributes:
        cancelled: whether nobody wants its answer any more, see `Worker.cancel`.
        heard: the transcript so far.
    """

    def __init__(self, question: Question, notify: Callable[[Event | EchoXError], None]) -> None:
        self.question, self.notify = question, notify
        self.cancelled, self.heard = False, ""


class Worker:
    """The thread that answers.

    Args:
        model: an echo run.
        vocoder: speaks.
        limits: of questions at a time.
    """

    def __init__(self, model: SpeechToSpeech, vocoder: Vocoder, limits: Limits) -> None:
        self._model, self._vocoder, self._limits = model, vocoder, limits
        self._waiting: deque[Session] = deque()
        self._changed = threading.Condition()
        self._open: dict[Session, Answer] = {}
        self._transcribing: dict[Session, tuple[Iterator[str], Done]] = {}
        self._stopping = threading.Event()
        self._lost, self._stepped = 0, time.monotonic()
        self._thread = threading.Thread(target=self._run, name="answers", daemon=True)

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def stop(self) -> None:
        """End all answers, and the thread."""
        self._stopping.set()
        self._thread.join()

    @property
    def load(self) -> tuple[int, int]:
        """Answers in progress, and questions that wait."""
        return len(self._open) + len(self._transcribing), len(self._waiting)

    @property
    def healthy(self) -> bool:
        """Whether it answers: the thread runs, its step is not stuck, and its last steps did not all fail."""
        stuck = time.monotonic() - self._stepped > _STUCK_S
        return self._thread.is_alive() and not stuck and self._lost < _LOST_IN_A_ROW

    def ask(self, question: Question, notify: Callable[[Event | EchoXError], None]) -> Session:
        """Take a question.

        Args:
            question: what is asked.
            notify: called in the thread of the worker with each event up to `Done`, or with an error, the last one.

        Raises:
            BusyError: too many wait, or the worker has stopped.
        """
        session = Session(question, notify)
        with self._changed:
            if self._stopping.is_set():
                raise BusyError("the server stops", fix="ask again in some seconds")
            if len(self._waiting) >= self._limits.waiting:
                raise BusyError(f"the queue is full ({self._limits.waiting} waiting)", fix="ask again in some seconds")
            self._waiting.append(session)
            self._changed.notify()
        return session

    def cancel(self, session: Session) -> None:
        """End an answer before its next step; a question that waits leaves the queue now. `Done` comes either way."""
        session.cancelled = True
        with self._changed:
            if session not in self._waiting:
                return
            self._waiting.remove(session)
        session.notify(CANCELLED)

    def _run(self) -> None:
        try:
            self._answer()
        finally:
            with self._changed:
                self._stopping.set()
            self._give_up("the server stops", (*self._open, *self._transcribing, *self._waiting))

    def _answer(self) -> None:
        engine = self._model.engine()
        while not self._stopping.is_set():
            self._stepped = time.monotonic()
            self._admit(engine)
            try:
                self._step(engine)
            except Exception as error:  # whatever it is, those who listen hear of it, and the next question is answered
                self._lost += 1
                why = f"the answer was lost: {type(error).__name__}: {error}"
                self._give_up(why, (*self._open, *self._transcribing))
                engine = self._model.engine()

    def _step(self, engine: Engine) -> None:
        busy = bool(self._open)
        engine.turn()
        for session, answer in list(self._open.items()):
            self._pass_on(session, answer)
        self._transcribe()
        self._lost = 0 if busy else self._lost

    def _pass_on(self, session: Session, answer: Answer) -> None:
        """Give an answer's events; `Done` waits for the transcript, where one is wanted."""
        for event in answer.take():
            if isinstance(event, Done) and session.question.transcript and not session.cancelled:
                self._transcribing[session] = (self._model.transcribe(session.question.audio), event)
            else:
                session.notify(event)
        if answer.finished:
            del self._open[session]

    def _transcribe(self) -> None:
        """A token of each transcript."""
        for session, (steps, done) in list(self._transcribing.items()):
            text = None if session.cancelled else next(steps, None)
            if text is not None:
                session.heard = text
                continue
            del self._transcribing[session]
            session.notify(Transcript(session.heard))
            session.notify(done)

    def _admit(self, engine: Engine) -> None:
        """Begin to answer as many as may be; wait for one where there is none."""
        while (busy := self.load[0]) < self._limits.open:
            session = self._next(wait=not busy)
            if session is None:
                return
            if session.cancelled:
                session.notify(CANCELLED)
                continue
            try:
                self._begin(engine, session)
            except EchoXError as error:
                session.notify(error)
            except Exception as error:
                self._lost += 1
                session.notify(EchoXError(f"the question cannot be answered: {type(error).__name__}: {error}"))

    def _begin(self, engine: Engine, session: Session) -> None:
        """Hear a question; whoever cancels meanwhile need not wait until the next one is heard."""
        asked = session.question
        answer = self._open[session] = self._model.begin(
            engine,
            asked.audio,
            asked.history,
            vocoder=self._vocoder,
            sampling=asked.sampling,
            max_new=asked.tokens,
            cancelled=lambda: session.cancelled,
        )
        if not answer.goes_on():
            engine.drop(answer)
            self._pass_on(session, answer)

    def _next(self, *, wait: bool) -> Session | None:
        """The question that waits longest."""
        with self._changed:
            if wait and not self._waiting:
                self._changed.wait(_IDLE_S)
            return self._waiting.popleft() if self._waiting else None

    def _give_up(self, why: str, sessions: Sequence[Session]) -> None:
        if sessions:
            print(printable(f"echox serve: {why}"), file=sys.stderr)
        for session in sessions:
            session.notify(EchoXError(why, fix="ask again"))
        self._open.clear()
        self._transcribing.clear()
