"""Proof bundles: what was asked, of what, and what came, in a folder that lets anyone run it again.

.proof_bundle/integration/RUN_ID/
    seeds.json         the seed and the temperature
    transcript.ndjson  every server-sent event with its time since the question, in seconds
    metadata.json      model, engine, device, versions, prompt, sampling
    result.txt         the answer, byte for byte
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import re
import shutil
import tempfile
from pathlib import Path

import msgspec
from msgspec import Struct

from rbee import __version__
from rbee.cli.chat import Question, Reply
from rbee.cli.door import Address
from rbee.client import Client
from rbee.errors import InvalidInput, RbeeError
from rbee.wire.fleet import HiveView

FOLDER = Path(".proof_bundle") / "integration"
RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*(\.[A-Za-z0-9_-]+)*")
MAX_RUN_ID = 100
SEED = 42
FIXED = {"cache_prompt": False}
"""llama.cpp's server may answer in other words when it takes up the state of an earlier prompt."""


class Sampling(Struct, frozen=True, kw_only=True):
    """`seeds.json`."""

    seed: int
    temperature: float


class Engine(Struct, frozen=True, kw_only=True):
    """What answered. Empty texts: the queen did not say, to this key."""

    worker: str = ""
    name: str = ""
    version: str = ""
    device: str = ""
    slots: int = 0
    context_tokens: int = 0


class ModelRef(Struct, frozen=True, kw_only=True):
    """Which model answered; `sha256` is empty for a file of another machine."""

    name: str
    path: str = ""
    size_bytes: int = 0
    sha256: str = ""
    quantization: str = ""


class Metadata(Struct, frozen=True, kw_only=True):
    """`metadata.json`."""

    run_id: str
    rbee: str
    job: str
    model: ModelRef
    engine: Engine
    prompt: str
    system: str | None = None
    max_tokens: int | None = None
    hive: str | None = None
    finish_reason: str = ""
    usage: dict[str, int] = {}


class Recorder:
    """Records one run. Raises: InvalidInput when the run id is no name for a folder."""

    def __init__(self, run_id: str) -> None:
        if len(run_id) > MAX_RUN_ID or not RUN_ID.fullmatch(run_id):
            raise InvalidInput(
                f"LLORCH_RUN_ID is {run_id[:MAX_RUN_ID]!r}, which is no run id",
                hint=f"at most {MAX_RUN_ID} of A-Z a-z 0-9 . _ -",
            )
        self._run_id = run_id
        self._transcript: list[bytes] = []

    def fix(self, question: Question) -> Question:
        """Return the question with a seed and a temperature that make it repeatable, where none was given."""
        return fixed(
            question,
            Sampling(
                seed=SEED if question.seed is None else question.seed,
                temperature=0.0 if question.temperature is None else question.temperature,
            ),
        )

    def note(self, at_s: float, data: str) -> None:
        """Keep one server-sent event."""
        try:
            event: object = msgspec.json.decode(data)
        except msgspec.DecodeError:
            event = data
        self._transcript.append(msgspec.json.encode({"at_s": round(at_s, 6), "data": event}))

    def write(self, address: Address, question: Question, reply: Reply) -> Path:
        """Leave the bundle and return its folder; an earlier one of the same run id is replaced as a whole."""
        metadata = self.metadata(address, question, reply)
        sampling = Sampling(seed=question.seed or 0, temperature=question.temperature or 0.0)
        files = {
            "seeds.json": msgspec.json.format(msgspec.json.encode(sampling), indent=2) + b"\n",
            "transcript.ndjson": b"".join(line + b"\n" for line in self._transcript),
            "metadata.json": msgspec.json.format(msgspec.json.encode(metadata), indent=2) + b"\n",
            "result.txt": reply.text.encode(),
        }
        return _replace(FOLDER, self._run_id, files)

    def metadata(self, address: Address, question: Question, reply: Reply) -> Metadata:
        """Return what was asked, and by what it was answered."""
        engine, model = _what_answered(address, reply.worker, question.model)
        return Metadata(
            run_id=self._run_id,
            rbee=__version__,
            job=reply.job,
            model=model,
            engine=engine,
            prompt=question.prompt,
            system=question.system,
            max_tokens=question.max_tokens,
            hive=question.hive,
            finish_reason=reply.finish_reason,
            usage=msgspec.to_builtins(reply.usage) if reply.usage else {},
        )


def fixed(question: Question, sampling: Sampling) -> Question:
    """Return a question asked with this sampling, and with no state of earlier prompts."""
    return dataclasses.replace(
        question, seed=sampling.seed, temperature=sampling.temperature, extra={**question.extra, **FIXED}
    )


def read(folder: Path) -> tuple[Question, Metadata, str]:
    """Return what a bundle says was asked, by what it was answered, and the answer. Raises: InvalidInput."""
    try:
        sampling = msgspec.json.decode((folder / "seeds.json").read_bytes(), type=Sampling)
        metadata = msgspec.json.decode((folder / "metadata.json").read_bytes(), type=Metadata)
        result = (folder / "result.txt").read_bytes().decode()
    except OSError as problem:
        raise InvalidInput(
            f"{problem.filename} cannot be read ({problem.strerror})",
            hint="a folder that LLORCH_RUN_ID=… rbee infer left",
        ) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as problem:
        raise InvalidInput(
            f"{folder} is no proof bundle: {problem}", hint="a new one: LLORCH_RUN_ID=… rbee infer"
        ) from None
    asked = Question(metadata.model.name, metadata.prompt, metadata.system, metadata.max_tokens, hive=metadata.hive)
    return fixed(asked, sampling), metadata, result


def _what_answered(address: Address, worker_id: str, model: str) -> tuple[Engine, ModelRef]:
    """Ask the queen about the worker `hive/name`; a key that may not see the fleet leaves it at the names."""
    hive_name, _, worker_name = worker_id.partition("/")
    with contextlib.closing(Client(address.url, token=address.token)) as client:
        try:
            hives = client.get("/v1/hives", list[HiveView])
        except RbeeError:
            hives = []
    view = next((hive for hive in hives if hive.hive == hive_name), None)
    if view is None:
        return Engine(worker=worker_id), ModelRef(name=model)
    return _engine(view, worker_id, worker_name), _model(view, model)


def _engine(view: HiveView, worker_id: str, worker_name: str) -> Engine:
    worker = next((worker for worker in view.workers if worker.name == worker_name), None)
    if worker is None:
        return Engine(worker=worker_id)
    versions = {engine.name: engine.version for engine in view.engines}
    return Engine(
        worker=worker_id,
        name=worker.backend,
        version=versions.get(worker.backend, ""),
        device=worker.device,
        slots=worker.slots,
        context_tokens=worker.context_tokens,
    )


def _model(view: HiveView, name: str) -> ModelRef:
    model = next((model for model in view.models if model.name == name), None)
    if model is None or not model.path:
        return ModelRef(name=name)
    file = Path(model.path)
    return ModelRef(
        name=name,
        path=model.path,
        size_bytes=model.size_bytes,
        sha256=_sha256(file) if file.is_file() else "",
        quantization=model.quantization,
    )


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _replace(folder: Path, name: str, files: dict[str, bytes]) -> Path:
    """Put a folder of files in place, so that a reader finds the old ones or the new ones and never a mixture."""
    folder.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(dir=folder, prefix=f".{name}."))
    try:
        fresh.chmod(0o755)
        for file, data in files.items():
            with (fresh / file).open("wb") as opened:
                opened.write(data)
                opened.flush()
                os.fsync(opened.fileno())
        if (folder / name).is_dir() and not (folder / name).is_symlink():
            old = Path(tempfile.mkdtemp(dir=folder, prefix=f".{name}."))
            os.replace(folder / name, old)
            os.replace(fresh, folder / name)
            shutil.rmtree(old)
        else:
            os.replace(fresh, folder / name)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return folder / name
