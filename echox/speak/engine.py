"""Answers any number of questions at a time in one thread: a token each, some words of all open segments, and again.

What an answer says does not depend on the others: each writes with a cache of its own, and segments that decode
together decode as if alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from echox.models.echo import segment_rows
from echox.models.ragged import lengths_to_mask
from echox.speak.answers import Answer, Segment
from echox.speak.segments import SegmentSpeech

if TYPE_CHECKING:
    from echox.models.s2t import Choose
    from echox.models.text_decode import TextDecode
    from echox.stages.echo import EchoStage
    from echox.units.language import UnitLanguage

WORDS_A_TURN = 16
"""Words of each open segment a text token: some times what a token has, so that speech catches up with the text."""


@dataclass(eq=False)
class _Open:
    """An answer in progress, what writes it, and its segments that are being spoken."""

    answer: Answer
    decode: TextDecode | None
    choose: Choose
    most: int
    speaking: dict[int, Segment] = field(default_factory=dict)


class Engine:
    """Steps all answers in progress.

    Args:
        stage: a trained Stage III, in eval mode.
        language: of its units.
        end_token: id that ends a text.
    """

    def __init__(self, stage: EchoStage, language: UnitLanguage, end_token: int) -> None:
        self._stage, self._end_token = stage, end_token
        self._at_tokens = stage.config.state == "own"
        self._answers: list[_Open] = []
        self._speech: SegmentSpeech[tuple[int, int]] = SegmentSpeech(stage, stage.echo, language)

    def __len__(self) -> int:
        """How many answers are in progress."""
        return len(self._answers)

    def begin(self, answer: Answer, decode: TextDecode, choose: Choose, most: int) -> None:
        """Take in an answer.

        Args:
            answer: is told what happens.
            decode: of one row, its question.
            choose: picks its tokens.
            most: tokens it may have.
        """
        self._answers.append(_Open(answer, decode, choose, most))

    def drop(self, answer: Answer) -> None:
        """Forget an answer and all that was kept for it."""
        for each in [each for each in self._answers if each.answer is answer]:
            self._speech.close({(id(each), number) for number in each.speaking})
            self._answers.remove(each)

    @torch.no_grad()
    def turn(self) -> None:
        """A token of each answer that still writes, then words of all open segments."""
        for each in list(self._answers):
            if not each.answer.goes_on():
                self.drop(each.answer)
        cut: list[tuple[_Open, Segment]] = []
        for each in self._answers:
            if each.decode is not None:
                cut += [(each, segment) for segment in self._write(each, each.decode)]
        self._open(cut)
        by_key = {(id(each), number): (each, segment) for each in self._answers
                  for number, segment in each.speaking.items()}  # fmt: skip
        for key, units, over, failure in self._speech.run(WORDS_A_TURN):
            each, segment = by_key[key]
            each.answer.say(segment, units, over, failure)
            if over:
                del each.speaking[segment.number]
        for each in list(self._answers):
            each.answer.finish()
            if each.answer.finished:
                self.drop(each.answer)

    def _write(self, each: _Open, decode: TextDecode) -> list[Segment]:
        """Write one token; the segments that are known to have ended with it."""
        found: list[Segment | None] = []
        token_1, state_1h = decode.write(each.choose)
        token = int(token_1)  # host sync
        if self._at_tokens and decode.places > 1:  # the state that predicts this token is that at the one before
            found.append(self._know_state(each, state_1h))
        if token != self._end_token:
            each.answer.write(token)
            if not self._at_tokens:
                found.append(self._know_state(each, state_1h))
        full = decode.places == each.most
        if token == self._end_token or full:
            if self._at_tokens and token != self._end_token:
                found.append(self._know_state(each, decode.state()))
            found.append(each.answer.end_text("end" if token == self._end_token else "limit"))
            each.decode = None
        return [segment for segment in found if segment is not None]

    def _know_state(self, each: _Open, state_1h: Tensor) -> Segment | None:
        score = float(self._stage.scores(state_1h))  # host sync
        return each.answer.know_state(state_1h[0], score)

    def _open(self, cut: list[tuple[_Open, Segment]]) -> None:
        """Let the Echo decoder read new segments, all at once."""
        if not cut:
            return
        stage = self._stage
        hidden_NTh = pad_sequence([segment.hidden_Th for _, segment in cut], batch_first=True)
        tokens_NT = pad_sequence([segment.tokens_T for _, segment in cut], batch_first=True).to(hidden_NTh.device)
        lengths_N = torch.tensor([len(segment.tokens_T) for _, segment in cut], device=hidden_NTh.device)
        rows = segment_rows(torch.zeros_like(tokens_NT), lengths_to_mask(lengths_N, tokens_NT.shape[1]))
        keys = [(id(each), segment.number) for each, segment in cut]
        self._speech.open(keys, stage.adapt(hidden_NTh), tokens_NT, rows)
        for each, segment in cut:
            each.speaking[segment.number] = segment
