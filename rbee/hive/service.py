"""The parts of a hive, put together."""

from __future__ import annotations

import os
import ssl
import threading
import time
from collections.abc import Callable

import rbee
from rbee.errors import Busy, PluginProblem
from rbee.hive import observe, spawning
from rbee.hive.catalog import Catalog
from rbee.hive.declared import Declared, Place
from rbee.hive.declared_models import DeclaredModels
from rbee.hive.engines import Engines
from rbee.hive.instance import Health
from rbee.hive.launch import Launcher
from rbee.hive.report import COALESCE_S, Reporter
from rbee.hive.settings import Settings
from rbee.hive.watch import After, Changes
from rbee.hive.workers import Workers
from rbee.paths import cache_dir, runtime_dir, state_dir
from rbee.wire.fleet import AddModel, HiveReport, ModelReport, SpawnWorker, WorkerReport

ENGINES_WAIT_S = 5.0


class Hive:
    """One machine's hive: what it has, what it runs, and whom it tells."""

    def __init__(self, settings: Settings, token: str, epoch: float, authority: ssl.SSLContext | None = None) -> None:
        self.token = token
        self.authority = authority
        """Whom this hive trusts when it dials its workers."""
        self.url = self.near_url = ""
        """Where others, and where this machine's own programs, reach it; known once it listens."""
        self._settings = settings
        self._epoch = epoch
        self._sequence = 0
        self._reporting = threading.Lock()
        self._draining = False
        logs = state_dir() / "logs"
        self.launcher = Launcher(runtime_dir() / "workers", logs, settings.worker_command)
        self.changes = Changes()
        self.reporter = Reporter(settings.queen_url, token, self.report, lambda name: self.workers.report(name))
        self.engines = Engines(
            cache_dir() / "engines.json", logs / "engines.log", settings.worker_command, self._changed
        )
        self.catalog = Catalog(state_dir() / "catalog.json", self._changed, self._engine_names)
        self.declared_models = DeclaredModels(settings.models)
        self.declared = Declared(_place(settings, authority), self._changed)
        self.workers = Workers(
            self.launcher,
            settings=settings,
            authority=authority,
            hive_url=lambda: self.near_url,
            declared=self.declared,
            changed=self._changed,
            became_ready=self.reporter.became_ready,
        )

    def health(self) -> Health:
        """Return the body of `/health`."""
        status = "draining" if self._draining else "ok"
        return Health(status=status, hive=self._settings.name, version=rbee.__version__, pid=os.getpid())

    def report(self) -> HiveReport:
        """Return everything that the queen may know, as it is at this moment."""
        with self._reporting:  # a report with a higher number must never hold an older state
            self._sequence += 1
            return HiveReport(
                hive=self._settings.name,
                url=self.url,
                version=rbee.__version__,
                epoch=self._epoch,
                sequence=self._sequence,
                pid=os.getpid(),
                devices=observe.devices(),
                engines=self.engines.reports(),
                models=(models := self.models()),
                workers=self.declared.reports(models) + self.workers.reports(),
            )

    def watch(self, after: After | None, wait_s: float, gone: Callable[[], bool]) -> HiveReport:
        """Return a report as soon as there is more to tell than `after`, at the latest after `wait_s`. Raises: Busy."""
        if after is not None and after.epoch == self._epoch:
            self.changes.wait(after.sequence, wait_s, gone)
            time.sleep(COALESCE_S)
        return self.report()

    def worker_reports(self) -> list[WorkerReport]:
        """Return every worker of this machine, the declared ones first."""
        return self.declared.reports(self.models()) + self.workers.reports()

    def probe(self) -> None:
        """Return when the locks of the tables of workers can be had."""
        self.declared.reports()
        self.workers.reports()

    def stop_worker(self, name: str, wait_s: float) -> WorkerReport:
        """Stop a worker that this hive started. Raises: InvalidRequest, NotFound."""
        self.declared.refuse_stop(name)
        return self.workers.stop(name, wait_s)

    def log_tail(self, name: str, lines: int) -> str:
        """Return the end of a worker's log. Raises: NotFound, SetupProblem, TimedOut."""
        source = self.declared if name in self.declared.names() else self.workers
        return source.log_tail(name, lines)

    def add_model(self, request: AddModel) -> ModelReport:
        """List a file. Raises: what `Catalog.add` raises."""
        self.declared_models.check_free(request.name)
        return self.catalog.add(request)

    def remove_model(self, name: str) -> ModelReport:
        """Take a model off the list. Raises: what `Catalog.remove` raises."""
        self.declared_models.check_free(name)
        return self.catalog.remove(name)

    def models(self, *, wait_s: float = 0.0) -> list[ModelReport]:
        """Return the listed files, and the engines that are a model by themselves.

        Just after the start the engines may not be known yet; `wait_s` waits for them.
        """
        self.engines.wait(wait_s)
        declared = self.declared_models.reports()
        names = {model.name for model in declared}
        files = declared + [model for model in self.catalog.models() if model.name not in names]
        names = {model.name for model in files}
        return files + [model for model in spawning.engine_models(self.engines.reports()) if model.name not in names]

    def spawn(self, request: SpawnWorker) -> WorkerReport:
        """Start a worker. Raises: what `spawning.decide` and `Workers.spawn` raise."""
        if not self.engines.wait(ENGINES_WAIT_S):
            raise Busy("This hive still finds out which engines are installed", retry_after_s=1)
        if request.backend not in {engine.name for engine in self.engines.reports()}:
            self.engines.refresh()  # it may have been installed since
        if self.engines.problem:
            raise PluginProblem(self.engines.problem, hint="rbee plugin list")
        spawn = spawning.decide(request, self.models(), self.engines.reports(), observe.devices())
        return self.workers.spawn(spawn)

    def drain(self, limit_s: float, hurry: threading.Event) -> None:
        """End every worker within `limit_s`, telling the queen."""
        self._draining = True
        self.engines.stop()
        self.declared.stop()
        self.workers.stop_all(limit_s, hurry)
        self.reporter.stop()
        self.changes.close()
        self.catalog.close()

    def _changed(self) -> None:
        self.reporter.changed()
        self.changes.changed(self._sequence)

    def _engine_names(self) -> list[str]:
        self.engines.wait(ENGINES_WAIT_S)
        engines = spawning.engine_models(self.engines.reports())
        return [model.name for model in engines] + self.declared_models.names()


def _place(settings: Settings, authority: ssl.SSLContext | None) -> Place | None:
    if settings.workers_folder is None:
        return None
    return Place(settings.workers_folder, settings.worker_tokens, settings.dialled_host, authority)
