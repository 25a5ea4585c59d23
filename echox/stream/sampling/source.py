"""Describes one dataset of a run: where its samples are, what they are used for, and how long they are."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from echox.stream.format.scan import TASKS
from echox.stream.sampling.keyed_rng import key64

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from echox.stream.format.catalogue import Catalogue

SPEECH_VECTORS_PER_S = 25.0
"""Positions a second of question takes in the LLM, before the shrink adapter."""
CHARACTERS_PER_TOKEN = 4.0
SERVE = {"asr": ("asr", "sqa"), "sqa": ("sqa",), "tts": ("tts", "sqa")}
"""Own tasks of the samples that a task can use."""
SHORTEST_S = 0.1
"""What a sample counts at least, so that one without a length does not come for free."""


@dataclass(frozen=True)
class Source:
    """A dataset, as the recipe names it.

    Of its samples, those serve that have the members which the task needs, and no task of their own that it cannot use:
    a spoken question can be transcribed and its answer be spoken, but a transcript is no answer.

    Attributes:
        path: the recipe's name of it.
        task: "sqa", "asr" or "tts".
        catalogue: its samples.
        repeat: passes in one epoch, for sources that are read as one union.
        weight: share of the stream, for sources that are blended; None in a union.
        members: what a sample must have.
    """

    path: str
    task: str
    catalogue: Catalogue
    repeat: int = 1
    weight: float | None = None
    members: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        """What its metrics are called."""
        return f"{self.path.strip('/').replace('/', '-')}-{self.task}"

    @cached_property
    def key(self) -> int:
        """64-bit identity of the samples; another folder with the same shards has the same."""
        return key64(self.catalogue.fingerprint, self.task)

    @cached_property
    def serving(self) -> NDArray[np.int64] | None:
        """Numbers of the samples that serve, in order; None where all do."""
        served = np.ones(self.catalogue.samples, dtype=bool)
        own = self.catalogue.tasks
        if own is not None:
            served &= np.isin(own, [0, *(TASKS.index(task) for task in SERVE[self.task])])
        whole = [self.members <= set(layout) for layout in self.catalogue.layouts]
        if not all(whole):
            served &= np.array(whole)[self.catalogue.records["layout"]]
        return None if served.all() else np.flatnonzero(served)

    @property
    def samples(self) -> int:
        """How many serve."""
        return self.catalogue.samples if self.serving is None else len(self.serving)

    @cached_property
    def shard_starts(self) -> NDArray[np.int64]:
        """Samples that serve before each shard, then all of them; [S + 1]."""
        starts = np.asarray(self.catalogue.shard_starts, dtype=np.int64)
        return starts if self.serving is None else np.searchsorted(self.serving, starts).astype(np.int64)

    def numbers(self, places: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
        """Numbers in the catalogue of samples that serve, by their places among these; of all without `places`."""
        places = np.arange(self.samples) if places is None else places
        return places if self.serving is None else self.serving[places]

    def serves(self, number: int) -> bool:
        """Whether a sample of the catalogue is among them."""
        if self.serving is None:
            return True
        place = int(np.searchsorted(self.serving, number))
        return place < len(self.serving) and int(self.serving[place]) == number

    def seconds(self, numbers: NDArray[np.int64] | slice) -> NDArray[np.float64]:
        """Seconds of the audio that the stage hears or says, of each sample."""
        column = "answer_s" if self.task == "tts" else "question_s"
        return np.maximum(self.catalogue.records[column][numbers].astype(np.float64), SHORTEST_S)

    def tokens(self, numbers: NDArray[np.int64] | slice) -> NDArray[np.float64]:
        """Positions a sample takes in the model that the stage trains, estimated from its lengths.

        Speech vectors and response text for a spoken question, units and text for a sentence to say.
        """
        records = self.catalogue.records
        text = records["answer_chars"][numbers].astype(np.float64) / CHARACTERS_PER_TOKEN
        if self.task == "tts":
            return np.maximum(records["units"][numbers].astype(np.float64) + text, 1.0)
        return self.seconds(numbers) * SPEECH_VECTORS_PER_S + text
