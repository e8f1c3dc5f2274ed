"""What a spawn request means, and what is refused with which words."""

from __future__ import annotations

import pytest

from rbee.errors import InvalidModelFile, InvalidRequest, NotSupported, PluginProblem, RbeeError, UnknownModel
from rbee.hive.spawning import decide, engine_models, worker_name
from rbee.wire.fleet import Device, EngineReport, ModelReport, SpawnWorker

CPU = [Device(kind="cpu")]
ENGINES = [
    EngineReport(name="ctransformers", formats=["ggml"], capabilities=["completion"], devices=["cpu"]),
    EngineReport(name="echo", capabilities=["chat", "embedding"], devices=["cpu"], options={"delay_ms": "a pause"}),
    EngineReport(name="gpu-only", formats=["gguf"], capabilities=["chat"], devices=["cuda"]),
    EngineReport(name="lame", formats=["gguf"], capabilities=["chat"], devices=["cpu"], problem="it lacks libx"),
    EngineReport(name="other", formats=["gguf"], capabilities=["completion", "embedding"], devices=["cpu"]),
    EngineReport(name="xllamacpp", formats=["gguf"], capabilities=["embedding", "chat"], devices=["cpu"]),
]
MODELS = [
    ModelReport(name="Qwen3-0.6B-Q8_0", format="gguf", capabilities=["chat", "completion"]),
    ModelReport(name="old-gpt2", format="ggml", capabilities=["completion"]),
    ModelReport(name="gone", format="gguf", capabilities=["chat"], problem="/m/gone.gguf cannot be read"),
    ModelReport(name="adapter", format="gguf"),
    ModelReport(name="strange", format="safetensors", capabilities=["chat"]),
    *engine_models(ENGINES),
]

REFUSED: dict[str, tuple[dict[str, object], type[RbeeError], tuple[str, ...]]] = {
    "near names are offered": (
        {"model": "qwen3-0.6b", "backend": "xllamacpp"},
        UnknownModel,
        ("Did you mean 'Qwen3-0.6B-Q8_0'", "old-gpt2", "echo"),
    ),
    "what is installed is named": (
        {"model": "Qwen3-0.6B-Q8_0", "backend": "vllm"},
        NotSupported,
        ("'vllm'", "xllamacpp", "ctransformers"),
    ),
    "an engine's own problem is told": (
        {"model": "Qwen3-0.6B-Q8_0", "backend": "lame"},
        PluginProblem,
        ("it lacks libx",),
    ),
    "an engine that loads the format is named": (
        {"model": "Qwen3-0.6B-Q8_0", "backend": "ctransformers"},
        NotSupported,
        ("gguf", "ctransformers does not load", "xllamacpp"),
    ),
    "the other way round": (
        {"model": "old-gpt2", "backend": "xllamacpp"},
        NotSupported,
        ("ggml", "the engine ctransformers"),
    ),
    "an engine's own model is for itself": (
        {"model": "echo", "backend": "xllamacpp"},
        NotSupported,
        ("the engine echo",),
    ),
    "a file is nothing for an engine without files": (
        {"model": "old-gpt2", "backend": "echo"},
        NotSupported,
        ("ggml",),
    ),
    "no engine loads the format": ({"model": "strange", "backend": ""}, PluginProblem, ("safetensors",)),
    "a file that is gone": (
        {"model": "gone", "backend": "xllamacpp"},
        InvalidModelFile,
        ("/m/gone.gguf cannot be read",),
    ),
    "a file that is no model by itself": ({"model": "adapter", "backend": "xllamacpp"}, NotSupported, ("adapter",)),
    "a device that is not here": (
        {"model": "echo", "backend": "echo", "device": "cuda"},
        NotSupported,
        ("no device 'cuda'", "cpu"),
    ),
    "a device that the engine cannot use": (
        {"model": "Qwen3-0.6B-Q8_0", "backend": "gpu-only"},
        NotSupported,
        ("gpu-only does not run on cpu", "cuda"),
    ),
    "an option that the engine does not have": (
        {"model": "echo", "backend": "echo", "options": {"delay": "1"}},
        InvalidRequest,
        ("'delay'", "delay_ms"),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    fields, error, words = REFUSED[case]
    with pytest.raises(error) as caught:
        decide(SpawnWorker(**fields), MODELS, ENGINES, CPU)  # type: ignore[arg-type]
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_worker_can_do_what_both_its_model_and_its_engine_can() -> None:
    spawn = decide(SpawnWorker(model="Qwen3-0.6B-Q8_0", backend="other"), MODELS, ENGINES, CPU)
    assert spawn.capabilities == ["completion"]


@pytest.mark.parametrize(
    ("model", "engine"), [("Qwen3-0.6B-Q8_0", "xllamacpp"), ("old-gpt2", "ctransformers"), ("echo", "echo")]
)
def test_who_names_no_engine_gets_one_that_fits(model: str, engine: str) -> None:
    assert decide(SpawnWorker(model=model, backend=""), MODELS, ENGINES, CPU).engine.name == engine


def test_names() -> None:
    assert worker_name("", "Qwen3-0.6B.Q8_0", {}) == "qwen3-0-6b-q8-0"
    assert worker_name("", "echo", {"echo", "echo-2"}) == "echo-3"
    assert worker_name("", "日本語", {}) == "worker"
    assert worker_name("mine", "echo", {"echo"}) == "mine"
    long = worker_name("", "x" * 96, {"x" * 36})
    assert long == "x" * 36 + "-2"


@pytest.mark.parametrize("name", ["Mine", "-a", "a" * 41, "a/b", "../a", "a.b", "a b", "ä"])
def test_a_name_that_is_none(name: str) -> None:
    with pytest.raises(InvalidRequest, match="no worker name"):
        worker_name(name, "echo", {})
