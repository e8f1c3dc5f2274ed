"""What writes to the standard error besides our own loggers, gunicorn and gevent, writes records as well."""

from __future__ import annotations

import logging
from typing import Any

from gevent import get_hub
from gunicorn.glogging import Logger

log = logging.getLogger("rbee.queen.greenlets")


class GunicornLog(Logger):
    """gunicorn's messages go where all others do, instead of to a handler of their own."""

    def setup(self, cfg: Any) -> None:
        super().setup(cfg)
        self.error_log.handlers.clear()
        self.error_log.propagate = True


def log_greenlets() -> None:
    """Log what ends a greenlet, which gevent would print; for this thread's event loop."""
    get_hub().print_exception = _failed  # type: ignore[assignment, method-assign]  # a subclass must be named before the first hub


def _failed(context: object, kind: Any, value: Any, trace: Any) -> None:
    log.error("%s failed", context, exc_info=(kind, value, trace))
