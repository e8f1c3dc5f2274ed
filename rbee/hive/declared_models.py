"""The model files that `apply` placed on this machine: listed for reading, changed by the inventory only."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path

from rbee.errors import InvalidModelFile, InvalidRequest
from rbee.wire.fleet import ModelReport
from rbee.wire.settings import DeclaredModel

HINT = "rbee apply brings it"
Stamp = tuple[int, int]


class DeclaredModels:
    """Reports on the declared models; a file is read when it is new or has changed."""

    def __init__(self, models: Sequence[DeclaredModel]) -> None:
        self._models = {model.name: model for model in models}
        self._read: dict[str, tuple[Stamp, ModelReport]] = {}
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        """Return the names that are taken by the inventory."""
        return list(self._models)

    def reports(self) -> list[ModelReport]:
        """Return every declared model; `problem` says why one cannot be loaded at present."""
        return [self._report(model) for model in self._models.values()]

    def check_free(self, name: str) -> None:
        """Raises: InvalidRequest when the inventory declares a model of this name."""
        if name in self._models:
            raise InvalidRequest(
                f"The inventory declares the model {name!r} on this machine",
                hint="change its Model line, then: rbee apply",
                param="name",
            )

    def _report(self, model: DeclaredModel) -> ModelReport:
        try:
            stat = os.stat(model.path)
        except OSError as problem:
            return _unusable(model, f"{model.path} cannot be read ({problem.strerror}); {HINT}")
        stamp = (stat.st_size, stat.st_mtime_ns)
        with self._lock:
            known = self._read.get(model.name)
            if known is None or known[0] != stamp:
                known = self._read[model.name] = (stamp, _inspected(model))
        return known[1]


def _inspected(model: DeclaredModel) -> ModelReport:
    from rbee.formats import inspect
    from rbee.hive.catalog import inspected

    try:
        return inspected(model.name, Path(model.path), inspect(Path(model.path)))
    except (InvalidModelFile, OSError) as problem:
        return _unusable(model, f"{problem}; {HINT}")


def _unusable(model: DeclaredModel, problem: str) -> ModelReport:
    return ModelReport(name=model.name, path=model.path, problem=problem)
