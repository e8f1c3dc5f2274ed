"""What the meaning of an ssh_config depends on beside its text: who reads it, and where."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
from msgspec import Struct

EXEC_TIMEOUT_S = 10.0


class World(Struct, frozen=True, kw_only=True):
    """The reader of the files. `run` tells whether a command of `Match exec` succeeds; TimeoutError when it hangs.

    `run` None means that no command is run: such a block then applies to no host.
    """

    home: str
    user: str
    user_id: int
    machine: str
    run: Callable[[str], bool] | None


def this_machine(*, run_commands: bool = True) -> World:
    """Return the person and machine that this process runs as."""
    import os
    import pwd

    user_id = os.getuid()
    try:
        person = pwd.getpwuid(user_id)
        name, home = person.pw_name, person.pw_dir
    except KeyError:
        # In a container the account may have no entry.
        name, home = str(user_id), "/nonexistent"
    return World(
        home=os.environ.get("HOME") or home,
        user=name,
        user_id=user_id,
        machine=os.uname().nodename,
        run=_run if run_commands else None,
    )


def _run(command: str) -> bool:
    """Run a command as ssh does: by the person's shell, unheard (ssh_config(5), Match exec)."""
    import os
    import subprocess

    shell = os.environ.get("SHELL") or "/bin/sh"
    quiet = subprocess.DEVNULL
    process = subprocess.Popen([shell, "-c", command], stdin=quiet, stdout=quiet, stderr=quiet, start_new_session=True)
    try:
        return process.wait(EXEC_TIMEOUT_S) == 0
    except subprocess.TimeoutExpired:
        # What the shell started would outlive it.
        os.killpg(process.pid, 9)
        process.wait()
        raise TimeoutError from None


def remembering(world: World) -> World:
    """Return a world that runs each command once, however many hosts it is asked for."""
    run, answers = world.run, dict[str, bool]()
    if run is None:
        return world

    def once(command: str) -> bool:
        if command not in answers:
            answers[command] = run(command)
        return answers[command]

    return msgspec.structs.replace(world, run=once)
