"""Answers the questions of a benchmark in batches, lets the judge listen, and keeps what came of each question."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echox.audio.io import SAMPLE_RATE
from echox.evaluate.benchmarks.records import Answered, Part, read_answers, writing
from echox.evaluate.benchmarks.survey import Benchmark, batch_numbers
from echox.evaluate.listening import Listener
from echox.evaluate.quality import PARTS, Dnsmos, spread_over

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from echox.evaluate.benchmarks.decoding import Decoding
    from echox.evaluate.benchmarks.questions import Question
    from echox.speak.pipeline import SpeechToSpeech

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Speaking:
    """What answers and what listens.

    Attributes:
        model: an echo run.
        listener: vocoder and judge.
        rater: rates how it sounds; None leaves that out.
    """

    model: SpeechToSpeech
    listener: Listener
    rater: Dnsmos | None = None

    def answers(self, questions: Sequence[Question], decoding: Decoding, rated: Collection[int] = ()) -> list[Answered]:
        """What becomes of some questions, which are answered, spoken and heard together, and with no others.

        So the same questions give the same answers, whatever was answered before. Those whose numbers are in `rated`
        are also rated for their sound.
        """
        self.model.max_new = decoding.max_new
        sampling = decoding.of([question.number for question in questions])
        clips = [question.audio() for question in questions]
        said = self.model.answer(clips, cascade=True, sampling=sampling)
        waves = self.listener.speak([answer.units for answer in said])
        taught = self.listener.speak([answer.cascade for answer in said if answer.cascade is not None])
        heard = self.listener.judge.transcribe([*waves, *taught])
        return [
            Answered(
                number=question.number,
                text=answer.text,
                heard=own,
                cascade_heard=cascade,
                units=answer.units.tolist(),
                seconds=round(len(wave) / SAMPLE_RATE, 3),
                failed=len(answer.failed),
                quality=self._quality(wave) if question.number in rated else None,
            )
            for question, answer, wave, own, cascade in zip(
                questions, said, waves, heard[: len(said)], heard[len(said) :], strict=True
            )
        ]

    def _quality(self, wave: NDArray[np.float32]) -> list[float] | None:
        found = self.rater.rate([wave])[0] if self.rater else None
        return None if found is None else [round(getattr(found, part), 4) for part in PARTS]

    def wave(self, units: NDArray[np.uint16]) -> NDArray[np.float32]:
        """What is said, 16 kHz mono."""
        return self.listener.speak([units])[0]


def answer_benchmark(
    benchmark: Benchmark,
    decoding: Decoding,
    identity: Mapping[str, Any],
    folder: Path,
    speaking: Callable[[], Speaking],
    *,
    batch: int,
    part: Part,
    rated: int = 0,
    progress: Progress | None = None,
) -> dict[int, Answered]:
    """Answer what has no answer yet; the answers of all processes, by the number of their question.

    A batch that a killed process has half written is answered again, and the rows that are missing are added.

    Args:
        benchmark: the questions.
        decoding: how to answer.
        identity: of the answers.
        folder: of the benchmark's answers.
        speaking: loads the models; called only where something is to be answered.
        batch: questions answered together.
        part: this process, which takes the batches whose place, divided by the number of processes, leaves its index.
        rated: answers that are rated for their sound, at even distances.
        progress: called with the questions of this process that are done, and all of them.

    Raises:
        DataError: the folder holds answers of another identity, or another process is at this part.
    """
    done = read_answers(folder, decoding.stem, identity)
    batches = batch_numbers(len(benchmark.items), batch)
    own = {place for place in range(len(batches)) if place % part.count == part.index}
    open_ = {place for place in own if any(number not in done for number in batches[place])}
    if not open_:
        return done
    chosen = frozenset(spread_over(len(benchmark.items), rated))
    total = sum(len(batches[place]) for place in own)
    models = speaking()  # before there is a file: models that do not fit each other leave none of their identity
    with writing(folder, part.file(decoding.stem), identity) as writer:
        done = read_answers(folder, decoding.stem, identity)  # what was read before may have been added to
        for place, questions in enumerate(benchmark.batches(batch)):
            if place not in open_:
                continue
            for row in models.answers(questions, decoding, chosen):
                if row.number not in done:
                    writer.add(row)
                    done[row.number] = row
            if progress:
                progress(sum(number in done for each in own for number in batches[each]), total)
    return done
