"""`python -m launch.evaluate RUN --benchmark NAME`: scores a run on benchmarks with the processes of a Ray cluster.

Every process takes its share of the questions, see `--shard` of `echox evaluate`. One that is lost, by itself or with
its node, is started again and goes on behind the last answer that it had written.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from collections.abc import Sequence
from typing import Any

from echox.arguments import positive
from echox.errors import EchoXError, LaunchError
from launch.job.command_line import said
from launch.job.room import lacking

ADDRESS_HELP = "cluster whose job does it; default: the one of this process"
LOST = 5
"""Times that the process of a share may be lost."""


def main(argv: Sequence[str] | None = None) -> int:
    """Score; with --address, have a job of that cluster do it. Returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    args, given = arguments().parse_known_args(words)
    try:
        check(args, given)
        if args.address is not None:
            from launch.client.own_job import submit_command

            print(submit_command("launch.evaluate", words, args.address, "evaluate"))
            return 0
        return score([args.run, *given], args.workers, args.cpus, args.gpus)
    except EchoXError as error:
        return said(error, debug=args.debug)


def arguments() -> argparse.ArgumentParser:
    """What the command takes beside what `echox evaluate` does."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.evaluate",
        allow_abbrev=False,
        description="Score a run on benchmarks as `echox evaluate RUN --benchmark` does, with all its options, spread "
        "over the processes of a Ray cluster.",
        epilog="example: python -m launch.evaluate /shared/runs/3b-echo --workers 8 --gpus 1 --judge "
        "openai/whisper-large-v3 --benchmark llama-questions",
    )
    parser.add_argument("run", metavar="RUN", help="folder that all nodes see, or URL, of a run of the echo stage")
    parser.add_argument("--workers", type=positive, default=2, metavar="N", help="processes; default: %(default)s")
    parser.add_argument("--cpus", type=float, default=1.0, metavar="N", help="CPU cores of a process; default: 1")
    parser.add_argument(
        "--gpus", type=float, default=0.0, metavar="N", help="GPUs of a process; default: 0, on the CPU"
    )
    parser.add_argument("--address", metavar="http://HOST:PORT", help=ADDRESS_HELP)
    parser.add_argument("--debug", action="store_true", help="print tracebacks of user errors too")
    return parser


def check(args: argparse.Namespace, given: Sequence[str]) -> None:
    """Refuse what would only fail on the cluster.

    Raises:
        LaunchError: the numbers are out of range, no benchmark is named, or the shares are.
    """
    wrong = [f"--cpus {args.cpus:g} is not above 0"] if not args.cpus > 0 else []
    wrong += [f"--gpus {args.gpus:g} is below 0"] if args.gpus < 0 else []
    names = {word.partition("=")[0] for word in given}
    wrong += ["--benchmark is missing"] if "--benchmark" not in names else []
    wrong += ["--shard is what --workers decides"] if "--shard" in names else []
    if wrong:
        raise LaunchError("; ".join(wrong), fix="see --help, and that of `echox evaluate`")


def score(words: Sequence[str], workers: int, cpus: float, gpus: float) -> int:
    """Have each process of the cluster answer its share, then print the scores here; returns the exit code.

    Args:
        words: of `echox evaluate`.
        workers: processes.
        cpus, gpus: of each.

    Raises:
        LaunchError: there is no cluster, no room in it, or a process is lost too often.
    """
    from launch.job.driver import connect
    from launch.job.environment import process_environment

    connect()
    import ray

    check_room(cpus, gpus)
    variables = process_environment(cpus, gpus)
    options: dict[str, Any] = {"num_cpus": cpus, "num_gpus": gpus, "max_retries": LOST, "max_calls": 1}
    answer: Any = ray.remote(**options, runtime_env={"env_vars": variables})(_answer)
    waiting = [answer.remote([*words, "--shard", f"{index}/{workers}"]) for index in range(workers)]
    try:
        while waiting:
            done, waiting = ray.wait(waiting)
            code = int(ray.get(done[0]))
            if code:
                return code
    except ray.exceptions.RayError as error:
        what = str(error).strip().splitlines()[0]
        raise LaunchError(f"a process was lost {LOST + 1} times: {what}", fix="give the same command again") from error
    finally:
        for task in waiting:
            ray.cancel(task, force=True)
    return _evaluate([*words, "--shard", f"0/{workers}"])


def check_room(cpus: float, gpus: float) -> None:
    """Fail at once where the cluster could never hold one process.

    Raises:
        LaunchError: it could not.
    """
    short = lacking({"CPU": cpus, "GPU": gpus})
    if short:
        fix = "add nodes, or give fewer --gpus or --cpus"
        raise LaunchError(f"a process needs more than the cluster has: {short}", fix=fix)


def _answer(words: Sequence[str]) -> int:
    """A share. The last one to end prints the scores of all, which are printed once, by who asked."""
    with contextlib.redirect_stdout(io.StringIO()):
        return _evaluate(words)


def _evaluate(words: Sequence[str]) -> int:
    from echox.cli import main as echox

    return echox(["evaluate", *words])


if __name__ == "__main__":
    sys.exit(main())
