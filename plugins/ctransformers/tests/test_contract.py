"""The conformance tests of every backend, in a real worker process."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest

from rbee.testing import BackendContract
from rbee.testing.models import write_gpt2_ggml
from rbee.wire.fleet import WorkerSpec


class TestCtransformers(BackendContract):
    # Token 256 ends a text; without it the tiny model writes until its context is full.
    long_answer: ClassVar[dict[str, Any]] = {"max_tokens": 100_000, "logit_bias": {"256": -100}}

    @pytest.fixture(scope="class")
    @classmethod
    def spec(cls, tmp_path_factory: pytest.TempPathFactory) -> WorkerSpec:
        """A GPT-2 large enough that a whole context takes a while to write."""
        path: Path = tmp_path_factory.mktemp("models") / "tiny.bin"
        write_gpt2_ggml(path, context=1024, width=64, layers=4)
        return WorkerSpec(
            name="ctransformers-1",
            backend="ctransformers",
            model="tiny-gpt2",
            path=str(path),
            options={"model_type": "gpt2"},
        )
