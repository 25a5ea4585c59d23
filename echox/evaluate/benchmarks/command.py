"""Scores a run on benchmarks: survey, answers that go on where they were, scores, page."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from echox.engine.checkpoint.checkpointer import find_weights
from echox.engine.checkpoint.recorded import recipe_of
from echox.errors import DataError
from echox.evaluate.benchmarks.catalogue import BENCHMARKS, PROTOCOL, PUBLISHED, PUBLISHED_JUDGE
from echox.evaluate.benchmarks.decoding import Decoding, decodings
from echox.evaluate.benchmarks.identity import answers_identity, setting_identity
from echox.evaluate.benchmarks.page import PLAYED, Sounds, write_benchmark_page
from echox.evaluate.benchmarks.records import Answered, Part
from echox.evaluate.benchmarks.runner import Speaking, answer_benchmark
from echox.evaluate.benchmarks.scoring import Judged, judged, pooled, repeated, score
from echox.evaluate.benchmarks.survey import Benchmark, survey
from echox.evaluate.commands import evaluate_command
from echox.evaluate.demo import JUDGE
from echox.evaluate.judges import NamedJudge
from echox.evaluate.listening import Listener, Speaker, speak
from echox.evaluate.quality import Dnsmos
from echox.evaluate.spoken import labelled
from echox.files import write_atomically
from echox.speak.pipeline import STREAMED_TOKENS

FOLDER, RESULTS, PAGE = "benchmarks", "results.json", "benchmark.html"
BATCH = 16
REPEATS = 3
RATED = 50

Progress = Callable[[str, int, int], None]
"""Called with a phase, questions done and questions in all."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be scored.

    Attributes:
        trained: the run as it was named, for the command beside each row.
        run: run or checkpoint folder of the echo stage.
        names: of benchmarks.
        places: folder or file of those that do not lie at their default place.
        out: folder of results; those of benchmarks go to `benchmarks/` in it.
        vocoder: vocoder folder.
        speaker: name or number of who speaks, in a vocoder of several; None for the first.
        judge: model that listens.
        sampling: `release` for sampled runs beside the greedy one; None for none.
        repeats: sampled runs.
        limit: most questions of each benchmark, the first ones; None for all.
        max_new: most text tokens of an answer.
        batch: questions answered together.
        rated: answers of each benchmark and decoding whose sound DNSMOS rates, where that was fetched.
        part: which of several processes this one is.
    """

    trained: str
    run: Path
    names: tuple[str, ...]
    places: Mapping[str, Path] = field(default_factory=dict)
    out: Path | None = None
    vocoder: Path | None = None
    speaker: str | None = None
    judge: str = JUDGE
    sampling: str | None = None
    repeats: int = REPEATS
    limit: int | None = None
    max_new: int = STREAMED_TOKENS
    batch: int = BATCH
    rated: int = RATED
    part: Part = Part()

    @property
    def folder(self) -> Path:
        """Where results of benchmarks go."""
        return (self.out or self.run.parent / "evaluation") / FOLDER

    def command(self, name: str, decoding: Decoding) -> str:
        """The command that makes one row."""
        usual = Request(trained="", run=self.run, names=())
        options = {
            "--benchmark": name,
            "--data": f"{name}={self.places[name]}" if name in self.places else None,
            "--judge": self.judge,
            "--vocoder": self.vocoder,
            "--speaker": self.speaker,
            "--sampling": self.sampling if decoding.temperature else None,
            "--repeats": self.repeats if decoding.temperature and self.repeats != usual.repeats else None,
            "--limit": self.limit,
            "--max-new": self.max_new if self.max_new != usual.max_new else None,
            "--batch": self.batch if self.batch != usual.batch else None,
            "--rated": self.rated if self.rated != usual.rated else None,
            "--out": self.out,
        }
        return evaluate_command(self.trained, options)


def parse_names(given: str, places: Iterable[str]) -> tuple[tuple[str, ...], dict[str, Path]]:
    """Benchmark names and places as a command line gives them: `a,b`, and `a=PATH` each.

    Raises:
        DataError: a name is unknown and has no place, is given twice, or is none.
    """
    found: dict[str, Path] = {}
    for each in places:
        name, sign, path = each.partition("=")
        if not (name and sign and path):
            raise DataError(f"--data {each} names no place", fix="give it as NAME=PATH")
        found[name] = Path(path).expanduser()
    names = tuple(name.strip() for name in given.split(","))
    known = ", ".join(BENCHMARKS)
    for name in names:
        if not name or not all(letter.isalnum() or letter in "-_" for letter in name) or len(name) > 64:
            raise DataError(f"{name[:80]!r} is no name of a benchmark", fix="use letters, digits, - and _")
        if name not in BENCHMARKS and name not in found:
            raise DataError(f"{name} is no known benchmark ({known})", fix=f"give its place by --data {name}=PATH")
    unused = [name for name in found if name not in names]
    if unused or len(set(names)) < len(names):
        fix = "name each benchmark once in --benchmark"
        raise DataError(f"--benchmark {given} does not name what --data does, or one twice", fix=fix)
    return names, found


def evaluate_benchmarks(request: Request, progress: Progress | None = None) -> dict[str, Any] | None:
    """Answer, judge, score, and write `benchmarks/results.json` and `benchmarks/benchmark.html`.

    Returns:
        The results; None where other processes have questions left, whose answers are needed for any score.

    Raises:
        DataError: see `survey`, `read_answers` and `writing`; or the vocoder is of other units than the run, or has no
            such speaker.
        CheckpointError, MissingModelError: run, vocoder or judge is not there.
    """
    from echox.speak.vocoder import default_vocoder, load_vocoder

    judge = NamedJudge.find(request.judge)
    vocoder = request.vocoder or default_vocoder()
    rater = Dnsmos.find() if request.rated else None
    quality = {**rater.identity(), "most": request.rated} if rater else None
    setting = setting_identity(request.run, judge, vocoder, request.batch, quality, request.speaker)
    benchmarks = [survey(name, request.places.get(name), request.limit) for name in request.names]
    root = request.folder

    @cache
    def speaking() -> Speaking:
        return _load(request, vocoder, judge, rater)

    ways = decodings(request.sampling, request.repeats, request.max_new)
    found: dict[str, list[tuple[Decoding, dict[int, Answered]]]] = {}
    for benchmark in benchmarks:
        for decoding in ways:
            answers = answer_benchmark(
                benchmark,
                decoding,
                answers_identity(setting, benchmark, decoding),
                root / benchmark.name,
                speaking,
                batch=request.batch,
                rated=request.rated,
                part=request.part,
                progress=labelled(f"{benchmark.name} {decoding.stem}", progress),
            )
            found.setdefault(benchmark.name, []).append((decoding, answers))
    if any(len(answers) < len(each.items) for each in benchmarks for _, answers in found[each.name]):
        return None
    language = recipe_of(find_weights(request.run).parent).language
    items = {each.name: [judged(each, answers, language) for _, answers in found[each.name]] for each in benchmarks}
    results = _results(request, benchmarks, ways, items, language)
    greedy = {name: rows[0] for name, rows in items.items()}
    speaker = load_vocoder(vocoder, request.speaker)
    sounds = {each.name: _sounds(each, greedy[each.name], speaker) for each in benchmarks}
    write_benchmark_page(root / PAGE, results, greedy, sounds)
    write_atomically(root / RESULTS, json.dumps(results, indent=1) + "\n")
    return results


def _results(
    request: Request,
    benchmarks: list[Benchmark],
    ways: list[Decoding],
    items: Mapping[str, list[list[Judged]]],
    language: str,
) -> dict[str, Any]:
    shown: dict[str, Any] = {}
    for benchmark in benchmarks:
        name = benchmark.name
        scores = [score(rows, language) for rows in items[name]]
        runs = [
            {**_decoding(decoding), "command": request.command(name, decoding), **each.row()}
            for decoding, each in zip(ways, scores, strict=True)
        ]
        shown[name] = {
            "title": BENCHMARKS[name].title if name in BENCHMARKS else name,
            "questions_sha256": benchmark.sha256,
            "runs": runs,
            "repeated": repeated(scores[1:]) if scores[1:] else {},
            "published": [
                {"system": each.system, "s2s": each.scores[name], "source": each.source, "judge": PUBLISHED_JUDGE}
                for each in PUBLISHED
                if name in each.scores
            ],
        }
    return {
        "run": request.run.name,
        "judge": request.judge,
        "language": language,
        "protocol": PROTOCOL,
        "benchmarks": shown,
        "pooled": pooled([rows[0] for rows in items.values()]),
    }


def _decoding(decoding: Decoding) -> dict[str, Any]:
    known = asdict(decoding)
    return {"decoding": known.pop("name"), **known}


def _load(request: Request, vocoder: Path, judge: NamedJudge, rater: Dnsmos | None) -> Speaking:
    from echox.speak.pipeline import SpeechToSpeech
    from echox.speak.vocoder import check_vocoder, load_vocoder

    model = SpeechToSpeech.load(request.run)
    check_vocoder(vocoder, [model.units])
    return Speaking(model, Listener(load_vocoder(vocoder, request.speaker), judge.open(None)), rater)


def _sounds(benchmark: Benchmark, rows: list[Judged], speaker: Speaker) -> list[Sounds]:
    """Of the first questions, with what was said, spoken again."""
    found: list[Sounds] = []
    for questions in benchmark.batches(1):
        if len(found) == PLAYED:
            break
        units = np.array(rows[len(found)].answer.units, dtype=np.uint16)
        found.append(Sounds(questions[0].audio(), speak(speaker, [units])[0] if len(units) else None))
    return found
