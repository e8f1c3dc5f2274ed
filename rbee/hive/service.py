"""The parts of a hive, put together."""

from __future__ import annotations

import os
import threading

import rbee
from rbee.errors import Busy, PluginProblem
from rbee.hive import observe, spawning
from rbee.hive.catalog import Catalog
from rbee.hive.engines import Engines
from rbee.hive.instance import Health
from rbee.hive.launch import Launcher
from rbee.hive.report import Reporter
from rbee.hive.settings import Settings
from rbee.hive.workers import Workers
from rbee.paths import cache_dir, runtime_dir, state_dir
from rbee.wire.fleet import HiveReport, ModelReport, SpawnWorker, WorkerReport

ENGINES_WAIT_S = 5.0


class Hive:
    """One machine's hive: what it has, what it runs, and whom it tells."""

    def __init__(self, settings: Settings, token: str, epoch: float) -> None:
        self.token = token
        self.url = ""
        """Where it listens; known once it does."""
        self._settings = settings
        self._epoch = epoch
        self._sequence = 0
        self._reporting = threading.Lock()
        self._draining = False
        logs = state_dir() / "logs"
        self.launcher = Launcher(runtime_dir() / "workers", logs, settings.worker_command)
        self.reporter = Reporter(settings.queen_url, token, self.report, lambda name: self.workers.report(name))
        self.engines = Engines(
            cache_dir() / "engines.json", logs / "engines.log", settings.worker_command, self.reporter.changed
        )
        self.catalog = Catalog(state_dir() / "catalog.json", self.reporter.changed, self._engine_names)
        self.workers = Workers(
            self.launcher,
            host=settings.host,
            dialled_host=settings.dialled_host,
            hive_url=lambda: self.url,
            load_limit_s=settings.load_limit_s,
            changed=self.reporter.changed,
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
                models=self.models(),
                workers=self.workers.reports(),
            )

    def models(self, *, wait_s: float = 0.0) -> list[ModelReport]:
        """Return the listed files, and the engines that are a model by themselves.

        Just after the start the engines may not be known yet; `wait_s` waits for them.
        """
        self.engines.wait(wait_s)
        files = self.catalog.models()
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
        self.workers.stop_all(limit_s, hurry)
        self.reporter.stop()
        self.catalog.close()

    def _engine_names(self) -> list[str]:
        self.engines.wait(ENGINES_WAIT_S)
        return [model.name for model in spawning.engine_models(self.engines.reports())]
