"""What tests of rbee and of its plugins share: real worker processes, fakes at the lowest seam, the backend contract.

A plugin proves itself by subclassing `BackendContract` with a fixture `spec` that returns a `WorkerSpec`.
"""

from rbee.testing.contract import BackendContract
from rbee.testing.fakes import FakeHive, FakeQueen
from rbee.testing.workers import RunningWorker, run_worker, started_worker

__all__ = ["BackendContract", "FakeHive", "FakeQueen", "RunningWorker", "run_worker", "started_worker"]
