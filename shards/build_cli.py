"""`echox shards build CORPUS`: builds a corpus as shards; one command a recipe, all with the same options."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from echox.arguments import positive
from echox.audio.io import SAMPLE_RATE
from shards.builder.hold_out import PARTS, Shares, part_of
from shards.corpora.registry import CORPORA
from shards.corpus import Corpus

ANSWER_RATES = (SAMPLE_RATE, 24_000)


def add_builders(corpora: Any) -> None:
    """Register a command for every recipe."""
    for corpus in CORPORA.values():
        _add(corpora, corpus)


def _add(corpora: Any, corpus: Corpus) -> None:
    parser = corpora.add_parser(
        corpus.name,
        help=corpus.summary,
        description=f"{corpus.summary}\n\npage:    {corpus.page}\nlicence: {corpus.licence}",
        epilog=f"what --source holds:\n\n{corpus.layout}\n\nexample: {corpus.example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--source", type=Path, required=True, help="where the corpus lies; it is only read")
    parser.add_argument("--out", type=Path, required=True, help="folder for the shards; appears when they are complete")
    parser.add_argument("--limit", type=positive, help="take the first so many utterances only, to try things out")
    parser.add_argument("--workers", type=positive, help="processes (default: as many as there are processors)")
    if len(corpus.tasks) > 1:
        default = corpus.tasks[0] or "by the fields of each line"
        named = [task for task in corpus.tasks if task]
        parser.add_argument("--task", choices=named, default=corpus.tasks[0], help=f"what for (default: {default})")
    if corpus.has_splits:
        parser.add_argument("--split", default="train", help="train, dev, test or one part (default: %(default)s)")
    if corpus.tasks != ("asr",):
        parser.add_argument("--units", type=Path, help="folder of kmeans.npz: turn spoken answers into units of it")
        parser.add_argument("--keep-answer-audio", action="store_true", help="keep answer.flac beside the units")
        parser.add_argument(
            "--answer-rate",
            type=int,
            choices=ANSWER_RATES,
            default=SAMPLE_RATE,
            help="samples a second of answer.flac, for a vocoder that speaks at that rate (default: %(default)s)",
        )
    if "sqa" in corpus.tasks:
        parser.add_argument(
            "--history-audio",
            action="store_true",
            help="keep the sound of earlier user turns, for data.history: speech",
        )
    if corpus.name == "manifest":
        parser.add_argument(
            "--audio-root", type=Path, help="folder that the audio has to lie in (default: the manifest's own)"
        )
        parser.add_argument("--part", choices=PARTS, help="of the list: what is held out, or the rest; default: all")
        parser.add_argument(
            "--valid-share", type=_share, default=0.05, help="of the list in part valid (default: %(default)g)"
        )
        parser.add_argument(
            "--test-share", type=_share, default=0.0, help="of the list in part test (default: %(default)g)"
        )
        parser.add_argument(
            "--transcribe", metavar="MODEL", help="Whisper that writes down what has no text: a folder, or its name"
        )
        parser.add_argument("--language", help="spoken in it, for --transcribe, as 'de'; default: the model decides")
        parser.add_argument(
            "--speak", type=Path, metavar="VOICE.onnx", help="Piper voice that speaks what has no sound"
        )
    parser.add_argument("--per-shard", type=positive, default=256, help="utterances a shard (default: %(default)s)")
    parser.add_argument(
        "--max-seconds", type=float, default=120.0, help="longer audio is rejected (default: %(default)g)"
    )
    parser.add_argument(
        "--max-rejected",
        type=_share,
        default=0.02,
        help="share of bad utterances above which the build fails (default: %(default)g)",
    )
    parser.add_argument("--replace", action="store_true", help="replace shards that were built differently")
    parser.add_argument("--json", action="store_true", help="print the description of the shards as JSON")
    parser.set_defaults(run=run_build, corpus=corpus.name, units=None, keep_answer_audio=False, split="train")
    parser.set_defaults(history_audio=False)


def run_build(args: argparse.Namespace) -> int:
    """Build the corpus; progress goes to stderr, the result to stdout."""
    from shards.builder.answer_units import add_answer_units, finish_interrupted, record_published
    from shards.builder.corpus_build import Settings, build_corpus
    from shards.corpus import Request

    corpus = CORPORA[args.corpus]
    workers = args.workers or len(os.sched_getaffinity(0))
    request = Request(
        task=getattr(args, "task", corpus.tasks[0]),
        split=args.split,
        answers=args.units is not None or args.keep_answer_audio,
        history=args.history_audio,
        audio_root=getattr(args, "audio_root", None),
    )
    settings = Settings(
        limit=args.limit,
        per_shard=args.per_shard,
        workers=workers,
        longest_s=args.max_seconds,
        answer_rate=getattr(args, "answer_rate", SAMPLE_RATE),
        max_rejected=args.max_rejected,
        replace=args.replace,
    )
    finish_interrupted(args.out)
    if corpus.kind is not None and (kind := corpus.kind(args.source)):
        _say(f"{args.source}: {kind}")
    described = build_corpus(_completed(corpus, args), args.source, args.out, request, settings, _say)
    if corpus.unit_set is not None:
        record_published(args.out, corpus.unit_set)
    if args.units is not None:
        add_answer_units(args.out, args.units, _say, keep_audio=args.keep_answer_audio, workers=workers)
        described = json.loads((args.out / "dataset.json").read_text())
    if args.json:
        print(json.dumps(described, indent=2))
    else:
        print(f"corpus {corpus.name}: {args.out}")
    return 0


def _completed(corpus: Corpus, args: argparse.Namespace) -> Corpus:
    """The part of the corpus that is wanted, with what a model is to make of it."""
    from shards.builder.missing import Maker, Missing

    if getattr(args, "part", None) is not None:
        corpus = part_of(corpus, args.part, Shares(args.valid_share, args.test_share))
    transcribe, speak = getattr(args, "transcribe", None), getattr(args, "speak", None)
    recogniser = synthesiser = None
    if transcribe is not None:
        from echox.evaluate.judges import NamedJudge

        judge = NamedJudge.find(transcribe)
        recogniser = Maker(judge.name, json.dumps([judge.identity(), args.language]), lambda: judge.open(args.language))
    if speak is not None:
        from echox.files import sha256_file
        from shards.builder.piper import PiperSpeech, check_voice

        check_voice(speak)
        synthesiser = Maker(speak.stem, sha256_file(speak), lambda: PiperSpeech(speak))
    if recogniser is None and synthesiser is None:
        return corpus
    return Missing(args.out.with_name(f"{args.out.name}.made"), recogniser, synthesiser).completes(corpus)


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not within 0 and 1")
    return value


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
