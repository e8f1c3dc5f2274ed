"""What the queen is told at her start: options of a person, or the file that `rbee apply` wrote."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from rbee import paths
from rbee.errors import InvalidInput, SetupProblem
from rbee.logs import LogFormat
from rbee.queen.retention import DAY_S, MAX_KEEP_DAYS, RETENTION, Retention
from rbee.queen.settings import Settings
from rbee.queen.sharing import sharing_of
from rbee.tokens import shared_token
from rbee.wire.settings import QueenSettings, read_settings, secret_path

KEPT = (
    ("jobs", RETENTION.jobs_s / DAY_S, "what became of each job"),
    ("results", RETENTION.results_s / DAY_S, "answers of jobs and batches, and files"),
    ("usage", RETENTION.usage_s / DAY_S, "the tokens that each key used"),
)


def parse(argv: list[str]) -> argparse.Namespace:
    """Return what stands on the command line; it ends the program when that is wrong."""
    parser = argparse.ArgumentParser(prog="queen-rbee", description="The queen: one OpenAI-compatible endpoint.")
    parser.add_argument("command", choices=["run"], help="run in the foreground")
    parser.add_argument("--settings", type=Path, help="a file that `rbee apply` wrote; it stands for all other options")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=7833, help="port (default 7833; 0: any free one)")
    parser.add_argument("--hive-port", type=int, default=7835, help="port of this machine's hive")
    parser.add_argument("--no-hive", action="store_true", help="keep no hive on this machine")
    parser.add_argument("--require-key", action="store_true", help="ask for an API key on the loopback address, too")
    parser.add_argument("--platform", action="store_true", help="take the routing script from the operator's API only")
    parser.add_argument(
        "--inventory", type=Path, help="folder with *.conf and scheduler.rhai (default: the person's own)"
    )
    for name, default, what in KEPT:
        parser.add_argument(
            f"--keep-{name}", type=float, default=default, metavar="DAYS", help=f"keep {what} for so long ({default:g})"
        )
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="server processes (1; more need --state)")
    parser.add_argument("--state", default="", metavar="URL", help="Redis for what processes and queens share")
    parser.add_argument("--state-password-file", type=Path, metavar="FILE", help="private file with its password")
    parser.add_argument("--advertise", default="", metavar="URL", help="the address of this queen for other queens")
    parser.add_argument("--log-format", choices=get_args(LogFormat), default="text", help="how a record looks (text)")
    parser.add_argument("--log-jobs", action="store_true", help="log a record for each job at its end")
    parser.add_argument(
        "--otlp-endpoint", default="", metavar="URL", help="send a trace of each job there, by OTLP/HTTP"
    )
    parser.add_argument("--parent", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--ephemeral", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def settings_of(arguments: argparse.Namespace) -> Settings:
    """Return the settings that a command line stands for. Raises: InvalidInput, SetupProblem."""
    for name in ("port", "hive_port"):
        if not 0 <= getattr(arguments, name) <= 65535:
            raise InvalidInput(f"--{name.replace('_', '-')} must be between 0 and 65535")
    if arguments.inventory is not None and not arguments.inventory.is_dir():
        raise InvalidInput(f"The inventory {arguments.inventory} is no folder")
    for name, _, _ in KEPT:
        if not 0 < getattr(arguments, f"keep_{name}") <= MAX_KEEP_DAYS:
            raise InvalidInput(f"--keep-{name} must be more than 0 days and at most {MAX_KEEP_DAYS}")
    if arguments.settings is not None:
        return _declared(read_settings(arguments.settings, QueenSettings), arguments.parent)
    state = _state_dir()
    return Settings(
        host=arguments.host,
        port=arguments.port,
        hive_port=arguments.hive_port,
        run_hive=not arguments.no_hive,
        inventory=arguments.inventory.absolute() if arguments.inventory else None,
        state_dir=state,
        parent_pid=arguments.parent,
        ephemeral=arguments.ephemeral,
        require_key=arguments.require_key,
        platform=arguments.platform,
        retention=Retention(
            jobs_s=arguments.keep_jobs * DAY_S,
            results_s=arguments.keep_results * DAY_S,
            usage_s=arguments.keep_usage * DAY_S,
        ),
        hive_token=shared_token(state / "hive.token"),
        log_format=arguments.log_format,
        log_jobs=arguments.log_jobs,
        otlp_endpoint=arguments.otlp_endpoint,
        drain_s=5.0 if arguments.ephemeral else 30.0,
        **sharing_of(arguments.processes, arguments.state, arguments.state_password_file, arguments.advertise),
    )


def _declared(told: QueenSettings, parent_pid: int) -> Settings:
    """Return the settings of a queen that `rbee apply` set up: she keeps no hive, every one is in the inventory."""
    state = _state_dir()
    return Settings(
        host=told.host,
        port=told.port,
        run_hive=False,
        inventory=Path(told.inventory),
        identity=secret_path(told.identity),
        gitops=Path(told.gitops) if told.gitops else None,
        declared=True,
        state_dir=state,
        parent_pid=parent_pid,
        require_key=told.require_key,
        platform=told.platform,
        log_format=told.log_format,
        log_jobs=told.log_jobs,
        otlp_endpoint=told.otlp_endpoint,
        retention=Retention(
            jobs_s=told.keep_jobs_days * DAY_S,
            results_s=told.keep_results_days * DAY_S,
            usage_s=told.keep_usage_days * DAY_S,
        ),
        hive_token=shared_token(state / "hive.token"),
        **sharing_of(
            told.processes,
            told.state,
            secret_path(told.state_password_file) if told.state_password_file else None,
            told.advertise,
        ),
    )


def _state_dir() -> Path:
    try:
        return paths.private(paths.state_dir())
    except OSError as problem:
        raise SetupProblem(f"Cannot use the state folder {paths.state_dir()} ({problem.strerror})") from None
