"""`python -m launch.serve RUN`: serves a run on a Ray cluster, as the entry point of a Ray job or by its own hand."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from echox.errors import EchoXError, LaunchError
from echox.speak.voice_options import SPEAKER_HELP
from launch.job.command_line import said
from launch.serving.config import Serving


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until stopped; with --address, have a job of that cluster do it. Returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    args = arguments().parse_args(words)
    try:
        serving = serving_of(args)
        if args.address is not None:
            from launch.client.own_job import submit_command

            print(submit_command("launch.serve", words, args.address, "serve"))
            return 0
        from launch.serving.deploy import serve_until_stopped

        serve_until_stopped(serving)
    except EchoXError as error:
        return said(error, debug=args.debug)
    return 0


def arguments() -> argparse.ArgumentParser:
    """What the command takes."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.serve",
        allow_abbrev=False,
        description="Serve a trained run on a Ray cluster, as `echox serve` does in one process.",
        epilog="example: python -m launch.serve /shared/runs/3b-echo --replicas 2 --gpus 1",
    )
    parser.add_argument("run", metavar="RUN", help="folder that all nodes see, or URL, of a run of the echo stage")
    parser.add_argument("--vocoder", metavar="FOLDER", help="vocoder folder; default: the demo's, below $ECHOX_CACHE")
    parser.add_argument("--speaker", metavar="NAME", help=SPEAKER_HELP)
    parser.add_argument(
        "--address", metavar="http://HOST:PORT", help="cluster whose job serves it; default: the one of this process"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; default: the head alone")
    parser.add_argument("--port", type=int, default=8000, help="port; default: 8000")
    parser.add_argument("--replicas", type=int, default=1, metavar="N", help="processes with the run; default: 1")
    parser.add_argument("--autoscale", metavar="MIN:MAX", help="as many replicas as there are questions for")
    parser.add_argument(
        "--gpus", type=float, default=0.0, metavar="N", help="GPUs of a replica; default: 0, on the CPU"
    )
    parser.add_argument("--cpus", type=float, default=1.0, metavar="N", help="CPU cores of a replica; default: 1")
    parser.add_argument("--open", type=int, default=4, help="answers in progress at a time, a replica; default: 4")
    parser.add_argument("--waiting", type=int, default=16, help="questions that may wait, a replica; default: 16")
    parser.add_argument("--debug", action="store_true", help="print tracebacks of user errors too")
    return parser


def serving_of(args: argparse.Namespace) -> Serving:
    """What the arguments ask for.

    Raises:
        LaunchError: they are out of range.
    """
    least = most = args.replicas
    if args.autoscale is not None:
        try:
            least, most = (int(number) for number in args.autoscale.split(":"))
        except ValueError:
            raise LaunchError(f"--autoscale {args.autoscale} is not MIN:MAX", fix="write such as 1:4") from None
    names = ("run", "vocoder", "speaker", "host", "port", "gpus", "cpus", "open", "waiting")
    return Serving(replicas=least, most=most, **{name: getattr(args, name) for name in names})


if __name__ == "__main__":
    sys.exit(main())
