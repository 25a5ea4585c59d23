"""Builds a corpus: shards in parallel, each kept once finished, the same bytes however often it is interrupted."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from echox.audio.io import SAMPLE_RATE
from echox.errors import DataError, EchoXError
from echox.stream.format.catalogue import DATASET_NAME
from shards.builder.convert import Job, convert, is_kept, keys, may_be_kept, record_path
from shards.builder.progress import Meter
from shards.builder.publish import BUILD_NAME, LEDGER_NAME, finish_publishing, is_built, publish, write_ledger
from shards.builder.records import digest, read_json
from shards.builder.workers import abandon, alone, executor, submit
from shards.corpora.archives import Archives
from shards.corpus import Audio, Corpus, MemberAudio, Request, SpanAudio, Utterance, wrong_source

Progress = Callable[[str], None]

_SHOWN = 4
"""Kinds of reasons for rejection that are said; the file of rejections has all."""
_EARLY = 1000
"""Utterances after which a share of bad ones above the budget ends the build at once."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a corpus is built.

    Attributes:
        limit: at most so many utterances; None takes all.
        per_shard: utterances a shard.
        workers: processes; 1 works in this one.
        longest_s: longest audio, seconds.
        answer_rate: samples a second of spoken answers.
        max_rejected: share of utterances that may be bad.
        replace: whether shards built differently may be replaced.
    """

    limit: int | None = None
    per_shard: int = 256
    workers: int = 1
    longest_s: float = 120.0
    answer_rate: int = SAMPLE_RATE
    max_rejected: float = 0.02
    replace: bool = False


def build_corpus(
    corpus: Corpus, source: Path, out: Path, request: Request, settings: Settings, progress: Progress | None = None
) -> dict[str, Any]:
    """Turn a corpus into a folder of shards, which appears only when it is complete.

    Args:
        corpus: the recipe.
        source: where the corpus lies.
        out: the folder of shards.
        request: task and split.
        settings: how.
        progress: called with one line now and then; None is silent.

    Returns:
        The content of `dataset.json`.

    Raises:
        DataError: the source is not the corpus, `out` holds something else, or too many utterances are bad.
        EchoXError: files cannot be read or written, or another build is at work on `out`.
    """
    say: Progress = progress or (lambda line: None)
    work = out.with_name(f".{out.name}.building")

    def utterances() -> Iterator[Utterance]:
        return itertools.islice(corpus.discover(source, request), settings.limit)

    found = utterances()
    first = next(found, None)
    if first is None:
        raise wrong_source(corpus.name, source, f"utterance for task {request.task or 'asr, sqa or tts'}")
    is_built(out)
    with alone(work):
        finish_publishing(work, out)
        described = _already_built(out, _jobs(utterances(), source, settings), settings, say) if is_built(out) else None
        if described is not None:
            return described
        meter = Meter(corpus.name, utterances, say)
        jobs = _jobs(itertools.chain([first], found), source, settings)
        records = _Run(work, settings, meter, say).run(jobs)
        described = publish(work, out, records, settings.workers)
    clipped = sum(record["clipped"] for record in records)
    say(
        f"{corpus.name}: {described['samples']:,} samples in {len(described['shards']):,} shards, "
        f"{described['hours']:.2f} h of audio, {sum(len(r['rejected']) for r in records):,} utterances rejected"
        + _reasons(records)
        + (f", {clipped:,} clipped (`clipped` in their json)" if clipped else "")
    )
    return described


def _reasons(records: list[dict[str, Any]]) -> str:
    """The commonest reasons, whatever numbers and names are in each: "no transcript" stands for all of its kind."""
    kinds = Counter(
        re.sub(r"[\d.,]*\d|'[^']*'", "…", str(rejected["reason"]))
        for record in records
        for rejected in record["rejected"]
    )
    shown = [f"{count:,} {kind}" for kind, count in kinds.most_common(_SHOWN)]
    return f" ({'; '.join(shown)}{'; ...' if len(kinds) > _SHOWN else ''})" if kinds else ""


def _already_built(out: Path, jobs: Iterator[Job], settings: Settings, say: Progress) -> dict[str, Any] | None:
    described: dict[str, Any] = read_json(out / DATASET_NAME)
    same = read_json(out / BUILD_NAME)["identity"] == digest([job.digest() for job in jobs])
    whole = all(
        (out / shard["name"]).is_file() and (out / shard["name"]).stat().st_size == shard["bytes"]
        for shard in described["shards"]
    )
    if same and whole:
        say(f"{out.name}: already built, {described['samples']:,} samples")
        return described
    if not settings.replace:
        state = "were built from other utterances or with other settings" if whole else "are incomplete"
        raise DataError(f"The shards there {state}", where=str(out), fix="Add --replace, or name another --out.")
    return None


def _jobs(utterances: Iterator[Utterance], source: Path, settings: Settings) -> Iterator[Job]:
    keyed = keys(utterances)
    for number in itertools.count():
        batch = tuple(itertools.islice(keyed, settings.per_shard))
        if not batch:
            return
        yield Job(number, source, settings.longest_s, batch, settings.answer_rate)


class _Run:
    """One run over the shards of a corpus: some are kept, the others are handed to the workers."""

    def __init__(self, work: Path, settings: Settings, meter: Meter, say: Progress) -> None:
        self._work = work
        self._settings = settings
        self._meter = meter
        self._archives = Archives(work / "scratch", say)
        self._records: dict[int, dict[str, Any]] = {}
        self._pending: dict[Future[Any], tuple[Job, str, bool]] = {}

    def run(self, jobs: Iterator[Job]) -> list[dict[str, Any]]:
        """Records of all shards, in order.

        Raises:
            DataError: too many utterances are bad, or an archive is damaged.
            EchoXError: a worker died, or files cannot be read or written.
        """
        try:
            with executor(self._settings.workers) as pool:
                try:
                    for job in jobs:
                        self._submit(pool, job, job.digest())
                        while len(self._pending) >= 2 * self._settings.workers:
                            self._collect(pool)
                    while self._pending:
                        self._collect(pool)
                except BaseException as error:
                    abandon(pool, kill=isinstance(error, KeyboardInterrupt))
                    raise
        except BrokenProcessPool as error:
            raise EchoXError(
                "A worker process died, perhaps for want of memory",
                where=str(self._work),
                fix="Run the same command again with fewer --workers: finished shards are kept.",
            ) from error
        records = [self._records[number] for number in sorted(self._records)]
        self._check_budget(final=True)
        return records

    def _submit(self, pool: Executor, job: Job, identity: str, *, again: bool = False) -> None:
        if not again and may_be_kept(self._work, job.number, identity) is not None:
            self._pending[submit(pool, is_kept, self._work, job.number)] = (job, identity, True)
            return
        located = replace(job, keyed=[(key, self._located(utterance)) for key, utterance in job.keyed])
        self._pending[submit(pool, convert, located, identity, self._work)] = (located, identity, False)

    def _located(self, utterance: Utterance) -> Utterance:
        def place(audio: Audio | None) -> Audio | None:
            return self._archives.locate(audio) if isinstance(audio, MemberAudio) else audio

        return replace(
            utterance,
            question=place(utterance.question),
            answer=place(utterance.answer),
            turn_audio=tuple(map(place, utterance.turn_audio)),
        )

    def _collect(self, pool: Executor) -> None:
        done, _ = wait(self._pending, return_when=FIRST_COMPLETED)
        for future in sorted(done, key=lambda future: self._pending[future][0].number):
            job, identity, checked = self._pending.pop(future)
            outcome = future.result()
            if checked and not outcome:
                self._submit(pool, job, identity, again=True)
                continue
            self._records[job.number] = read_json(record_path(self._work, job.number)) if checked else outcome
            self._meter.add(self._records[job.number], len(job.keyed), kept=checked)
        self._archives.keep(
            {
                audio.path
                for job, _, _ in self._pending.values()
                for _, utterance in job.keyed
                for audio in utterance.sounds
                if isinstance(audio, SpanAudio)
            }
        )
        self._check_budget(final=False)

    def _check_budget(self, *, final: bool) -> None:
        seen = self._meter.seen if final else max(self._meter.seen, _EARLY)
        if self._meter.rejected <= self._settings.max_rejected * seen:
            return
        rejected = write_ledger(self._work / LEDGER_NAME, [self._records[number] for number in sorted(self._records)])
        raise DataError(
            f"{self._meter.rejected:,} of {self._meter.seen:,} utterances are bad, more than "
            f"{self._settings.max_rejected:.1%}; the first, {rejected['id']}: {rejected['reason']}",
            where=str(self._work / LEDGER_NAME),
            fix="Repair the source, or raise --max-rejected; finished shards are kept.",
        )
