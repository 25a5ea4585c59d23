"""Describes one dataset of a run: where its samples are, what they are used for, and how long they are."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from echox.stream.sampling.keyed_rng import key64

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from echox.stream.format.catalogue import Catalogue

SPEECH_VECTORS_PER_S = 25.0
"""Positions a second of question takes in the LLM, before the shrink adapter."""
CHARACTERS_PER_TOKEN = 4.0
SHORTEST_S = 0.1
"""What a sample counts at least, so that one without a length does not come for free."""


@dataclass(frozen=True)
class Source:
    """A dataset, as the recipe names it.

    Attributes:
        path: the recipe's name of it.
        task: "sqa", "asr" or "tts".
        catalogue: its samples.
        repeat: passes in one epoch, for sources that are read as one union.
        weight: share of the stream, for sources that are blended; None in a union.
    """

    path: str
    task: str
    catalogue: Catalogue
    repeat: int = 1
    weight: float | None = None

    @property
    def name(self) -> str:
        """What its metrics are called."""
        return f"{self.path.strip('/').replace('/', '-')}-{self.task}"

    @cached_property
    def key(self) -> int:
        """64-bit identity of the samples; another folder with the same shards has the same."""
        return key64(self.catalogue.fingerprint, self.task)

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
