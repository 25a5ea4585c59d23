"""`echox evaluate` and `echox report`: score a run on held-out sets or benchmarks, and write the page that shows it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from echox.evaluate.demo import Evaluation

from echox.arguments import from_zero, positive
from echox.speak.voice_options import add_voice_options


def add_parser(subparsers: Any) -> None:
    """Register both commands."""
    parser = subparsers.add_parser(
        "evaluate",
        help="score a run on the demo's held-out sets, on your own, or on benchmarks",
        description="Ask held-out questions by voice, let the run answer aloud, let an independent ASR model judge. "
        "With --questions, those of shards of your own; with --benchmark, by the protocol of UltraEval-Audio; with "
        "--sentences alone, a t2c run reads them. The language is that of the run's recipe.",
        epilog="examples: echox evaluate runs/demo/demo-echo --limit 10; echox evaluate runs/mine-echo --questions "
        "data/questions-test --sentences data/voice-test --vocoder runs/vocoder/vocoder; echox evaluate "
        "runs/demo/demo-echo --benchmark llama-questions --data llama-questions=questions/; echox evaluate runs/t2c "
        "--sentences data/voice",
    )
    parser.add_argument(
        "trained",
        metavar="RUN",
        help="run, URL of a run, or checkpoint folder of the echo stage; with --sentences alone of the t2c stage",
    )
    parser.add_argument(
        "--questions",
        metavar="FOLDER[,FOLDER]",
        help="ask these held-out questions: folders of shards with question.flac and the text of an answer",
    )
    parser.add_argument(
        "--sentences",
        metavar="DATASET",
        help="held-out sentences of the voice: folder of shards with answer.flac and answer.units, or name; alone, a "
        "t2c run reads them",
    )
    parser.add_argument("--limit", type=int, help="most items of each set")
    add_voice_options(parser)
    parser.add_argument("--corpus", default="demo", help="folder of the sets below $ECHOX_CACHE/data; default: demo")
    parser.add_argument(
        "--out", type=Path, help="folder for scores and samples; default: evaluation/ in the run's parent"
    )
    parser.add_argument(
        "--rated",
        metavar="N",
        type=from_zero,
        help="answers of a set whose sound DNSMOS rates, at even distances; 0 for none; default: 12, 50 of a benchmark",
    )
    parser.add_argument("--judge", metavar="MODEL", help="Whisper that listens; default: the demo's, a small one")
    parser.add_argument("--json", action="store_true", help="print the scores as JSON")
    _add_benchmark_options(parser)
    parser.set_defaults(run=evaluate)
    page = subparsers.add_parser(
        "report",
        help="write report.html and MODEL_CARD.md from an evaluation",
        description="Scores, players and the stages' curves in one HTML file that needs nothing beside it, and a model "
        "card in Hugging Face's format.",
        epilog="examples: echox report runs/demo; echox report runs/demo --track",
    )
    page.add_argument("storage", type=Path, help="folder of runs with evaluation/ in it")
    page.add_argument("--out", type=Path, help="HTML file; default: report.html in the folder. The card is beside it")
    page.add_argument("--track", action="store_true", help="add scores, report and card to the echo run in MLflow")
    page.set_defaults(run=report)


def _add_benchmark_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "benchmarks",
        "Answers are kept one by one; the same command, given again, goes on where it was. --limit takes the first.",
    )
    group.add_argument(
        "--benchmark", metavar="NAME[,NAME]", help="llama-questions, web-questions, trivia-qa, or any name with --data"
    )
    group.add_argument(
        "--data",
        metavar="NAME=PATH",
        action="append",
        help="folder or file of a benchmark; default: its name below $ECHOX_CACHE/data",
    )
    group.add_argument(
        "--sampling", choices=["release"], help="sample too, as the released code does: T=0.2, top-p 0.9"
    )
    group.add_argument("--repeats", type=positive, help="sampled runs, each with a seed of its own; default: 3")
    group.add_argument("--max-new", type=positive, help="most text tokens of an answer; default: 512")
    group.add_argument("--batch", type=positive, help="questions answered together; default: 16")
    group.add_argument(
        "--shard",
        metavar="I/N",
        type=_shard,
        help="answer every Nth batch only, from the Ith on, I from 0; the last call to answer prints the scores",
    )
    group.add_argument("--track", action="store_true", default=None, help="add the scores to the run in MLflow")


_OF_BENCHMARKS = ("data", "judge", "sampling", "repeats", "max_new", "batch", "shard", "track")


def _shard(text: str) -> tuple[int, int]:
    index, sign, count = text.partition("/")
    if not (sign and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"{text} is not I/N with I from 0 and below N")
    return int(index), int(count)


def evaluate(args: argparse.Namespace) -> int:
    """Score, save, print."""
    from echox.errors import DataError

    if sum(each is not None for each in (args.benchmark, args.questions or args.sentences)) > 1:
        raise DataError("--benchmark is an evaluation of its own", fix="leave out --questions and --sentences, or it")
    own = args.questions is not None or args.sentences is not None
    given = [name for name in _OF_BENCHMARKS if getattr(args, name) is not None]
    alone = [f"--{name.replace('_', '-')}" for name in given if name != "judge" or not own]
    if alone and args.benchmark is None:
        raise DataError(f"{', '.join(alone)} needs --benchmark", fix="name a benchmark, or leave it out")
    if args.benchmark is not None:
        return _evaluate_benchmarks(args)
    if args.questions is not None:
        return _evaluate_own(args)
    return _evaluate_demo(args) if args.sentences is None else _read_sentences(args)


def _read_sentences(args: argparse.Namespace) -> int:
    from echox.engine.object_store.reading import local_run
    from echox.errors import DataError
    from echox.evaluate.sentences import lines, read_sentences
    from echox.files import write_atomically
    from echox.speak.vocoder import default_vocoder

    if args.limit is not None and args.limit < 2:
        raise DataError(f"--limit {args.limit} leaves no other sentence to compare with", fix="give 2 or more")
    run = local_run(args.trained)
    chosen = {name: getattr(args, name) for name in ("speaker", "judge", "limit") if getattr(args, name) is not None}
    vocoder = args.vocoder or default_vocoder(args.corpus)
    found = read_sentences(run, args.sentences, vocoder, progress=_watch, **chosen)
    folder = args.out or run.parent / "evaluation"
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "sentences.json", json.dumps(found.to_json(), indent=1, ensure_ascii=False) + "\n")
    for line in [json.dumps(found.to_json())] if args.json else lines(found):
        print(line)
    return 0


def _evaluate_benchmarks(args: argparse.Namespace) -> int:
    from echox.engine.object_store.reading import local_run
    from echox.errors import DataError
    from echox.evaluate.benchmarks.command import PAGE, Request, evaluate_benchmarks, parse_names
    from echox.evaluate.benchmarks.records import Part
    from echox.evaluate.benchmarks.table import lines
    from echox.evaluate.benchmarks.tracked import track
    from echox.speak.vocoder import default_vocoder

    if args.limit is not None and args.limit < 1:
        raise DataError(f"--limit {args.limit} leaves no question", fix="give a number from 1 on, or leave it out")
    names, places = parse_names(args.benchmark, args.data or ())
    run = local_run(args.trained)
    chosen = {name: getattr(args, name) for name in ("judge", "sampling", "repeats", "max_new", "batch", "rated")}
    request = Request(
        trained=str(args.trained),
        run=run,
        names=names,
        places=places,
        out=args.out,
        # What is not named is left out of the commands beside the scores.
        vocoder=args.vocoder or (None if args.corpus == "demo" else default_vocoder(args.corpus)),
        speaker=args.speaker,
        limit=args.limit,
        part=Part(*(args.shard or (0, 1))),
        **{name: value for name, value in chosen.items() if value is not None},
    )
    results = evaluate_benchmarks(request, _watch)
    if results is None:
        print("answers of other shards are missing; the scores come with the last of them", file=sys.stderr)
        return 0
    if args.track:
        track(run, results)
    if args.json:
        print(json.dumps(results))
        return 0
    for line in lines(results):
        print(line)
    print(request.folder / PAGE)
    return 0


def _evaluate_own(args: argparse.Namespace) -> int:
    from echox.config.paths import resolve_data
    from echox.engine.object_store.reading import local_run
    from echox.errors import DataError
    from echox.evaluate.own import OwnSets, evaluate_own
    from echox.speak.vocoder import default_vocoder

    if args.sentences is None:
        fix = "name a folder of held-out sentences, with answer.flac and answer.units, by --sentences"
        raise DataError("--questions alone has no ceilings to compare with", fix=fix)
    if args.limit is not None and args.limit < 1:
        raise DataError(f"--limit {args.limit} leaves no question", fix="give a number from 1 on, or leave it out")
    chosen = {name: getattr(args, name) for name in ("speaker", "judge", "rated") if getattr(args, name) is not None}
    sets = OwnSets(
        run=local_run(args.trained),
        questions=tuple(Path(each) for each in args.questions.split(",") if each),
        sentences=resolve_data(args.sentences),
        vocoder=args.vocoder or default_vocoder(args.corpus),
        limit=args.limit,
        **chosen,
    )
    return _saved(args, sets.run, evaluate_own(sets, _watch))


def _watch(name: str, done: int, total: int) -> None:
    print(f"{name} {done}/{total}", file=sys.stderr)


def _evaluate_demo(args: argparse.Namespace) -> int:
    from echox.engine.object_store.reading import local_run
    from echox.evaluate.demo import evaluate_demo

    run = local_run(args.trained)
    chosen = {} if args.rated is None else {"rated": args.rated}
    voice = {"vocoder": args.vocoder, "speaker": args.speaker}
    found = evaluate_demo(run, limit=args.limit, progress=_watch, corpus=args.corpus, **voice, **chosen)
    return _saved(args, run, found)


def _saved(args: argparse.Namespace, run: Path, found: Evaluation) -> int:
    """Keep an evaluation for the report, and print its scores."""
    from echox.evaluate.store import save_evaluation

    scores = found.to_json()
    save_evaluation(args.out or run.parent / "evaluation", scores, found.samples())
    if args.json:
        print(json.dumps(scores))
        return 0
    for line in score_lines(scores):
        print(line)
    return 0


def report(args: argparse.Namespace) -> int:
    """Write the pages."""
    from echox.errors import DataError
    from echox.evaluate.published import publish, write_pages
    from echox.evaluate.report import STAGES
    from echox.evaluate.store import check_scores, load_evaluation
    from echox.files import is_within, read_record

    evaluation = args.storage / "evaluation"
    scores, samples = load_evaluation(evaluation)
    try:
        result = check_scores({**read_record(args.storage, "result.json"), **scores})
    except (TypeError, AttributeError) as error:
        where = str(args.storage / "result.json")
        raise DataError(f"this is no result: {error}", where=where, fix="remove it") from error
    folders = {stage: sorted(args.storage.glob(f"*-{stage}")) for stage in STAGES}
    runs = {stage: found[-1] for stage, found in folders.items() if found and is_within(args.storage, found[-1])}
    if args.track and "echo" not in runs:
        raise DataError("there is no echo run to add to", where=str(args.storage), fix="leave out --track")
    pages = write_pages(args.storage, runs, result, samples, args.out)
    if args.track:
        publish(runs["echo"], scores, pages, evaluation)
    for page in (pages.report, pages.card):
        print(page)
    return 0


def score_lines(scores: Mapping[str, Any]) -> list[str]:
    """The scores as a table, a line a score with what it means."""
    from echox.config.languages import ENGLISH
    from echox.evaluate.columns import COLUMNS, aligned, cell, in_language, note, percent
    from echox.evaluate.normalization import error_rate_name
    from echox.evaluate.report import streaming_rows

    sets, language = scores["sets"], scores.get("language") or ENGLISH
    shown = in_language(COLUMNS, language)
    table = [["", *sets], ["", *(note(row) for row in sets.values())]]
    table += [[column.label, *(cell(column.key, row) for row in sets.values())] for column in shown]
    meanings = ["", "", *(column.meaning for column in shown)]
    lines = [f"{row}  {meaning}".rstrip() for row, meaning in zip(aligned(table), meanings, strict=True)]
    taught, exact = (percent(scores[f"t2c_heldout_{name}"]) for name in ("wer", "exact"))
    again, original = (percent(scores[name]) for name in ("resynthesis_wer", "original_wer"))
    lines.append(
        f"held-out sentences: the teacher's {error_rate_name(language)} {taught} ({exact} heard word for word), true "
        f"units spoken again {again}, original audio {original}"
    )
    streamed = ", ".join(f"{label} {value}" for label, value in streaming_rows(scores.get("streaming", {})))
    return [*lines, f"streamed: {streamed}"] if streamed else lines
