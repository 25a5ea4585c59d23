"""Answers the questions of all sessions in one thread, a bounded number of them at a time."""

from __future__ import annotations

import queue
import sys
import threading
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
        cancelled: set it, and its answer ends before the next step, or does not begin.
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
        self._waiting: queue.Queue[Session] = queue.Queue(limits.waiting)
        self._open: dict[Session, Answer] = {}
        self._transcribing: dict[Session, tuple[Iterator[str], Done]] = {}
        self._stopping = threading.Event()
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
        return len(self._open) + len(self._transcribing), self._waiting.qsize()

    def ask(self, question: Question, notify: Callable[[Event | EchoXError], None]) -> Session:
        """Take a question.

        Args:
            question: what is asked.
            notify: called in the thread of the worker with each event up to `Done`, or with an error, the last one.

        Raises:
            BusyError: too many wait.
        """
        session = Session(question, notify)
        try:
            self._waiting.put_nowait(session)
        except queue.Full:
            raise BusyError(
                f"{self._limits.waiting} questions are waiting already", fix="ask again in some seconds"
            ) from None
        return session

    def _run(self) -> None:
        engine = self._model.engine()
        while not self._stopping.is_set():
            self._admit(engine)
            for session, answer in self._open.items():
                answer.cancelled = session.cancelled
            try:
                engine.turn()
                self._transcribe()
            except Exception as error:  # whatever it is, those who listen hear of it, and the next question is answered
                self._give_up(f"the answer was lost: {type(error).__name__}: {error}")
                engine = self._model.engine()
            for session, answer in list(self._open.items()):
                self._pass_on(session, answer)
        self._give_up("the server stops")

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
            try:
                session = self._waiting.get(block=not busy, timeout=_IDLE_S)
            except queue.Empty:
                return
            if session.cancelled:
                continue
            asked = session.question
            try:
                self._open[session] = self._model.begin(
                    engine,
                    asked.audio,
                    asked.history,
                    vocoder=self._vocoder,
                    sampling=asked.sampling,
                    max_new=asked.tokens,
                )
            except EchoXError as error:
                session.notify(error)
            except Exception as error:
                session.notify(EchoXError(f"the question cannot be answered: {type(error).__name__}: {error}"))

    def _give_up(self, why: str) -> None:
        if self._open or self._transcribing:
            print(printable(f"echox serve: {why}"), file=sys.stderr)
        for session in (*self._open, *self._transcribing):
            session.notify(EchoXError(why, fix="ask again"))
        self._open.clear()
        self._transcribing.clear()
