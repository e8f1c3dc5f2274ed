"""Files damaged at random: inspect returns or raises InvalidModelFile, soon, and in little memory."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from formats_draft import read_draft
from formats_mutate import mutate

from rbee.errors import InvalidModelFile
from rbee.formats import inspect

MEMORY_BYTES = 50 * 1024 * 1024
MUTATIONS = 1000


@pytest.fixture(autouse=True)
def little_memory() -> Iterator[None]:
    tracemalloc.start()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < MEMORY_BYTES


def accepts(path: Path) -> bool:
    """Return whether a file is accepted; any exception but InvalidModelFile fails the test."""
    try:
        inspect(path)
    except InvalidModelFile:
        return False
    return True


def test_a_gguf_cut_short_is_refused_wherever_it_is_cut(llama: Path, tmp_path: Path) -> None:
    raw, random = llama.read_bytes(), Random(1)
    cuts = {*read_draft(llama).boundaries(), *(random.randrange(len(raw)) for _ in range(200)), len(raw) - 1}
    path = tmp_path / "cut.gguf"
    for length in sorted(cuts):
        path.write_bytes(raw[:length])
        assert not accepts(path), length


def test_a_ggml_cut_short_is_refused_wherever_it_is_cut(gpt2: Path, tmp_path: Path) -> None:
    raw, random = gpt2.read_bytes(), Random(2)
    path = tmp_path / "cut.bin"
    for length in sorted({*range(0, 200, 3), *(random.randrange(len(raw)) for _ in range(200)), len(raw) - 1}):
        path.write_bytes(raw[:length])
        # One that ends between two records is a whole file of fewer tensors; no cut here hits such a place.
        assert not accepts(path), length


def test_mutations_of_a_gguf(llama: Path, embedder: Path, reranker: Path, tmp_path: Path) -> None:
    random, path, accepted = Random(3), tmp_path / "mutated.gguf", 0
    for _ in range(MUTATIONS):
        path.write_bytes(mutate(read_draft(random.choice((llama, embedder, reranker))), random)[0])
        accepted += accepts(path)
    assert 0 < accepted < MUTATIONS


def test_mutations_of_a_ggml(gpt2: Path, tmp_path: Path) -> None:
    good, random, path, accepted = gpt2.read_bytes(), Random(4), tmp_path / "mutated.bin", 0
    for _ in range(MUTATIONS):
        raw = bytearray(good)
        for _ in range(random.randrange(1, 6)):
            raw[random.choice((random.randrange(64), random.randrange(len(raw))))] = random.randrange(256)
        path.write_bytes(raw)
        accepted += accepts(path)
    assert 0 < accepted < MUTATIONS


@pytest.mark.parametrize("magic", [b"", b"GGUF\3\0\0\0", b"lmgg", b"tjgg\3\0\0\0", b"ccgg\x0a\0\0\0"])
def test_random_bytes(magic: bytes, tmp_path: Path) -> None:
    random, path = Random(5), tmp_path / "random.gguf"
    for _ in range(200):
        path.write_bytes(magic + random.randbytes(random.randrange(1, 4096)))
        assert not accepts(path)


def test_a_file_that_shrinks_while_it_is_read(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "shrinking.gguf"
    path.write_bytes(llama.read_bytes())
    monkeypatch.setattr("rbee.formats.reading.WINDOW_BYTES", 512)

    from rbee.formats import gguf

    def shrink(*arguments: object) -> object:
        path.write_bytes(llama.read_bytes()[:1000])
        return alignment(*arguments)  # type: ignore[arg-type]

    alignment = gguf._alignment
    monkeypatch.setattr(gguf, "_alignment", shrink)
    with pytest.raises(InvalidModelFile, match="became shorter while"):
        inspect(path)
