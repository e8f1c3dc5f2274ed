"""The way to the Redis that processes and queens share: one connection, everything in order, and never a long wait.

A greenlet sends whatever has gathered in one go and hands the replies out, so that a job waits for one round trip
however many wait with it. A server that is away, or hangs, costs those who wait at that moment one short timeout; from
then on nobody waits, until the same greenlet has reached it again.

up ──an error, or no reply in time──▶ down ──reached again, and everything caught up──▶ up
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Sequence
from importlib.resources import files
from typing import Any, NoReturn
from urllib.parse import urlsplit

import gevent
import msgspec
import redis
from gevent.event import AsyncResult, Event
from redis.backoff import NoBackoff
from redis.retry import Retry

log = logging.getLogger("rbee.queen.state")

TIMEOUT_S = 0.25
CONNECT_TIMEOUT_S = 1.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 3.0
AT_ONCE = 256

Command = tuple[str | bytes | float, ...]
Reply = Any
Exchange = Callable[[Sequence[Command]], list[Reply]]
FAILURES = (redis.RedisError, OSError, gevent.Timeout)


class StateLost(Exception):
    """The shared state cannot be reached at present; whether the last operation was taken is not known."""


class Link:
    """One process' link. `on_up` catches up with an exchange of its own before others may use the link again, `on_down`
    is told when it is lost; both run in the link's greenlet.
    """

    def __init__(
        self, url: str, password: str, process: str, *, on_up: Callable[[Exchange], None], on_down: Callable[[], None]
    ) -> None:
        self.up = False
        self.problem = "It has not been reached yet"
        self.since = time.time()
        self.script = self.epoch = self.clock = ""
        self.process = process
        self._url = url
        self._password = password
        self._on_up = on_up
        self._on_down = on_down
        self._client: Any = None
        self._waiting: list[tuple[Command, Callable[[Reply], None]]] = []
        self._wanted = Event()
        self._greenlet: gevent.Greenlet[[], NoReturn] | None = None

    @property
    def place(self) -> str:
        """Return the address as it may be shown."""
        parts = urlsplit(self._url)
        if parts.scheme == "unix":
            return self._url
        return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()

    def start(self, wait_s: float) -> None:
        """Begin to reach for the state, and wait for it a moment: who starts should begin with what is known."""
        self._greenlet = gevent.spawn(self._run)
        deadline = time.monotonic() + wait_s
        while not self.up and time.monotonic() < deadline and self.problem.startswith("It has not"):
            gevent.sleep(0.01)

    def stop(self) -> None:
        """Reach for the state no more."""
        if self._greenlet is not None:
            self._greenlet.kill()
        self._close()
        self.up = False

    def client(self, *, single: bool = False) -> Any:
        """Return a client (`redis.Redis`, which is typed in part only), with a `single` connection or one as needed."""
        return redis.Redis.from_url(
            self._url,
            password=self._password or None,
            socket_timeout=TIMEOUT_S,
            socket_connect_timeout=CONNECT_TIMEOUT_S,
            retry=Retry(NoBackoff(), 0),
            single_connection_client=single,
            protocol=2,
        )

    def command(self, operation: str, *arguments: str | float) -> Command:
        """Return the call of an operation of `shared.lua`."""
        return self._of_script(operation, self.epoch, *arguments)

    def join(self, epoch: str, token: str, lease_s: float, name: str) -> Command:
        """Return the call of the first operation: `epoch` and `token` are taken where there are none."""
        return self._of_script("join", epoch, token, lease_s, name)

    def _of_script(self, operation: str, epoch: str, *arguments: str | float) -> Command:
        # One argument: redis-py takes a microsecond and more for each.
        told = msgspec.json.encode((operation, self.clock, epoch, self.process, *arguments))
        return ("EVALSHA", self.script, 0, told)

    def call(self, command: Command) -> Reply:
        """Send a command and return its reply. Raises: StateLost."""
        result: AsyncResult[Reply] = AsyncResult()
        self.send(command, result.set)
        reply = result.get()
        if isinstance(reply, Exception):
            raise StateLost(str(reply))
        return reply

    def send(self, command: Command, done: Callable[[Reply], None] = lambda reply: None) -> None:
        """Send a command without waiting; `done` is given its reply, or a StateLost."""
        if not self.up:
            done(StateLost(self.problem))
            return
        self._waiting.append((command, done))
        self._wanted.set()

    def _run(self) -> NoReturn:
        pause_s = FIRST_PAUSE_S
        while True:
            try:
                self._reach()
                pause_s = FIRST_PAUSE_S
                self._serve()
            except FAILURES as problem:
                self._lost(problem)
            except Exception as problem:
                log.exception("the shared state")
                self._lost(problem)
            gevent.sleep(pause_s * random.uniform(0.5, 1.0))
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _reach(self) -> None:
        """Connect, load the script, and let those catch up who counted by themselves."""
        with gevent.Timeout(CONNECT_TIMEOUT_S, TimeoutError("It does not answer")):
            self._client = self.client(single=True)
            self.script = str(self._client.script_load(script_text()))
        self._on_up(self._exchange)
        self.up, self.problem, self.since = True, "", time.time()
        log.info("the shared state at %s is reached", self.place)

    def _serve(self) -> NoReturn:
        while True:
            self._wanted.wait()
            self._wanted.clear()
            while self._waiting:
                some, self._waiting = self._waiting[:AT_ONCE], self._waiting[AT_ONCE:]
                try:
                    replies = self._exchange([command for command, _ in some])
                except BaseException:
                    self._waiting = [*some, *self._waiting]
                    raise
                for (_, done), reply in zip(some, replies, strict=True):
                    done(reply)

    def _exchange(self, commands: Sequence[Command]) -> list[Reply]:
        """Send commands in one go and return their replies. Raises: those of FAILURES, for any that was refused."""
        if not commands:
            return []
        # A pipeline of the client does the same in twice the time.
        connection = self._client.connection
        with gevent.Timeout(TIMEOUT_S, TimeoutError(f"It did not answer within {TIMEOUT_S:g} s")):
            connection.send_packed_command(connection.pack_commands(commands), check_health=False)
            return [connection.read_response() for _ in commands]

    def _lost(self, problem: BaseException) -> None:
        self._close()
        was, self.up = self.up, False
        told = str(problem) or type(problem).__name__
        if was or self.problem != told:
            log.log(logging.ERROR if was else logging.WARNING, "the shared state at %s: %s", self.place, told)
        if was:
            self.since = time.time()
            self._on_down()
        self.problem = told
        waiting, self._waiting = self._waiting, []
        for _, done in waiting:
            done(StateLost(told))

    def _close(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            if client.connection is not None:
                client.connection.disconnect()
            client.close()


def script_text() -> str:
    """Return the script that counts for all."""
    return (files("rbee.queen") / "shared.lua").read_text()
