"""The events of one job, kept so that a reader may come late, leave, and go on where it was.

The form is server-sent events (WHATWG HTML, 9.2); ids count from 1 and stay the same when the events are replayed
from the job's record.
"""

from __future__ import annotations

from collections.abc import Iterator

import gevent
import msgspec
from gevent.event import Event

from rbee.queen.client_watch import ClientWatch

MAX_BYTES = 16 * 1024 * 1024
PING = b": ping\n\n"
QUEUED, ROUTED, STARTED, DELTA, DONE, ERROR = "queued", "routed", "started", "delta", "done", "error"


class EventLog:
    """A bounded list of events. When it is full the oldest deltas go, and readers who wanted them are told."""

    def __init__(self, job_id: str) -> None:
        self.ended = False
        self._job_id = job_id
        self._events: list[bytes] = []
        self._first_id = 1
        self._size = 0
        self._changed = Event()

    def tell(self, name: str, **facts: object) -> None:
        """Add an event that holds the job's id and some facts."""
        self.add(name, msgspec.json.encode({"job_id": self._job_id, **facts}))

    def add(self, name: str, data: bytes) -> None:
        """Add an event; `data` has no line breaks. done and error are the last of a log."""
        if self.ended:
            return
        event = self._event(name, data)
        self._events.append(event)
        self._size += len(event)
        if self._size > MAX_BYTES:
            self._drop_half()
        self.ended = name in (DONE, ERROR)
        changed, self._changed = self._changed, Event()
        changed.set()

    def ending(self, name: str, **facts: object) -> bytes:
        """Return all that is kept as an event stream, as it would be with this event at its end."""
        data = msgspec.json.encode({"job_id": self._job_id, **facts})
        return self.whole() + self._event(name, data)

    def whole(self) -> bytes:
        """Return all that is kept, as an event stream."""
        return b"".join(self._events)

    def follow(self, last_id: int, client: ClientWatch, ping_s: float) -> Iterator[bytes]:
        """Yield the events after `last_id` as they come, to the end of the log or until the client leaves."""
        while not client.gone.is_set():
            changed = self._changed
            if last_id + 1 < self._first_id:
                yield b": events %d to %d are not kept any more\n\n" % (last_id + 1, self._first_id - 1)
                last_id = self._first_id - 1
            fresh = self._events[max(0, last_id + 1 - self._first_id) :]
            if fresh:
                last_id += len(fresh)
                yield b"".join(fresh)
            elif self.ended:
                return
            elif not gevent.wait([changed, client.gone], timeout=ping_s, count=1):
                yield PING

    def _event(self, name: str, data: bytes) -> bytes:
        return b"id: %d\nevent: %s\ndata: %s\n\n" % (self._first_id + len(self._events), name.encode(), data)

    def _drop_half(self) -> None:
        half = len(self._events) // 2
        self._size -= sum(map(len, self._events[:half]))
        self._first_id += half
        del self._events[:half]


def replay(stored: bytes, last_id: int) -> bytes:
    """Return those of a record's events that come after `last_id`."""
    kept = []
    for event in stored.split(b"\n\n"):
        number = event.partition(b"\n")[0].removeprefix(b"id: ")
        if number.isdigit() and int(number) > last_id:
            kept.append(event + b"\n\n")
    return b"".join(kept)


def payloads(rest: bytes, chunk: bytes) -> tuple[list[bytes], bytes]:
    """Split an engine's event stream into the data of its whole events and the rest; comments and [DONE] are left out.

    An error event is left out too: it is told in the job's own form.
    """
    *blocks, rest = (rest + chunk).replace(b"\r\n", b"\n").split(b"\n\n")
    found = []
    for block in blocks:
        data = b"".join(line[5:].strip() for line in block.split(b"\n") if line.startswith(b"data:"))
        if data and data != b"[DONE]" and not data.startswith((b'{"error"', b'{"type":"error"')):
            found.append(data)
    return found, rest
