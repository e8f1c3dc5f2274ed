"""A declared worker: from the settings that `apply` wrote and the unit's surroundings to a `WorkerSpec`."""

from __future__ import annotations

import os
from pathlib import Path

from rbee import formats, paths
from rbee.default_engine import default_engine
from rbee.tokens import read_token
from rbee.wire.fleet import WorkerSpec
from rbee.wire.settings import WorkerSettings, read_settings, secret_path
from rbee.worker.backends import reports_by_preference


def from_settings(file: Path) -> WorkerSpec:
    """Return what the worker of this settings file runs. Raises: SetupProblem, InvalidModelFile, PluginProblem."""
    settings = read_settings(file, WorkerSettings)
    path = settings.path or _built_in(settings.model)
    return WorkerSpec(
        name=settings.name,
        backend=settings.backend or _engine(settings, path),
        model=settings.model,
        path=path,
        host=settings.host,
        port=settings.port,
        token=read_token(
            secret_path(settings.token_file),
            whose="this worker",
            hint="LoadCredential= of the unit brings it; rbee apply writes both",
        ),
        engine_socket=_engine_socket(),
        device=settings.device,
        gpus=settings.gpus,
        context_tokens=settings.context_tokens,
        slots=settings.slots,
        threads=settings.threads,
        options=settings.options,
        certificate=str(secret_path(settings.tls.certificate)) if settings.tls else "",
        key=str(secret_path(settings.tls.key)) if settings.tls else "",
    )


def _built_in(model: str) -> str:
    return str(paths.BUILT_IN_FILE) if model == paths.BUILT_IN_MODEL else ""


def _engine(settings: WorkerSettings, path: str) -> str:
    model_type = settings.options.get("model_type", "")
    format_ = formats.inspect(Path(path), model_type=model_type).format if path else ""
    return default_engine(settings.model, format_, reports_by_preference()).name


def _engine_socket() -> str:
    """Return where the engine listens: RuntimeDirectory= of the unit belongs to this worker alone (systemd.exec(5))."""
    folder = os.environ.get("RUNTIME_DIRECTORY", "").split(":")[0]
    return f"{folder}/engine.sock" if folder else ""
