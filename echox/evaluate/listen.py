"""`echox listen`: while a run trains, its checkpoints answer a few questions aloud, on a page and in MLflow."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from echox.speak.voice_options import add_voice_options

POLL_S = 5.0
ENDED = ("finished", "failed", "stopped")


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "listen",
        help="let each checkpoint of a run answer a few questions aloud",
        description="Let each checkpoint of an echo run answer the same few questions aloud, also while it trains: "
        "sounds and a page in a folder, and in the run's MLflow artifacts below listen/.",
        epilog="examples: echox listen runs/demo/demo-echo\n"
        "          echox listen runs/demo/demo-echo --follow --device cpu --question mine.wav",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("trained", metavar="RUN", help="run, or URL of a run, of the echo stage")
    parser.add_argument("--follow", action="store_true", help="go on until the run has ended")
    parser.add_argument("--number", type=int, default=4, help="questions of the first validation set; default: 4")
    parser.add_argument(
        "--question",
        type=Path,
        action="append",
        default=[],
        help="sound file to ask instead; may be given several times",
    )
    add_voice_options(parser)
    parser.add_argument("--device", help="cpu or cuda; default: a GPU where there is one")
    parser.add_argument("--out", type=Path, help="folder for sounds and page; default: listen/ in the run's folder")
    parser.set_defaults(run=listen)


def listen(args: argparse.Namespace) -> int:
    """Ask, write, record, until there is nothing more to hear."""
    from echox.config.paths import resolve_data
    from echox.engine.checkpoint.checkpointer import find_weights
    from echox.engine.checkpoint.recorded import recipe_of
    from echox.engine.object_store.reading import local_run
    from echox.errors import CheckpointError, DataError
    from echox.evaluate.checkpoints_aloud import PAGE, CheckpointsAloud, files_as_questions, questions_of
    from echox.files import is_within
    from echox.run_records import read_progress
    from echox.speak.pipeline import SpeechToSpeech
    from echox.speak.vocoder import check_vocoder, default_vocoder, load_vocoder
    from echox.tracking.run import record

    if args.number < 1:
        raise DataError(f"--number {args.number} asks nothing", fix="give 1 or more")
    run = _first_checkpoint(args.trained) if args.follow else local_run(args.trained)
    recipe = recipe_of(find_weights(run).parent)
    if recipe.stage != "echo":
        raise CheckpointError(f"a run of stage {recipe.stage} does not speak", where=str(run), fix="name an echo run")
    out = args.out or run / "listen"
    if args.out is None and not is_within(run, out):
        raise DataError("it leads out of the run's folder", where=str(out), fix="name a folder with --out")
    vocoder_folder = args.vocoder or default_vocoder()
    if not args.question and not recipe.data.valid:
        raise DataError("the run has no validation set to ask from", where=str(run), fix="give --question FILE")
    questions = (
        files_as_questions(args.question)
        if args.question
        else questions_of(resolve_data(recipe.data.valid[0].path), args.number)
    )

    def load(checkpoint: Path) -> SpeechToSpeech:
        model = SpeechToSpeech.load(checkpoint, device=args.device)
        check_vocoder(vocoder_folder, [model.units])
        return model

    def say(line: str) -> None:
        print(line, file=sys.stderr)

    aloud = CheckpointsAloud(out, questions, load, load_vocoder(vocoder_folder, args.speaker))
    while True:
        # Asked before the look: what is saved while it looks is found by the next one.
        ended = read_progress(run).get("state") in ENDED
        for heard in aloud.look(run, say):
            silent = sum(not said.seconds for said in heard.said)
            print(f"step {heard.step}: {len(heard.said) - silent} of {len(heard.said)} answers have sound")
            artifacts = dict.fromkeys(aloud.files(heard), f"listen/step-{heard.step:08d}")
            record(
                run, metrics=heard.metrics(), artifacts={**artifacts, aloud.folder / PAGE: "listen"}, step=heard.step
            )
        if ended or not args.follow:
            break
        time.sleep(POLL_S)
        run = local_run(args.trained)
    if not aloud.heard:
        raise CheckpointError("no checkpoint could be heard", where=str(run), fix="wait for one, or see what was said")
    print(aloud.folder / PAGE)
    return 0


def _first_checkpoint(trained: str) -> Path:
    """The run's folder, once it has a checkpoint that can be read.

    Raises:
        CheckpointError: the run ended without one, or there is none.
    """
    from echox.engine.checkpoint.checkpointer import find_weights
    from echox.engine.object_store.reading import local_run
    from echox.errors import CheckpointError
    from echox.run_records import read_progress

    while True:
        run = local_run(trained)
        ended = read_progress(run).get("state", "finished") in ENDED
        try:
            find_weights(run)
        except CheckpointError:
            if ended:
                raise
            time.sleep(POLL_S)
        else:
            return run
