"""Good model files, made once a run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from formats_draft import Draft, read_draft

from rbee.testing.models import write_embedding_gguf, write_gpt2_ggml, write_llama_gguf, write_rerank_gguf


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama_gguf(tmp_path_factory.mktemp("llama") / "tiny-llama.gguf")


@pytest.fixture(scope="session")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_embedding_gguf(tmp_path_factory.mktemp("bert") / "tiny-embedder.gguf")


@pytest.fixture(scope="session")
def reranker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rerank_gguf(tmp_path_factory.mktemp("bert") / "tiny-reranker.gguf")


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gpt2_ggml(tmp_path_factory.mktemp("gpt2") / "tiny-gpt2.bin")


@pytest.fixture
def draft(llama: Path) -> Draft:
    """The tiny Llama in pieces, free to change."""
    return read_draft(llama)
