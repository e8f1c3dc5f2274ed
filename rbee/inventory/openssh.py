"""What the ssh program itself says about a host: `ssh -G`."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from msgspec import Struct

from rbee.errors import InvalidInventory, Mistake, SetupProblem
from rbee.inventory.fleet import At, Fleet
from rbee.inventory.ssh_config import ssh_config_lines
from rbee.inventory.world import this_machine

TIMEOUT_S = 30.0
AT_ONCE = 4

Values = dict[str, list[str]]
"""What `ssh -G` prints: lower-case keywords, each with the values of its lines."""


class ConfigFile(Struct, frozen=True):
    """A file for `ssh -F` that stands for an inventory, and where each of its lines comes from."""

    path: Path
    origins: list[At | None]


@contextmanager
def config_file(fleet: Fleet) -> Iterator[ConfigFile]:
    """Yield a file for `ssh -F` that is gone afterwards; nothing is left in the inventory's folder."""
    lines = ssh_config_lines(fleet, this_machine())
    with tempfile.TemporaryDirectory(prefix="rbee-ssh-") as folder:
        path = Path(folder) / "ssh_config"
        path.write_text("".join(f"{line}\n" for line, _ in lines), errors="surrogateescape", newline="")
        yield ConfigFile(path, [origin for _, origin in lines])


def resolved(config: ConfigFile, names: Iterable[str]) -> dict[str, Values]:
    """Return what ssh would do for each name.

    Raises: InvalidInventory when ssh refuses the files; SetupProblem when it is missing.
    """
    known = list(names)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return dict(zip(known, pool.map(lambda name: _ask(config, name), known), strict=True))


def _ask(config: ConfigFile, name: str) -> Values:
    done = run_ssh(["-G", "-F", str(config.path), "--", name], TIMEOUT_S)
    if done.returncode:
        raise InvalidInventory(_refusals(config, done.stderr))
    values: Values = {}
    for line in done.stdout.splitlines():
        keyword, _, value = line.partition(" ")
        values.setdefault(keyword, []).append(value)
    return values


def _refusals(config: ConfigFile, said: str) -> list[Mistake]:
    """Return what ssh complains of, at the lines of the inventory; a person's own files are named by ssh itself."""
    found = []
    for line in said.splitlines():
        place = re.match(rf"{re.escape(str(config.path))}:? line (\d+): (.+)", line)
        origin = config.origins[int(place[1]) - 1] if place else None
        if place and origin:
            found.append(Mistake(origin.file, origin.line, f"ssh refuses this: {place[2]}", "man ssh_config"))
        elif "terminating" not in line:
            found.append(Mistake("ssh", 0, line))
    return found or [Mistake("ssh", 0, said.strip() or "it refuses the inventory and does not say why")]


def run_ssh(words: list[str], timeout_s: float, program: str = "ssh") -> subprocess.CompletedProcess[str]:
    """Run ssh or one of its programs, which never prompts. Raises: SetupProblem when it is missing or hangs."""
    try:
        return subprocess.run(
            [program, *words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
        )
    except FileNotFoundError:
        raise SetupProblem(f"The program {program} is not installed", hint="apt install openssh-client") from None
    except subprocess.TimeoutExpired:
        raise SetupProblem(f"{program} did not answer within {timeout_s:g} s: {' '.join(words)}") from None
