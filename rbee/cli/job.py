"""`rbee job`: what became of every request, and the jobs that nobody waits for."""

from __future__ import annotations

import datetime
import re
import sys
import time
from urllib.parse import quote, urlencode

import click
import msgspec

from rbee.cli.command import Group, Verb, json_option
from rbee.cli.door import Door
from rbee.cli.terminal import age, clean, table
from rbee.client import events
from rbee.errors import InvalidInput, NotFound
from rbee.wire.jobs import JobList, JobStatus, JobView

READ_ON = "docs/jobs.md"
SILENCE_S = 60.0
"""The queen fills silences with comments every few seconds."""

ID = r"[A-Za-z0-9_.-]*\d[A-Za-z0-9_.-]*"
UNANSWERED = (JobStatus.FAILED, JobStatus.CANCELLED, JobStatus.INTERRUPTED)

id_argument = click.argument("job_id", metavar="ID")


@click.group("job", cls=Group)
def command() -> None:
    """List jobs, follow one, and cancel it. Every request is a job; its id is in the header X-Rbee-Job."""


@command.command(
    "list",
    cls=Verb,
    read_on=READ_ON,
    examples=[
        ("rbee job list", "Show the last jobs, the newest first."),
        ("rbee job list --status failed --model rbee-demo", "Show which jobs of a model failed."),
    ],
)
@click.option("--status", type=click.Choice([str(status) for status in JobStatus]), help="Only those in this state.")
@click.option("--model", metavar="NAME", help="Only those of this model.")
@click.option("--after", metavar="ID", help="Only those older than this one.")
@click.option(
    "-n", "--limit", type=click.IntRange(1, 100), metavar="N", default=20, show_default=True, help="How many."
)
@json_option
@click.pass_obj
def list_(door: Door, status: str | None, model: str | None, after: str | None, limit: int, as_json: bool) -> None:
    """List jobs, the newest first: requests that were answered, jobs of the API, and lines of batches."""
    if after is not None and not re.fullmatch(ID, after):
        raise InvalidInput(f"{after[:80]!r} is no job's id", hint="the last one of the list before")
    asked = {"status": status, "model": model, "after": after, "limit": str(limit)}
    query = urlencode({name: value for name, value in asked.items() if value})
    with door.client() as client:
        page = client.get(f"/v1/jobs?{query}", JobList)
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(page), indent=2))
        return
    if not page.data:
        click.echo("There are no such jobs." if status or model or after else "There are no jobs yet.", err=True)
    table(("id", "status", "kind", "model", "worker", "tokens", "created"), (_row(job) for job in page.data))
    if page.has_more:
        click.echo(f"There are more: rbee job list --after {page.last_id}", err=True)


@command.command(
    "show",
    cls=Verb,
    read_on=READ_ON,
    examples=[("rbee job show job_18ea0454271baf524e36cfc542", "Show a job and its answer.")],
)
@id_argument
@json_option
@click.pass_obj
def show(door: Door, job_id: str, as_json: bool) -> None:
    """Show all that is known of one job; exit with 4 when there is none."""
    with door.client() as client:
        job = client.get(_path(job_id), JobView)
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(job), indent=2))
        return
    _show(job)


@command.command(
    "cancel",
    cls=Verb,
    read_on=READ_ON,
    examples=[("rbee job cancel job_18ea0454271baf524e36cfc542", "End a job, waiting or running.")],
)
@id_argument
@click.pass_obj
def cancel(door: Door, job_id: str) -> None:
    """End a job, in whatever phase it is; one that is over stays as it is."""
    with door.client() as client:
        job = client.delete(_path(job_id), JobView, timeout_s=30.0)
    click.echo(f"{job.id} is {job.status}.", err=True)


@command.command(
    "logs",
    cls=Verb,
    read_on=READ_ON,
    examples=[("rbee job logs job_18ea0454271baf524e36cfc542", "Follow a job from its first event to its end.")],
)
@id_argument
@click.option("--after", metavar="N", type=click.IntRange(0), default=0, help="Go on after the event with this id.")
@click.pass_obj
def logs(door: Door, job_id: str, after: int) -> int:
    """Follow the events of a job of `POST /v1/jobs`, one JSON object a line.

    Exits with 1 when the job failed.
    """
    failed = False
    with door.client() as client:
        headers = {"Last-Event-ID": str(after)} if after else {}
        answer = client.send("GET", f"{_path(job_id)}/stream", headers=headers)
        for data in events(answer, silence_s=SILENCE_S):
            click.echo(clean(data))
            sys.stdout.flush()
            failed = _failed(data)
    return 1 if failed else 0


def _failed(data: str) -> bool:
    event = msgspec.json.decode(data)
    return isinstance(event, dict) and "job_id" in event and event.get("status") in UNANSWERED


def _about(job: JobView) -> str:
    return "about " if job.usage.estimated else ""


def _path(job_id: str) -> str:
    if not re.fullmatch(ID, job_id):
        raise NotFound(f"There is no job {job_id[:80]!r}", hint="rbee job list")
    return f"/v1/jobs/{quote(job_id, safe='')}"


def _row(job: JobView) -> tuple[object, ...]:
    tokens = f"{_about(job)}{job.usage.prompt_tokens} + {job.usage.completion_tokens}"
    created = age(max(0.0, time.time() - job.created_at))
    return job.id, job.status, job.kind, clean(job.model), job.worker, tokens, created


def _show(job: JobView) -> None:
    facts = {
        "id": job.id,
        "status": job.status,
        "kind": job.kind,
        "endpoint": job.endpoint,
        "model": clean(job.model),
        "worker": job.worker or "none",
        "priority": job.priority,
        "key": job.key,
        "created": _moment(job.created_at),
        "started": _moment(job.started_at),
        "ended": _moment(job.ended_at),
        "tokens": f"{_about(job)}{job.usage.prompt_tokens} read, {job.usage.completion_tokens} written",
        **{f"metadata {clean(name)}": clean(value) for name, value in job.metadata.items()},
    }
    if job.error is not None:
        facts["error"] = clean(job.error.message)
    table(("field", "value"), facts.items())
    if isinstance(job.response, msgspec.Raw):
        click.echo(msgspec.json.format(bytes(job.response), indent=2))


def _moment(seconds: float) -> str:
    if not seconds:
        return "not yet"
    return datetime.datetime.fromtimestamp(seconds, tz=datetime.UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")
