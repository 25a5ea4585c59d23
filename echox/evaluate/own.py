"""Evaluates a run on held-out shards of its own: questions to ask by voice, and sentences that the voice speaks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from echox.audio.io import read_audio
from echox.errors import DataError
from echox.evaluate.commands import evaluate_command
from echox.evaluate.demo import JUDGE, RESYNTHESIS_ITEMS, STREAMED, Evaluation, HeldOutSet, Progress, played
from echox.evaluate.judges import NamedJudge
from echox.evaluate.listening import Listener
from echox.evaluate.quality import Dnsmos
from echox.evaluate.spoken import RATED, labelled, resynthesis_wer, score_questions, score_teacher, take
from echox.evaluate.streaming import score_streaming

ABOUT = "questions that neither training nor validation has"


@dataclass(frozen=True, kw_only=True)
class OwnSets:
    """What is to be scored, and by whom.

    Attributes:
        run: run or checkpoint folder of the echo stage.
        questions: folders of shards with question.flac and an answer's text.
        sentences: folder of shards with answer.flac and answer.units of the voice.
        vocoder: vocoder folder.
        speaker: who of its speakers; None for the first.
        judge: model that listens, by folder or by name below the cache's models.
        limit: most items of each set.
        rated: questions of each set whose speech is rated by DNSMOS, where that was fetched; 0 for none.
    """

    run: Path
    questions: tuple[Path, ...]
    sentences: Path
    vocoder: Path
    speaker: str | None = None
    judge: str = JUDGE
    limit: int | None = None
    rated: int = RATED

    @property
    def command(self) -> str:
        """The command that makes the same numbers."""
        options = {
            "--questions": ",".join(map(str, self.questions)),
            "--sentences": self.sentences,
            "--vocoder": self.vocoder,
            "--speaker": self.speaker,
            "--judge": self.judge,
            "--limit": self.limit,
            "--rated": self.rated if self.rated != RATED else None,
        }
        return evaluate_command(str(self.run), options)


def evaluate_own(sets: OwnSets, progress: Progress | None = None) -> Evaluation:
    """Score an echo run on held-out shards, with the ceilings that its voice sets.

    Args:
        sets: what is to be scored.
        progress: called with phase, items done and items in all.

    Raises:
        DataError: two sets have one name, the vocoder is of other units, or a set is no folder of shards.
        MissingModelError: judge or vocoder is not there.
        CheckpointError: the run has no good checkpoint.
    """
    from echox.speak.pipeline import SpeechToSpeech
    from echox.speak.vocoder import check_vocoder, load_vocoder
    from echox.units.identity import UnitPart, read_unit_set

    judge = NamedJudge.find(sets.judge)
    named = {HeldOutSet(folder.name, "test", ABOUT): folder for folder in sets.questions}
    if len(named) < len(sets.questions):
        raise DataError("two sets of questions have one name", where=str(sets.questions[0]), fix="rename a folder")
    asked = {each: take(folder, sets.limit) for each, folder in named.items()}
    heldout = take(sets.sentences, min(sets.limit or RESYNTHESIS_ITEMS, RESYNTHESIS_ITEMS))
    voice, rater = load_vocoder(sets.vocoder, sets.speaker), Dnsmos.find() if sets.rated else None
    model = SpeechToSpeech.load(sets.run)
    language = model.recipe.language
    listener = Listener(voice, judge.open(language))
    check_vocoder(sets.vocoder, [model.units, UnitPart(str(sets.sentences), read_unit_set(sets.sentences))])

    def watch_phases(name: str) -> Callable[[str, int, int], None] | None:
        return (lambda phase, done, total: progress(f"{name} {phase}", done, total)) if progress else None

    scores = {
        each: score_questions(model, samples, listener, rater=rater, rated=sets.rated, progress=watch_phases(each.name))
        for each, samples in asked.items()
    }
    again, original = resynthesis_wer(
        heldout, listener, language=language, progress=labelled(sets.sentences.name, progress)
    )
    teacher = score_teacher(model, [sample.meta["answer_text"] for sample in heldout], listener)
    clips = [read_audio(sample["question.flac"]) for sample in next(iter(asked.values()))[:STREAMED]]
    return Evaluation(
        sets=scores,
        resynthesis_wer=again,
        original_wer=original,
        teacher=teacher,
        spoken=[row for each, score in scores.items() for row in played(each.name, score.items, listener)],
        streaming=score_streaming(model, listener.vocoder, clips),
        command=sets.command,
        judge=sets.judge,
        corpus="",
        language=language,
    )
