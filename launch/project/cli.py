"""`echox new` and `echox run`: from an LLM and a folder of recordings to a model that speaks."""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from launch.project.ledger import Done
    from launch.project.plan import Project

WHISPER = "openai/whisper-base"


def add_parser(subparsers: Any) -> None:
    """Register both commands."""
    from echox.engine.hardware import GPUS

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
    new.add_argument(
        "--judge",
        metavar="WHISPER",
        help="scores what the model says; default: that of --transcribe, or the demo's where it was fetched",
    )
    new.add_argument("--gpus", type=int, default=0, metavar="N", help="of the cluster; default: none, on this machine")
    new.add_argument(
        "--hardware", choices=list(GPUS), default="h100", help="kind of GPU, for the forecast; default: %(default)s"
    )
    new.add_argument("--json", action="store_true", help="print the result as JSON")
    new.set_defaults(run=run_new)
    run = subparsers.add_parser(
        "run",
        help="do what is left to do of a project",
        description="Build shards, units and unit language, train the three stages and the vocoder, let the model "
        "speak, score it on questions that it has never met, and write a report. Killed, or after a change, the same "
        "command does what is left.",
        epilog="examples: echox run mine; echox run mine --status",
    )
    run.add_argument("project", type=Path, help="folder that `echox new` wrote")
    run.add_argument("--cluster", action="store_true", help="train as jobs of the Ray cluster at $RAY_ADDRESS")
    run.add_argument("--until", metavar="STEP", help="stop after this step")
    run.add_argument("--status", action="store_true", help="say which steps are done, and do none")
    run.add_argument("--json", action="store_true", help="print the result as JSON")
    run.set_defaults(run=run_project)


def run_new(args: argparse.Namespace) -> int:
    """Look, decide, write, and say what was found."""
    from echox.config.schema import Recipe
    from echox.errors import RecipeError
    from launch.project.cost import costs
    from launch.project.look import look_at, look_at_llm
    from launch.project.plan import Project, remarks, share_held_out, sizes
    from launch.project.recipes import recipes
    from launch.project.store import write, write_recipes

    if args.gpus < 0:
        raise RecipeError(f"--gpus {args.gpus} is below 0", fix="give a number of GPUs, or none")
    judge = find_judge(args.judge, args.transcribe)
    questions = None if args.questions is None else look_at(args.questions, "sqa")
    voice, llm = look_at(args.voice, "tts"), look_at_llm(args.llm)
    project = Project(
        folder=args.name.absolute(),
        llm=_absolute(args.llm),
        voice=args.voice.absolute(),
        questions=None if args.questions is None else args.questions.absolute(),
        language=args.language,
        whisper=_absolute(args.whisper),
        recogniser=None if args.transcribe is None else _absolute(args.transcribe),
        speaker=None if args.speak is None else args.speak.absolute(),
        judge=None if judge is None else _absolute(judge),
        held_out=share_held_out(voice, questions),
        gpus=args.gpus,
    )
    size = sizes(voice, questions, args.gpus)
    written = write_recipes(project, recipes(project, llm, voice, size))
    said = list(remarks(project, llm, voice, questions))
    if args.gpus:
        stages = {str(each.stage): each for each in written.values() if isinstance(each, Recipe)}
        said += costs(stages, args.hardware, args.gpus, voice, questions)
    write(project, size.clusters, said)
    if args.json:
        print(json.dumps({"project": str(project.folder), "remarks": said}))
    else:
        print("\n".join([*said, f"project: {project.folder}; now: echox run {args.name}"]))
    return 0


def find_judge(named: str | None, recogniser: str | None) -> str | None:
    """The judge that is named, else the recogniser, else the demo's; None where that was not fetched.

    Raises:
        MissingModelError: the one that is named, or the recogniser, is not there.
    """
    from echox.errors import MissingModelError
    from echox.evaluate.demo import JUDGE
    from echox.evaluate.judges import NamedJudge

    given = named or recogniser
    if given is not None:
        return NamedJudge.find(given).name
    try:
        return NamedJudge.find(JUDGE).name
    except MissingModelError:
        return None


def run_project(args: argparse.Namespace) -> int:
    """Do what is left to do, or say what that is."""
    from echox.config.mistakes import did_you_mean
    from echox.errors import RecipeError
    from launch.project.ledger import table
    from launch.project.run import run, states
    from launch.project.steps import steps
    from launch.project.store import read

    project, clusters = read(args.project)
    if project.questions is None:
        fix = "name a list of them as `questions` in project.yaml; text alone will do with `speaker`"
        raise RecipeError("the project has no questions to learn to hear", where=str(args.project), fix=fix)
    found = steps(project, clusters)
    names = [step.name for step in found]
    if args.until is not None and args.until not in names:
        fix = did_you_mean(args.until, names, noun="steps")
        raise RecipeError(f"there is no step {args.until}", where=str(args.project), fix=fix)
    say = partial(print, file=sys.stderr, flush=True)
    if not args.status:
        before = signal.signal(signal.SIGTERM, _interrupt)
        try:
            watch = partial(_keep_seconds, project)
            run(project.folder, found, say, until=args.until, cluster=args.cluster, watch=watch)
        finally:
            signal.signal(signal.SIGTERM, before)
    rows = states(project.folder, found)
    report = str(project.report) if project.report.is_file() else None
    if args.json:
        print(json.dumps({"run": str(project.run("echo")), "report": report, "steps": [vars(row) for row in rows]}))
        return 0
    print(table(rows))
    if not args.status:
        print(report or project.run("echo"))
    return 0


def _keep_seconds(project: Project, done: Mapping[str, Done]) -> None:
    """Where the report looks for what each step took."""
    from echox.files import write_atomically

    content = {
        "phases": {name: each.seconds for name, each in done.items()},
        "phases_command": shlex.join(["echox", "run", str(project.folder)]),
    }
    if project.runs.is_dir():
        write_atomically(project.runs / "result.json", json.dumps(content, indent=1) + "\n")


def _absolute(named: str) -> str:
    """A model's folder from anywhere; a name below the cache's models stays."""
    return str(Path(named).absolute()) if Path(named).is_dir() else named


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt
