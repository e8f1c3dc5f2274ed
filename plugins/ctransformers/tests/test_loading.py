"""Loading: the family, options, the library, and texts of any size."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from ctransformers_bench import Bench

from rbee import formats
from rbee_ctransformers import Ctransformers, native
from rbee_ctransformers.settings import OPTIONS, best_library
from rbee_ctransformers.text import MAX_PART_BYTES, parts


def test_the_backend_is_found_by_its_name() -> None:
    (entry,) = entry_points(group="rbee.backends", name="ctransformers")
    assert entry.load() is Ctransformers
    assert Ctransformers.check() is None
    assert Ctransformers.version()


def test_importing_the_plugin_does_not_import_the_engine() -> None:
    code = "import rbee_ctransformers, sys; print('ctransformers' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_a_library_that_does_not_load_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_name: str | None) -> None:
        raise OSError("Precompiled binaries are not available\n for the current platform")

    monkeypatch.setattr(native, "load_library", refuse)
    assert Ctransformers.check() == (
        "ctransformers cannot be loaded: Precompiled binaries are not available for the current platform"
    )


@pytest.mark.parametrize(
    ("flags", "library"), [("fpu avx avx2 f16c", "avx2"), ("fpu avx f16c", "avx"), ("fpu avx", None), ("", None)]
)
def test_the_library_follows_the_processor(flags: str, library: str | None) -> None:
    assert best_library(f"processor\t: 0\nflags\t\t: {flags}\n") == library


def test_the_family_comes_from_a_config_beside_the_file(
    make_bench: Callable[..., Bench], model_file: Path, tmp_path: Path
) -> None:
    path = tmp_path / "model.bin"
    shutil.copy(model_file, path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    assert make_bench(path=path, options={}).ask("hello").ids


@pytest.mark.parametrize("config", [None, "{", "[]", '{"model_type": "bert"}', '{"model_type": 5}'])
def test_an_unknown_family_is_asked_for_with_all_names(
    make_bench: Callable[..., Bench], model_file: Path, tmp_path: Path, config: str | None
) -> None:
    path = tmp_path / "model.bin"
    shutil.copy(model_file, path)
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match=r"model\.bin.*model_type.*gpt2.*starcoder"):
        make_bench(path=path, options={})


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"options": {"model_type": "gguf"}}, "model_type"),
        ({"options": {"model_type": "gpt2", "lib": "/tmp/evil.so"}}, "lib"),
        ({"options": {"model_type": "gpt2", "batch_size": "0"}}, "batch_size"),
        ({"options": {"model_type": "gpt2", "batch_size": "9" * 5000}}, "batch_size"),
        ({"options": {"model_type": "gpt2", "wings": "2"}}, "wings.*Known"),
        ({"gpus": (0,)}, "CPU only"),
        ({"path": Path("/nowhere/model.bin")}, "/nowhere/model.bin"),
    ],
)
def test_a_bad_setting_is_refused_by_name(
    make_bench: Callable[..., Bench], changes: dict[str, object], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        make_bench(**changes)


def test_a_gguf_file_is_refused_with_the_engines_that_load_it(make_bench: Callable[..., Bench], tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF\x03\x00\x00\x00" * 10)
    with pytest.raises(ValueError, match="xllamacpp"):
        make_bench(path=path)


def test_a_file_that_the_engine_refuses_is_named(
    make_bench: Callable[..., Bench], model_file: Path, tmp_path: Path
) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(model_file.read_bytes().replace(b"model/ln_f/b", b"model/ln_f/x"))
    with pytest.raises(RuntimeError, match=r"model\.bin as gpt2"):
        make_bench(path=path)


@pytest.mark.parametrize("content", [b"", b"lmgg", b"no model at all " * 10])
def test_a_file_that_would_end_the_process_is_refused(
    make_bench: Callable[..., Bench], tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.bin is no model file"):
        make_bench(path=path)


def test_a_family_that_the_file_cannot_be_of_is_refused(make_bench: Callable[..., Bench]) -> None:
    with pytest.raises(ValueError, match="no model of the family gptj"):
        make_bench(options={"model_type": "gptj"})


def test_the_worker_s_inspection_takes_the_file(model_file: Path) -> None:
    assert formats.inspect(model_file, model_type="gpt2").format == "ggml"


def test_the_batch_size_does_not_change_a_text(make_bench: Callable[..., Bench]) -> None:
    prompt = "the bee and the queen " * 4
    assert make_bench(options={"model_type": "gpt2", "batch_size": "1"}).ask(prompt) == make_bench().ask(prompt)


def test_texts_survive_tokenizing(bench: Bench) -> None:
    model = bench.backend._loaded()
    for text in ("hello the queen", "日本語 e\u0301 🙂", "a" * 10_000, "hello  the\n\n queen\t" * 2000, "🙂" * 3000):
        assert b"".join(model.piece(token) for token in bench.tokens(text)) == text.encode()
    assert bench.tokens("hello\0 the") == bench.tokens("hello the")


def test_a_cut_text_is_cut_where_words_begin(bench: Bench) -> None:
    text = "hello the  queen\n bee 12 the," * 1000
    assert bench.tokens(text) == bench.tokens("hello the  queen\n bee 12 the,") * 1000


@pytest.mark.parametrize("text", [b"", b"word " * 3000, b"x" * 9000, b" " * 9000, "é".encode() * 5000, b"a\0b" * 2000])
def test_parts_are_short_and_whole(text: bytes) -> None:
    cut = list(parts(text))
    assert b"".join(cut) == text.replace(b"\0", b"")
    assert all(len(part) <= MAX_PART_BYTES for part in cut)
    for part in cut:
        part.decode()


def test_the_readme_explains_every_option() -> None:
    readme = Path(__file__).parent.with_name("README.md").read_text()
    assert [option for option in OPTIONS if f"`{option}`" not in readme] == []
