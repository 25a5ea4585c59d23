"""`echox speak`: answers one spoken question with speech."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "speak",
        help="answer a spoken question with speech",
        description="Answer a spoken question with speech: audio to text, text to units, units to audio.",
        epilog="example: echox speak --question question.wav --out answer.wav --run runs/demo/demo-echo",
    )
    parser.add_argument("--question", type=Path, required=True, help="audio file; any rate and channel count")
    parser.add_argument("--out", type=Path, required=True, help="WAV file to write")
    parser.add_argument(
        "--run",
        dest="trained",
        type=Path,
        default=Path("runs/demo/demo-echo"),
        help="run or checkpoint of the echo stage",
    )
    parser.add_argument(
        "--vocoder", type=Path, help="vocoder folder; default: the demo's, below $ECHOX_CACHE/data/demo"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Load, answer, write."""
    from echox.audio.io import SAMPLE_RATE, read_audio, resample, write_audio
    from echox.config.paths import cache_dir
    from echox.speak.pipeline import SpeechToSpeech
    from echox.speak.vocoder import check_vocoder, load_vocoder

    question = read_audio(args.question)
    folder = args.vocoder or cache_dir() / "data" / "demo" / "vocoder"
    vocoder = load_vocoder(folder)
    model = SpeechToSpeech.load(args.trained)
    check_vocoder(folder, [model.units])
    if len(question) > model.max_audio_s * SAMPLE_RATE:
        asked = len(question) / SAMPLE_RATE
        print(f"{args.question} has {asked:.0f} s; only the first {model.max_audio_s:.0f} s are heard", file=sys.stderr)
    answer = model.answer([question])[0]
    wave = resample(vocoder([answer.units])[0], vocoder.sample_rate)
    write_audio(args.out, wave)
    result = {"text": answer.text, "out": str(args.out), "seconds": round(len(wave) / SAMPLE_RATE, 2)}
    print(json.dumps(result) if args.json else f"{answer.text}\n{args.out} ({result['seconds']} s)")
    return 0
