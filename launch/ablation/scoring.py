"""Scores a run on the held-out questions of a scale's corpus, and keeps what became of every item."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echox.config.paths import cache_dir, resolve_model
from echox.engine.checkpoint.manifest import newest_manifest
from echox.errors import DataError
from echox.evaluate.demo import JUDGE, QUESTION_SETS
from echox.evaluate.scores import SpokenItem
from echox.evaluate.spoken import score_questions, take
from echox.files import write_atomically
from echox.stream.format.catalogue import DATASET_NAME

if TYPE_CHECKING:
    from echox.evaluate.listening import Listener

SCORES = Path("evaluation") / "scores.json"
"""In the folder of a run."""

Progress = Callable[[str, int, int], None]
Scores = dict[str, dict[str, Any]]
"""Held-out set to its row, with `role`, `about` and `items`."""


class Examiner:
    """Scores runs one after the other with the same vocoder and judge, which hears equal speech once.

    Args:
        scale: its corpus is the folder of this name below `$ECHOX_CACHE/data`.
        limit: items of a set at most; None is all.
        progress: called with what is done, parts done and parts in all.

    Raises:
        DataError: the corpus has no held-out questions, or no vocoder.
    """

    def __init__(self, scale: str, limit: int | None, progress: Progress) -> None:
        self.corpus = cache_dir() / "data" / scale
        self.vocoder = self.corpus / "vocoder"
        self.limit = limit
        self._progress = progress
        self.sets = [each for each in QUESTION_SETS if (self.corpus / each.name / DATASET_NAME).is_file()]
        for absent, found in (("held-out questions", self.sets), ("vocoder", self.vocoder.is_dir())):
            if not found:
                raise DataError(
                    f"the corpus of scale {scale} has no {absent}",
                    where=str(self.corpus),
                    fix="build it first; `make demo` builds the demo's",
                )

    def scores(self, run: Path) -> Scores:
        """Scores of a finished run, from its folder where they are newer than all that they judge."""
        file = run / SCORES
        known = self._known(run, file)
        if known is None:
            known = self._score(run)
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, json.dumps({"limit": self.limit, "sets": known}, indent=1) + "\n")
        return known

    def _known(self, run: Path, file: Path) -> Scores | None:
        manifest = newest_manifest(run)
        if manifest is None or not file.is_file():
            return None
        listings = (self.corpus / each.name / DATASET_NAME for each in self.sets)
        judged = (manifest, *listings, *(path for path in self.vocoder.rglob("*") if path.is_file()))
        if max(path.stat().st_mtime for path in judged) > file.stat().st_mtime:
            return None
        saved = json.loads(file.read_text(encoding="utf-8"))
        whole = saved["limit"] == self.limit and list(saved["sets"]) == [each.name for each in self.sets]
        return dict(saved["sets"]) if whole else None

    def _score(self, run: Path) -> Scores:
        from echox.speak.pipeline import SpeechToSpeech
        from echox.speak.vocoder import check_vocoder

        model = SpeechToSpeech.load(run)
        check_vocoder(self.vocoder, [model.units])
        found: Scores = {}
        for each in self.sets:
            watch = partial(self._watch, f"{run.name} {each.name}")
            samples = take(self.corpus / each.name, self.limit)
            score = score_questions(model, samples, self._listener, progress=watch)
            items = sorted((outcome(item) for item in score.items), key=lambda item: str(item["id"]))
            found[each.name] = {**score.row(), "role": each.role, "about": each.about, "items": items}
        return found

    def _watch(self, what: str, phase: str, done: int, total: int) -> None:
        self._progress(f"{what} {phase}", done, total)

    @cached_property
    def _listener(self) -> Listener:
        from echox.evaluate.asr import Judge
        from echox.evaluate.listening import Listener
        from echox.speak.vocoder import load_vocoder

        return Listener(load_vocoder(self.vocoder), Judge.load(resolve_model(JUDGE)))


def outcome(item: SpokenItem) -> dict[str, Any]:
    """What is kept of one item: texts, and whether each was strictly right."""
    return {
        "id": item.id,
        "text": item.text,
        "heard": item.heard,
        "cascade_heard": item.cascade_heard,
        "text_right_strict": item.text_strict,
        "speech_right_strict": item.speech_strict,
        "cascade_right_strict": item.cascade_strict,
    }
