"""`echox serve`: a page on this machine to speak to a trained run, and the HTTP interface below it."""

from __future__ import annotations

import argparse
import secrets
from typing import Any

from echox.errors import EchoXError
from echox.speak.voice_options import add_voice_options


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "serve",
        help="speak to a trained run on a page of this machine",
        description="Serve a page on which one asks by voice and hears the answer begin before its text has ended,\n"
        "and the HTTP interface below it (echox/serve/README.md).",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples: echox serve runs/demo/demo-echo\n"
        "          curl -N --data-binary @question.wav http://127.0.0.1:8000/answer",
    )
    parser.add_argument("trained", metavar="RUN", help="run, URL of a run, or checkpoint of the echo stage")
    add_voice_options(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; default: this machine alone")
    parser.add_argument("--port", type=int, default=8000, help="port; 0: any that is free; default: 8000")
    parser.add_argument("--token", help="what requests must carry; default: a random one, but none on this machine")
    parser.add_argument("--open", type=int, default=4, help="answers in progress at a time; default: 4")
    parser.add_argument("--waiting", type=int, default=16, help="questions that may wait; default: 16")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Load and serve until interrupted."""
    import uvicorn

    from echox.serve.app import LOOPBACK, build_app
    from echox.serve.limits import Limits
    from echox.serve.loading import load
    from echox.serve.worker import Worker

    model, vocoder = load(args.trained, args.vocoder, args.speaker)
    try:
        limits = Limits(open=args.open, waiting=args.waiting, question_s=model.max_audio_s)
    except ValueError as error:
        raise EchoXError(str(error), fix="give numbers above 0") from error
    at_home = args.host in LOOPBACK
    token = args.token or (None if at_home else secrets.token_urlsafe(24))
    app = build_app(
        Worker(model, vocoder, limits),
        limits,
        name=model.recipe.name,
        token=token,
        hosts=LOOPBACK if at_home else ("*",),
    )
    config = uvicorn.Config(
        app,
        host=args.host,
        port=args.port,
        log_level="warning",
        timeout_graceful_shutdown=3,
        ws="websockets-sansio",
        ws_max_size=limits.body_bytes,
        ws_per_message_deflate=False,
    )
    try:
        socket = config.bind_socket()
    except SystemExit:
        fix = "name another --port, or 0 for any that is free"
        raise EchoXError(f"port {args.port} of {args.host} is taken", fix=fix) from None
    port = socket.getsockname()[1]
    secret = f"/?token={token}" if token else "/"
    print(f"{model.recipe.name} at http://{args.host}:{port}{secret}  (Ctrl-C ends it)", flush=True)
    uvicorn.Server(config).run(sockets=[socket])
    return 0
