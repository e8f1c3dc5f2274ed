"""Loading: options, files that are no models, silence on stderr."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from llama_bench import DEMO, Bench, open_bench

from rbee_llama_cpp_python import LlamaCppPython
from rbee_llama_cpp_python.settings import OPTIONS


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a new process, where the engine is imported for the first time."""
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment, check=False
    )


def test_the_backend_is_found_by_its_name() -> None:
    (entry,) = entry_points(group="rbee.backends", name="llama-cpp-python")
    assert entry.load() is LlamaCppPython
    assert LlamaCppPython.check() is None
    assert LlamaCppPython.version()


def test_importing_the_plugin_does_not_import_the_engine() -> None:
    done = run_python("import rbee_llama_cpp_python, sys; print('llama_cpp' in sys.modules, 'numpy' in sys.modules)")
    assert done.stdout.split() == ["False", "False"]


def test_an_engine_that_cannot_be_imported_says_why() -> None:
    code = "from rbee_llama_cpp_python import LlamaCppPython; print(LlamaCppPython.check())"
    done = run_python(code, LLAMA_CPP_LIB_PATH="/nowhere")
    assert "cannot be imported" in done.stdout
    assert "library" in done.stdout
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"options": {"n_batch": "many"}}, "n_batch"),
        ({"options": {"n_batch": "0"}}, "n_batch"),
        ({"options": {"prompt_chunk": "-1"}}, "prompt_chunk"),
        ({"options": {"cache_prompt": "maybe"}}, "cache_prompt"),
        ({"options": {"type_k": "q3"}}, "type_k"),
        ({"options": {"pooling": "sum"}}, "pooling"),
        ({"options": {"tensor_split": "1,1"}}, "tensor_split"),
        ({"options": {"no_such": "1"}}, "no_such.*Known"),
        ({"slots": 257}, "slots"),
        ({"path": Path("/nowhere/model.gguf")}, "/nowhere/model.gguf"),
    ],
)
def test_a_bad_setting_is_refused_by_name(changes: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        open_bench(**changes)


def test_a_gpu_on_a_build_without_one_is_refused() -> None:
    import llama_cpp

    if llama_cpp.llama_supports_gpu_offload():
        pytest.skip("this llama-cpp-python is built for a GPU")
    with pytest.raises(RuntimeError, match="CMAKE_ARGS"):
        open_bench(gpus=(0,), device="cuda")


@pytest.mark.parametrize("content", [b"", b"no model", b"GGUF\x03\x00\x00\x00", DEMO.read_bytes()[:5000]])
def test_a_file_that_is_no_model_is_refused_in_llama_cpp_s_words(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(RuntimeError, match=r"bad\.gguf: (?!llama.cpp gave no reason)"):
        open_bench(path=path)


def test_the_engine_is_silent_on_stderr() -> None:
    code = f"""
from pathlib import Path
from rbee.plugin import ModelSpec, Sampling
from rbee_llama_cpp_python import LlamaCppPython
from rbee_llama_cpp_python.settings import OPTIONS
backend = LlamaCppPython()
backend.load(ModelSpec("demo", Path({str(DEMO)!r}), slots=2), lambda part: None)
print(len(list(backend.generate([5, 6], Sampling(max_tokens=3), lambda: False))))
"""
    done = run_python(code)
    assert done.stderr == ""
    assert done.stdout.strip() in "0123"
    assert done.returncode == 0, "a process that ends without close() must end cleanly too"


def test_progress_is_reported(tmp_path: Path) -> None:
    from rbee.plugin import ModelSpec

    seen: list[float] = []
    backend = LlamaCppPython()
    backend.load(ModelSpec("demo", DEMO, slots=1), seen.append)
    backend.close()
    assert seen
    assert seen == sorted(seen)
    assert seen[-1] == 1.0


def test_a_context_never_exceeds_what_the_model_was_trained_for(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(context_tokens=1_000_000, slots=1)
    assert bench.loaded.context_tokens == bench.backend._loaded().trained_context_tokens


def test_a_quantized_cache_works(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(options={"type_k": "q8_0", "type_v": "q8_0", "flash_attn": "on"})
    assert bench.ask("Hello").ids


def test_closing_twice_and_after_a_failed_load_is_harmless() -> None:
    backend = LlamaCppPython()
    backend.close()
    bench = open_bench(slots=1)
    bench.backend.close()
    bench.backend.close()


def test_the_readme_explains_every_option() -> None:
    readme = Path(__file__).parent.with_name("README.md").read_text()
    assert [option for option in OPTIONS if f"`{option}`" not in readme] == []
