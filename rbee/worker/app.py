"""The worker's HTTP routes on one page, and the path of one request."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from rbee.errors import Forbidden, MethodNotAllowed, NotFound, NotSupported, UnknownModel
from rbee.http.server import Handler, Request, Response, Routes, Server, reply
from rbee.http.tls import server_context
from rbee.lean import give_back_free_memory
from rbee.notify import Notifier
from rbee.plugin import AnsweringBackend, Backend, ServingBackend
from rbee.wire.fleet import WorkerSpec
from rbee.wire.openai import REQUESTS, ExecuteRequest, InferenceRequest, ModelCard, ModelList, decode
from rbee.worker import execute
from rbee.worker.announce import announce
from rbee.worker.pulse import Pulse
from rbee.worker.relay import ClientLeft, engine_metrics, relay
from rbee.worker.runner import Runner
from rbee.worker.tracking import Tracked

if TYPE_CHECKING:  # an answering backend brings it, a serving one saves its memory
    from rbee.worker.answers import Answers

log = logging.getLogger("rbee.worker")

Infer = Callable[[Request, InferenceRequest], Response]


class App:
    """A worker that listens, with its backend not loaded. Raises: PortInUse, SetupProblem."""

    def __init__(
        self,
        spec: WorkerSpec,
        backend: Backend,
        *,
        listener: socket.socket | None = None,
        notifier: Notifier = Notifier(),  # noqa: B008  frozen; nobody listens to it
    ) -> None:
        self.spec = spec
        self.runner = Runner(spec, backend)
        self.started_at = time.time()
        self._answer: Infer = self._relay
        self._answers: Answers | None = None
        if isinstance(backend, AnsweringBackend):
            from rbee.worker.answers import Answers

            self._answers = Answers(self.runner, backend)
            self._answer = self._answers.answer
        tls = server_context(Path(spec.certificate), Path(spec.key)) if spec.certificate else None
        self.server = Server(spec.host, spec.port, self.routes(), tls=tls, listener=listener)
        self.pulse = Pulse(self.runner, self.server, notifier)

    def routes(self) -> Routes:
        """Return the table of routes."""
        routes = _RoutesAndEngine(self._guarded(self.pass_on))
        routes.add("GET", "/health", self.health)
        routes.add("GET", "/metrics", self._guarded(self.metrics))
        routes.add("GET", "/v1/models", self._guarded(self.models))
        routes.add("POST", "/v1/worker/drain", self._guarded(self.drain))
        routes.add("POST", "/execute", self._guarded(self.execute))
        for path in REQUESTS:
            routes.add("POST", path, self._guarded(self.infer))
        return routes

    def start(self, on_end: Callable[[], object]) -> None:
        """Serve, load the model and tell the hive; `on_end` is called when the worker ends by itself."""
        self.server.start()
        self.pulse.start()
        spec = self.spec
        log.info("worker %s listens on %s:%d, loading %s", spec.name, spec.host, self.server.port, spec.model)

        def live() -> None:
            try:
                self.runner.live(on_change=self._changed)
            finally:
                on_end()

        threading.Thread(target=live, name="engine", daemon=True).start()

    def end(self, patience_s: float) -> None:
        """Let jobs finish for `patience_s`, end the others, and stop."""
        self.runner.end(patience_s)
        if self._answers is not None:
            self._answers.close()
        self.server.shutdown()
        self.server.server_close()

    def _changed(self) -> None:
        if self._answers is not None and self.runner.status == "ready":
            self._answers.prepare()
        self.pulse.changed()
        give_back_free_memory()
        self._announce()

    def _announce(self) -> None:
        """Tell the hive the state; it may be away for a while, so this is no one's wait but its own thread's."""
        if not self.spec.hive_url:
            return
        arguments = (self.spec, self.runner.announcement(self.server.port), self.runner.over)
        thread = threading.Thread(target=announce, args=arguments, name="announce", daemon=True)
        thread.start()
        if self.runner.status == "failed":
            thread.join()

    # the handlers, in the order of the routes

    def health(self, request: Request) -> Response:
        """Answer `GET /health`: 200 when ready, else 503. It needs no token, but one that is brought must be right."""
        if self.spec.token and "authorization" in request.headers:
            request.require(self.spec.token)
        response = reply(self.runner.health(), 200 if self.runner.status == "ready" else 503)
        if response.status == 503:
            response.headers["Retry-After"] = "1"
        return response

    def metrics(self, _: Request) -> Response:
        """Answer `GET /metrics`."""
        runner = self.runner
        waiting = self._answers.waiting() if self._answers else 0
        text = runner.metrics.text(up=runner.status == "ready", in_flight=runner.in_flight, waiting=waiting)
        engines = engine_metrics(runner.upstream) if runner.upstream else b""
        return Response(text.encode() + engines, content_type="text/plain; version=0.0.4; charset=utf-8")

    def models(self, _: Request) -> Response:
        """Answer `GET /v1/models`."""
        details = {
            "backend": self.spec.backend,
            "capabilities": sorted(self.runner.capabilities),
            "features": sorted(self.runner.features),
            "context_tokens": self.runner.loaded.context_tokens or 0,
            "slots": self.runner.loaded.slots,
            "status": self.runner.status,
        }
        return reply(ModelList(data=[ModelCard(id=self.spec.model, created=int(self.started_at), rbee=details)]))

    def drain(self, _: Request) -> Response:
        """Answer `POST /v1/worker/drain`: no new jobs from here on."""
        self.runner.drain()
        return reply(self.runner.health())

    def execute(self, request: Request) -> Response:
        """Answer `POST /execute` by way of the chat or completion endpoint."""
        wanted = request.json(ExecuteRequest)
        inner = execute.translate(request, wanted, self.spec.model, self.runner.capabilities)
        return execute.present(self.infer(inner), stream=wanted.stream)

    def infer(self, request: Request) -> Response:
        """Answer an inference endpoint: check, count, answer."""
        self.runner.check_ready()
        wanted = decode(request.path, request.body)
        self._check_model(wanted.model)
        self._check_abilities(wanted, request.path)
        return self._tracked(request, lambda: self._answer(request, wanted))

    def pass_on(self, request: Request) -> Response:
        """Answer a path that only the engine knows."""
        if request.method not in ("GET", "HEAD", "POST"):
            raise MethodNotAllowed(request.method, request.path, ("GET", "POST"))
        if self.runner.upstream is None:
            self.runner.check_ready()
            raise NotFound(f"There is nothing at {request.path[:200]}")
        return self._tracked(request, lambda: self._relay(request, None))

    def _relay(self, request: Request, wanted: InferenceRequest | None) -> Response:
        runner = self.runner
        assert runner.upstream is not None
        cancels = not isinstance(runner.backend, ServingBackend) or runner.backend.cancels_whole_answers
        whole = wanted is not None and not wanted.stream and not cancels
        return relay(runner.upstream, request, runner.ending_fd, whole_as_stream=whole)

    def _tracked(self, request: Request, answer: Callable[[], Response]) -> Response:
        job = Tracked(self.runner, request.path, known=request.path in REQUESTS)
        try:
            response = answer()
        except ClientLeft:
            job.finish("cancelled")
            raise ConnectionAbortedError("the client left") from None
        except BaseException as problem:
            job.finish(str(getattr(problem, "status", 500)))
            raise
        return job.follow(response)

    def _guarded(self, handler: Handler) -> Handler:
        def checked(request: Request) -> Response:
            if self.spec.token:
                request.require(self.spec.token)
            else:
                _refuse_browsers(request)
            return handler(request)

        return checked

    def _check_model(self, name: str) -> None:
        own = (self.spec.model, self.spec.name)
        if name not in own:
            raise UnknownModel(name, installed=[self.spec.model])

    def _check_abilities(self, wanted: InferenceRequest, path: str) -> None:
        if wanted.capability not in self.runner.capabilities:
            able = ", ".join(sorted(self.runner.capabilities)) or "nothing"
            raise NotSupported(f"The model {self.spec.model} does not take {path}; it does: {able}", param="model")
        missing = sorted(wanted.needs() - self.runner.features)
        if missing:
            raise NotSupported(f"The engine {self.spec.backend} cannot do {', '.join(missing)} with {self.spec.model}")


class _RoutesAndEngine(Routes):
    """Routes, with the engine's own paths behind them."""

    def __init__(self, otherwise: Handler) -> None:
        super().__init__()
        self._otherwise = otherwise

    def find(self, method: str, path: str) -> tuple[Handler, dict[str, str]]:
        try:
            return super().find(method, path)
        except NotFound:
            return self._otherwise, {}


def _refuse_browsers(request: Request) -> None:
    """Without a token, a web page must not reach this worker: not by DNS rebinding, not by a form post."""
    for name in ("host", "origin"):
        value = request.headers.get(name, "")
        host = urlsplit(value if "//" in value else f"//{value}").hostname
        if value and host not in ("127.0.0.1", "::1", "localhost"):
            raise Forbidden(f"The {name} {value[:100]!r} may not use this worker without a token", hint="--token-file")
