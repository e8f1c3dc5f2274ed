"""`rbee model`: list, add and remove model files."""

from __future__ import annotations

from pathlib import Path

import click

from rbee.cli.command import Group, Verb, hive_option, json_option
from rbee.cli.door import Door, hives, only_hive
from rbee.cli.naming import complete_models
from rbee.cli.terminal import Waiting
from rbee.client import Client
from rbee.errors import InvalidInput, NotFound, UnknownModel
from rbee.wire.fleet import AddModel, ModelReport

READ_ON = "docs/cli.md#rbee-model"
ADD_TIMEOUT_S = 120.0
"""A hive reads the file's head, which may lie on a slow disk or a share that has to wake up."""


@click.group("model", cls=Group)
def command() -> None:
    """List, add and remove model files. The queen is started when none runs."""


@command.command(
    "list", cls=Verb, read_on=READ_ON, examples=[("rbee model list", "Show every model and where it lies.")]
)
@json_option
@click.pass_obj
def list_(door: Door, as_json: bool) -> None:
    """List the models of every machine."""
    with Waiting() as waiting, door.client(door.started(waiting.step)) as client:
        known = hives(client, waiting.step)
    if as_json:
        import msgspec

        models = [{"hive": hive.hive, **msgspec.to_builtins(model)} for hive in known for model in hive.models]
        click.echo(msgspec.json.format(msgspec.json.encode(models), indent=2))
        return
    from rbee.cli.fleet_tables import show_models

    show_models(known)


@command.command(
    "show", cls=Verb, read_on=READ_ON, examples=[("rbee model show rbee-demo", "Show all that is known of a model.")]
)
@click.argument("name", shell_complete=complete_models)
@json_option
@click.pass_obj
def show(door: Door, name: str, as_json: bool) -> None:
    """Show all that is known of one model."""
    with Waiting() as waiting, door.client(door.started(waiting.step)) as client:
        found = _find(client, name, waiting)
    if as_json:
        import msgspec

        models = [{"hive": hive, **msgspec.to_builtins(model)} for hive, model in found]
        click.echo(msgspec.json.format(msgspec.json.encode(models), indent=2))
        return
    from rbee.cli.fleet_tables import show_model

    for hive, model in found:
        show_model(hive, model)


@command.command(
    "add",
    cls=Verb,
    read_on=READ_ON,
    examples=[
        ("rbee model add ~/models/llama-3-8b.Q4_K_M.gguf --name llama-3-8b", "List a file under a short name."),
        ("rbee model add /srv/models/big.gguf -a gaming-pc", "List a file that lies on another machine."),
    ],
)
@click.argument("path", metavar="PATH")
@click.option("--name", metavar="NAME", default="", help="The name to give it (default: the file's).")
@hive_option
@click.pass_obj
def add(door: Door, path: str, name: str, hive: str | None) -> None:
    """List a model file, so that it can be asked; the file stays where it is."""
    with Waiting() as waiting:
        address = door.started(waiting.step)
        with door.client(address) as client:
            if address.local and hive is None:
                path = _local_file(path)
            elif not path.startswith("/"):
                raise InvalidInput(f"{path!r} is no full path on the other machine", hint="a path that begins with /")
            waiting.step(f"reading {path}")
            wanted = AddModel(path=path, name=name)
            added = client.post(
                f"/v1/hives/{hive or only_hive(client, waiting.step)}/models",
                wanted,
                ModelReport,
                timeout_s=ADD_TIMEOUT_S,
            )
    click.echo(added.name)


@command.command(
    "remove", cls=Verb, read_on=READ_ON, examples=[("rbee model remove llama-3-8b", "Take a model off the list.")]
)
@click.argument("name", shell_complete=complete_models)
@hive_option
@click.pass_obj
def remove(door: Door, name: str, hive: str | None) -> None:
    """Take a model off the list; its file stays."""
    with Waiting() as waiting, door.client(door.started(waiting.step)) as client:
        found = [(where, model) for where, model in _find(client, name, waiting) if hive in (None, where)]
        if not found:
            raise NotFound(f"The hive {hive!r} has no model {name!r}", hint="rbee model list")
        if len(found) > 1:
            raise InvalidInput(f"Several machines have {name!r}", hint=" or ".join(f"-a {where}" for where, _ in found))
        removed = client.delete(f"/v1/hives/{found[0][0]}/models/{name}", ModelReport)
    click.echo(f"Removed {removed.name} from the list; the file {removed.path} is untouched.", err=True)


def _local_file(path: str) -> str:
    file = Path(path).expanduser().absolute()
    if not file.exists():
        raise NotFound(f"There is no file {file}", hint="the path of a .gguf file")
    if file.is_dir():
        raise InvalidInput(f"{file} is a folder", hint="the path of one model file in it")
    return str(file)


def _find(client: Client, name: str, waiting: Waiting) -> list[tuple[str, ModelReport]]:
    known = [(hive.hive, model) for hive in hives(client, waiting.step) for model in hive.models]
    found = [(hive, model) for hive, model in known if model.name == name]
    if not found:
        import difflib

        names = sorted({model.name for _, model in known})
        raise UnknownModel(name, difflib.get_close_matches(name, names), names)
    return found
