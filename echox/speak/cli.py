"""`echox speak`: answers one spoken question with speech."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from echox.errors import DataError
from echox.files import read_json
from echox.speak.voice_options import add_voice_options

if TYPE_CHECKING:
    from echox.stream.dialogue import Turn


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "speak",
        help="answer a spoken question with speech",
        description="Answer a spoken question with speech: audio to text, text to units, units to audio.\n\n"
        "What was said before is a list of turns, oldest first; in a file:\n"
        '[{"role": "user", "text": "Where is Lima?", "audio": "lima.wav"},\n'
        ' {"role": "assistant", "text": "It is in Peru."}]\n'
        "Roles are system, user and assistant; audio is optional, a path relative to the file.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: echox speak --question question.wav --out answer.wav --run runs/demo/demo-echo",
    )
    parser.add_argument("--question", type=Path, required=True, help="audio file; any rate and channel count")
    parser.add_argument("--out", type=Path, required=True, help="WAV file to write")
    parser.add_argument("--history", type=Path, metavar="FILE.json", help="turns before the question")
    parser.add_argument(
        "--turn",
        action="append",
        default=[],
        metavar="ROLE:TEXT",
        help="one turn before the question, after those of --history; may be given several times",
    )
    parser.add_argument(
        "--run",
        dest="trained",
        default="runs/demo/demo-echo",
        help="run, URL of a run, or checkpoint of the echo stage",
    )
    add_voice_options(parser)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Load, answer, write."""
    from echox.audio.io import SAMPLE_RATE, read_audio, write_audio
    from echox.engine.object_store.reading import local_run
    from echox.speak.pipeline import SpeechToSpeech
    from echox.speak.vocoder import check_vocoder, default_vocoder, load_vocoder

    question = read_audio(args.question)
    turns = [*(read_history(args.history) if args.history else []), *map(_typed_turn, args.turn)]
    folder = args.vocoder or default_vocoder()
    vocoder = load_vocoder(folder, args.speaker)
    model = SpeechToSpeech.load(local_run(args.trained))
    check_vocoder(folder, [model.units])
    if len(question) > model.max_audio_s * SAMPLE_RATE:
        asked = len(question) / SAMPLE_RATE
        print(f"{args.question} has {asked:.0f} s; only the first {model.max_audio_s:.0f} s are heard", file=sys.stderr)
    if turns and not model.reads_history:
        print(f"{args.trained} reads no dialogue (data.history_tokens=0); the turns are left out", file=sys.stderr)
    answer = (model.answer([question], turns=[turns]) if turns else model.answer([question]))[0]
    for failed in answer.failed:
        print(f"segment {failed.segment + 1} of the answer failed: {failed.why}", file=sys.stderr)
    (wave,) = vocoder([answer.units])
    write_audio(args.out, wave, vocoder.sample_rate)
    result = {"text": answer.text, "out": str(args.out), "seconds": round(len(wave) / vocoder.sample_rate, 2)}
    print(json.dumps(result) if args.json else f"{answer.text}\n{args.out} ({result['seconds']} s)")
    return 0


def read_history(path: Path) -> list[Turn]:
    """Turns of a JSON file, each with its sound where it names one.

    Raises:
        DataError: the file cannot be read, or holds no list of turns; or a sound that cannot be read.
    """
    from echox.audio.io import read_audio
    from echox.stream.dialogue import parse_turns

    try:
        turns = parse_turns(read_json(path))
    except (OSError, ValueError) as error:
        raise DataError(
            f"the turns before the question cannot be read: {getattr(error, 'strerror', None) or error}",
            where=str(path),
            fix='write [{"role": "user", "text": "..."}, {"role": "assistant", "text": "..."}, ...]',
        ) from error
    return [turn if turn.audio is None else replace(turn, clip=read_audio(path.parent / turn.audio)) for turn in turns]


def _typed_turn(given: str) -> Turn:
    from echox.stream.dialogue import parse_turns

    role, _, text = given.partition(":")
    try:
        (turn,) = parse_turns([{"role": role.strip(), "text": text.strip()}])
    except ValueError as error:
        fix = 'write a role, a colon and a text, such as --turn "user:Where is Lima?"'
        raise DataError(f"--turn {given}: {str(error).removeprefix('turns[0].')}", fix=fix) from error
    return turn
