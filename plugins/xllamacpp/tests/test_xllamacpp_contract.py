"""llama.cpp's server keeps the contract with a model of every kind that it loads."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import pytest

from rbee.testing import BackendContract
from rbee.testing.models import write_embedding_gguf, write_random_gguf, write_rerank_gguf
from rbee.wire.fleet import WorkerSpec


class TestText(BackendContract):
    """A model with real arithmetic to do: its answers take long enough to leave them."""

    needed = frozenset({"chat", "completion"})
    long_answer = {"max_tokens": 1000}

    @pytest.fixture(scope="class")
    @classmethod
    def spec(cls, tmp_path_factory: pytest.TempPathFactory) -> WorkerSpec:
        file = write_random_gguf(tmp_path_factory.mktemp("text") / "text.gguf", 27_000_000)
        return WorkerSpec(name="text", backend="xllamacpp", model="text", path=str(file), context_tokens=1024)


class TestBuiltIn(BackendContract):
    """The model that comes with rbee, whose answers end by themselves."""

    needed = frozenset({"chat", "completion"})
    # The engine's own field, which travels through the worker as it came.
    long_answer = {"max_tokens": 1900, "ignore_eos": True}

    @pytest.fixture(scope="class")
    @classmethod
    def spec(cls) -> WorkerSpec:
        path = str(resources.files("rbee") / "models" / "rbee-demo.gguf")
        return WorkerSpec(name="demo", backend="xllamacpp", model="rbee-demo", path=path, slots=16)


class TestEmbedding(BackendContract):
    """An embedding model."""

    needed = frozenset({"embedding"})

    @pytest.fixture(scope="class")
    @classmethod
    def spec(cls, tmp_path_factory: pytest.TempPathFactory) -> WorkerSpec:
        file = write_embedding_gguf(Path(tmp_path_factory.mktemp("embedding")) / "embedding.gguf")
        return WorkerSpec(name="embedding", backend="xllamacpp", model="embedding", path=str(file))


class TestRerank(BackendContract):
    """A model that ranks."""

    needed = frozenset({"rerank"})

    @pytest.fixture(scope="class")
    @classmethod
    def spec(cls, tmp_path_factory: pytest.TempPathFactory) -> WorkerSpec:
        file = write_rerank_gguf(Path(tmp_path_factory.mktemp("rank")) / "rank.gguf")
        return WorkerSpec(name="rank", backend="xllamacpp", model="rank", path=str(file))
