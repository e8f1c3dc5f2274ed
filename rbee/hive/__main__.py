"""`python -m rbee.hive run`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from rbee.errors import RbeeError
from rbee.lean import without_typing_extensions

with without_typing_extensions():
    from rbee.hive.settings import DEFAULT_PORT, LOAD_LIMIT_S, Settings


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line, run the hive, and return the exit code."""
    options = _parser().parse_args(arguments)
    level = options.log_level.upper()
    if options.log_format == "json":
        from rbee import logs

        logs.configure("json", level)
    else:
        logging.basicConfig(stream=sys.stderr, level=level, format="%(asctime)s %(levelname)s %(message)s")
    try:
        settings = Settings.from_file(options.settings) if options.settings else _by_hand(options)
        from rbee.hive import agent

        return agent.run(settings)
    except RbeeError as problem:
        print(f"rbee-hive: {problem}", file=sys.stderr)
        return problem.exit_code


def _by_hand(options: argparse.Namespace) -> Settings:
    return Settings.checked(
        host=options.host,
        port=options.port,
        queen_url=options.queen,
        name=options.name,
        token_file=options.token_file,
        parent_pid=options.parent,
        ephemeral=options.ephemeral,
        load_limit_s=options.load_limit,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rbee-hive", description="Run the models of this machine for a queen.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="COMMAND")
    run = verbs.add_parser("run", help="run the hive in the foreground until it is told to stop")
    settings = "everything below from a YAML file (used by systemd's unit)"
    run.add_argument("--settings", type=Path, metavar="FILE", help=settings)
    run.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    run.add_argument("--port", type=int, default=DEFAULT_PORT, help="port, 0 for any free one (default: %(default)s)")
    run.add_argument("--queen", default="", metavar="URL", help="the queen to report to; she may start later")
    run.add_argument("--name", default="", help="this machine's name in the fleet (default: its host name)")
    run.add_argument("--token-file", type=Path, metavar="FILE", help="the token that callers must bring")
    run.add_argument("--parent", type=int, default=0, metavar="PID", help="stop when this process ends")
    run.add_argument("--ephemeral", action="store_true", help="stop quickly: jobs that run get one second to end")
    load_limit = "end a worker whose model is not loaded within this time (default: %(default)g)"
    run.add_argument("--load-limit", type=float, default=LOAD_LIMIT_S, metavar="SECONDS", help=load_limit)
    run.add_argument("--log-format", choices=("text", "json"), default="text", help="how a record of the log looks")
    run.add_argument("--log-level", choices=("debug", "info", "warning", "error"), default="info")
    return parser


if __name__ == "__main__":
    sys.exit(main())
