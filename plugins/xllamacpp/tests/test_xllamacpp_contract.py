"""llama.cpp's server keeps the contract with the built-in model."""

from __future__ import annotations

from importlib import resources

import pytest

from rbee.testing import BackendContract
from rbee.wire.fleet import WorkerSpec


class TestXllamacpp(BackendContract):
    """The built-in model chats and completes."""

    needed = frozenset({"chat", "completion"})
    # The engine's own field: the demo model's answers are too short to leave them.
    long_answer = {"max_tokens": 1900, "ignore_eos": True}

    @pytest.fixture(scope="class")
    @classmethod
    def spec(cls) -> WorkerSpec:
        path = str(resources.files("rbee") / "models" / "rbee-demo.gguf")
        return WorkerSpec(name="demo", backend="xllamacpp", model="rbee-demo", path=path)
