"""`echox new` and `echox run`: from an LLM and a folder of recordings to a model that speaks."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

WHISPER = "openai/whisper-base"


def add_parser(subparsers: Any) -> None:
    """Register both commands."""
    new = subparsers.add_parser(
        "new",
        help="look at an LLM and recordings, and write a project that gives it a voice",
        description="Look at an LLM and at recordings of a voice, and write a folder with three stage recipes, a "
        "vocoder recipe, and what is missing and to be expected. `echox run` does the rest.",
        epilog="example: echox new mine --llm HuggingFaceTB/SmolLM2-135M-Instruct --voice recordings/ --questions "
        "questions.jsonl --speak en_US-joe-medium.onnx --transcribe Xenova/whisper-small",
    )
    new.add_argument("name", type=Path, help="folder of the project, which is made")
    new.add_argument("--llm", required=True, help="folder, or name below $ECHOX_CACHE/models")
    new.add_argument("--voice", type=Path, required=True, help="recordings of one voice: a folder, or a list")
    new.add_argument("--questions", type=Path, help="questions with answers: a list; spoken, or text with --speak")
    new.add_argument("--language", help="that is spoken, as Whisper names it ('de'); default: models decide")
    new.add_argument("--whisper", default=WHISPER, help="encoder of Stage I and of the units; default: %(default)s")
    new.add_argument("--transcribe", metavar="WHISPER", help="writes down recordings without text")
    new.add_argument("--speak", type=Path, metavar="VOICE.onnx", help="Piper voice that speaks questions without sound")
    new.add_argument("--gpus", type=int, default=0, metavar="N", help="of the cluster; default: none, on this machine")
    new.add_argument("--json", action="store_true", help="print the result as JSON")
    new.set_defaults(run=run_new)
    run = subparsers.add_parser(
        "run",
        help="do what is left to do of a project",
        description="Build shards, units and unit language, train the three stages and the vocoder, and let the model "
        "speak. Killed, or after a change, the same command does what is left.",
        epilog="example: echox run mine",
    )
    run.add_argument("project", type=Path, help="folder that `echox new` wrote")
    run.add_argument("--cluster", action="store_true", help="train as jobs of the Ray cluster at $RAY_ADDRESS")
    run.add_argument("--until", metavar="STEP", help="stop after this step")
    run.set_defaults(run=run_project)


def run_new(args: argparse.Namespace) -> int:
    """Look, decide, write, and say what was found."""
    from echox.errors import RecipeError
    from launch.project.look import look_at, look_at_llm
    from launch.project.plan import Project, remarks, sizes
    from launch.project.recipes import recipes
    from launch.project.store import write

    if args.gpus < 0:
        raise RecipeError(f"--gpus {args.gpus} is below 0", fix="give a number of GPUs, or none")
    folder = args.name.absolute()
    questions = None if args.questions is None else look_at(args.questions, "sqa")
    voice, llm = look_at(args.voice, "tts"), look_at_llm(args.llm)
    project = Project(
        folder=folder,
        llm=str(Path(args.llm).absolute()) if Path(args.llm).is_dir() else args.llm,
        voice=args.voice.absolute(),
        questions=None if args.questions is None else args.questions.absolute(),
        language=args.language,
        whisper=str(Path(args.whisper).absolute()) if Path(args.whisper).is_dir() else args.whisper,
        recogniser=args.transcribe,
        speaker=None if args.speak is None else args.speak.absolute(),
        gpus=args.gpus,
    )
    size = sizes(voice, questions, args.gpus)
    said = list(remarks(project, llm, voice, questions))
    write(project, size.clusters, recipes(project, llm, voice, size), said)
    if args.json:
        print(json.dumps({"project": str(folder), "remarks": said}))
    else:
        print("\n".join([*said, f"project: {folder}; now: echox run {args.name}"]))
    return 0


def run_project(args: argparse.Namespace) -> int:
    """Do what is left to do."""
    from echox.config.mistakes import did_you_mean
    from echox.errors import RecipeError
    from launch.project.run import run
    from launch.project.steps import steps
    from launch.project.store import read

    project, clusters = read(args.project)
    if project.questions is None:
        fix = "name a list of them as `questions` in project.yaml; text alone will do with `speaker`"
        raise RecipeError("the project has no questions to learn to hear", where=str(args.project), fix=fix)
    found = steps(project, clusters)
    if args.until is not None:
        names = [step.name for step in found]
        if args.until not in names:
            fix = did_you_mean(args.until, names, noun="steps")
            raise RecipeError(f"there is no step {args.until}", where=str(args.project), fix=fix)
        found = found[: names.index(args.until) + 1]
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        run(project.folder, found, partial(print, file=sys.stderr, flush=True), cluster=args.cluster)
    finally:
        signal.signal(signal.SIGTERM, before)
    print(project.folder / "runs" / "echo")
    return 0


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt
