"""`rbee scheduler install` and `publish`: routing scripts as signed single files."""

from __future__ import annotations

import os
import re
import shutil
import sys
import urllib.error
import urllib.request
from http.client import HTTPMessage
from pathlib import Path
from typing import IO, TYPE_CHECKING
from urllib.parse import urlsplit

import click

from rbee.cli.command import Verb
from rbee.cli.door import Door
from rbee.cli.inventory_folder import chosen, inventory_option
from rbee.cli.needs import need
from rbee.cli.terminal import clean
from rbee.errors import AccessDenied, InvalidInput, InvalidScript, NotFound, Unreachable
from rbee.wire.scheduler import ReplaceScript

if TYPE_CHECKING:
    from rbee.cli.script_package import Package

READ_ON = "docs/routing.md#sharing"
API = "/v1/orchestrator/scheduler"
FETCH_TIMEOUT_S = 15.0
SOURCES = "RBEE_SCRIPTS"


@click.command(
    "install",
    cls=Verb,
    read_on=READ_ON,
    examples=[
        ("rbee scheduler install prefer-cached", "Take a script that comes with rbee."),
        ("rbee scheduler install https://example.org/eu-only.rhai", "Take a signed script, asking whose key it is."),
        ("rbee scheduler install ./eu-only.rhai --trust SHA256:…", "Take it without a question, if it has this key."),
    ],
)
@click.argument("source", metavar="NAME|URL|PATH")
@click.option("--trust", metavar="FINGERPRINT", default="", help="Trust this key, as `publish` printed it.")
@click.option("--unsigned", is_flag=True, help="Take a script that nobody signed; read it first.")
@inventory_option
@click.pass_obj
def install(door: Door, source: str, trust: str, unsigned: bool, folder: Path | None) -> None:
    """Put a shared script into force, once it is known whose it is.

    A NAME is a script that comes with rbee, or NAME.rhai in the folder or under the address in RBEE_SCRIPTS. With
    --queen URL the script goes to that queen, else into the inventory's folder; your own is kept beside it as .bak.
    """
    need("rhai", "queen")
    from rbee.cli.script_package import read
    from rbee.queen.script import compile_script

    text, ours = fetch(source)
    package = read(text, source)
    package.manifest.check()
    compile_script(text, source)
    if not ours:
        accept(package, source, trust, unsigned)
    if door.url:
        with door.client() as client:
            client.send("PUT", API, ReplaceScript(text=text)).close()
        where = door.url
    else:
        where = str(_written(chosen(folder), text))
    name = f"{package.manifest.name} {package.manifest.version}"
    click.echo(f"Installed {name} as the routing script of {where}.", err=True)


@click.command(
    "publish",
    cls=Verb,
    read_on=READ_ON,
    examples=[
        ("rbee scheduler publish mine.rhai --name eu-only --version 1.0", "Write eu-only.rhai, signed with your key."),
    ],
)
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--name", help="Its name (default: that of its manifest).")
@click.option("--version", help="Its version (default: that of its manifest).")
@click.option("--requires", help="What it needs, as in rbee>=0.1.")
@click.option("--to", type=click.Path(path_type=Path), default=Path(), help="The folder to write to (default: here).")
@click.option("--key", type=click.Path(path_type=Path), help="Your signing key (default: made once, and kept).")
def publish(
    file: Path, name: str | None, version: str | None, requires: str | None, to: Path, key: Path | None
) -> None:
    """Sign a script and write it as one file, for others to install."""
    need("rhai", "queen")
    from rbee.cli import script_package
    from rbee.paths import config_dir
    from rbee.queen.script import read_script

    text = read_script(file).text
    given = {"name": name, "version": version, "requires": requires}
    first = text.partition("\n")[0]
    has = script_package.pairs(first) if first.startswith(script_package.MANIFEST) else {}
    pairs = {**has, **{key: value for key, value in given.items() if value is not None}}
    if not {"name", "version"} <= pairs.keys():
        raise InvalidInput(f"{file} has no manifest yet", hint="--name NAME --version 1.0")
    manifest = script_package.manifest_of(pairs)
    secret = script_package.signing_key(key or config_dir() / "script-signing.key")
    signed = script_package.sign(text, manifest, secret)
    script_package.read(signed, str(file))
    target = to / f"{manifest.name}.rhai"
    target.write_text(signed, "utf-8")
    click.echo(f"Wrote {target}, signed with {script_package.public_fingerprint(secret)}.")
    click.echo("Tell that fingerprint to those who install it, on another way than the file.", err=True)


def fetch(source: str) -> tuple[str, bool]:
    """Return a script's text, and whether it is rbee's own. Raises: NotFound, InvalidInput, Unreachable."""
    if "://" in source:
        return _download(source), False
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,63}", source):
        return _text(_file(Path(source)), source), False
    if source in own():
        return own()[source].read_text("utf-8"), True
    place = os.environ.get(SOURCES, "")
    if "://" in place:
        return _download(f"{place.rstrip('/')}/{source}.rhai"), False
    path = Path(place) / f"{source}.rhai"
    if place and path.is_file():
        return _text(_file(path), str(path)), False
    hint = f"one of {', '.join(own())}, an address, a path, or {SOURCES}"
    raise NotFound(f"There is no script {source!r}", hint=hint)


def own() -> dict[str, Path]:
    """Return the scripts that come with rbee, by name."""
    import rbee.queen

    folder = Path(rbee.queen.__file__).parent / "scripts"
    return {path.stem: path for path in sorted(folder.glob("*.rhai"))}


def accept(package: Package, source: str, trust: str, unsigned: bool) -> None:
    """Take a script whose key is trusted, or ask. Raises: AccessDenied, InvalidScript."""
    from rbee.cli.script_package import read_trusted, write_trusted
    from rbee.paths import config_dir

    path = config_dir() / "script-keys.json"
    trusted, name, key = read_trusted(path), package.manifest.name, package.fingerprint
    if before := trusted.changed(package):
        now = f"signed with {key}" if key else "unsigned"
        raise AccessDenied(
            f"{source}: {name} was signed with {before} before, and is {now}",
            hint=f"ask its author; to begin anew, remove {name} from {path}",
        )
    if not key:
        if not unsigned:
            raise InvalidScript(f"{source} is not signed", hint="read it, then: --unsigned")
        return
    if key not in trusted.keys and key != trust:
        _ask(name, key)
    trusted.trust(package)
    write_trusted(path, trusted)


def _ask(name: str, key: str) -> None:
    click.echo(f"{name} is signed with a key that is not known here:\n  {key}", err=True)
    if not sys.stdin.isatty():
        raise AccessDenied("Nobody is here to say whether this key is right", hint=f"--trust {key}")
    if not click.confirm("Is it the fingerprint that its author told you?", err=True):
        raise AccessDenied("The key was not trusted; nothing was installed")


def _written(folder: Path, text: str) -> Path:
    """Put a script into an inventory's folder; the one that lay there is kept."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "scheduler.rhai"
    if path.exists():
        shutil.copy2(path, path.with_suffix(".rhai.bak"))
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(text, "utf-8")
    beside.replace(path)
    return path


class _SameHost(urllib.request.HTTPRedirectHandler):
    """Follows no redirect to another host or to plain HTTP: the person chose whom to ask."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> urllib.request.Request | None:
        if urlsplit(newurl)[:2] != urlsplit(req.full_url)[:2]:
            raise InvalidInput(
                f"{req.full_url} leads to {newurl}, on another host", hint="that address, if it is right"
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _download(url: str) -> str:
    from rbee.cli.script_package import MAX_BYTES

    parts = urlsplit(url)
    if parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in ("localhost", "127.0.0.1", "::1")):
        raise InvalidInput(f"{url!r} is no https address")
    try:
        with urllib.request.build_opener(_SameHost).open(url, timeout=FETCH_TIMEOUT_S) as answer:
            data: bytes = answer.read(MAX_BYTES + 1)
    except urllib.error.HTTPError as problem:
        problem.close()
        raise NotFound(f"{url} answers {problem.code} {problem.reason}") from None
    except OSError as problem:
        raise Unreachable(f"{url} cannot be fetched ({clean(str(problem))})") from None
    return _text(data, url)


def _file(path: Path) -> bytes:
    from rbee.cli.script_package import MAX_BYTES

    try:
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except OSError as problem:
        raise NotFound(f"{path} cannot be read ({problem.strerror})") from None


def _text(data: bytes, where: str) -> str:
    from rbee.cli.script_package import MAX_BYTES

    if len(data) > MAX_BYTES:
        raise InvalidScript(f"{where} is larger than {MAX_BYTES} bytes")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise InvalidScript(f"{where} is not UTF-8 text") from None
