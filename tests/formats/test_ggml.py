"""Files from before GGUF: told apart by their layout, and refused when they lie."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from rbee.errors import InvalidModelFile
from rbee.formats import inspect

GGML, GGMF, GGJT, GGCC = 0x67676D6C, 0x67676D66, 0x67676A74, 0x67676363
WIDTH, WORDS = 32, [b"a", b"bc", b""]


def numbers(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}i", *values)


def vocabulary(*, counted: bool = False, scored: bool = False) -> bytes:
    raw = numbers(len(WORDS)) if counted else b""
    return raw + b"".join(numbers(len(word)) + word + (b"\0" * 4 if scored else b"") for word in WORDS)


def tensor(
    name: str, shape: tuple[int, ...] = (WIDTH, 3), kind: int = 0, size: int | None = None, at: int = -1
) -> bytes:
    """Encode one record; `at` is its offset where the data are aligned to 32."""
    elements = 1
    for length in shape:
        elements *= length
    head = numbers(len(shape), len(name), kind, *shape) + name.encode()
    padding = b"" if at < 0 else bytes(-(at + len(head)) % 32)
    return head + padding + bytes(4 * elements if size is None else size)


def layer(name: str, count: int) -> bytes:
    """Encode one layer of `count` tensors, the first with the shape that the token embeddings have."""
    return b"".join(tensor(f"{name}{index}") for index in range(count))


def aligned(head: bytes, *names: str, size: int | None = None, kind: int = 0) -> bytes:
    for name in names:
        head += tensor(name, at=len(head), size=size, kind=kind)
    return head


FAMILIES: dict[str, tuple[bytes, str, int, int]] = {
    "gptj": (
        numbers(GGML, 3, 64, WIDTH, 4, 1, 8, 0) + vocabulary(counted=True),
        "transformer.h.0.",
        10,
        64,
    ),
    "mpt": (
        numbers(GGML, WIDTH, 64, 4, 1, 3) + struct.pack("<ff", 8.0, 0.0) + numbers(0) + vocabulary(),
        "transformer.blocks.0.",
        6,
        64,
    ),
    "replit": (
        numbers(GGML, WIDTH, 64, 4, 1, 3, 0) + vocabulary(scored=True),
        "transformer.blocks.0.",
        6,
        64,
    ),
    "llama": (numbers(GGML, 3, WIDTH, 256, 4, 1, 8, 0) + vocabulary(), "layers.0.", 9, 2048),
    "falcon": (numbers(GGML, 3, WIDTH, 4, 1, 1, 7, 0) + vocabulary(), "transformer.h.0.", 6, 2048),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_told_by_its_layout(family: str, tmp_path: Path) -> None:
    head, name, count, context = FAMILIES[family]
    model = inspect(written(head + layer(name, count), tmp_path))
    assert (model.format, model.architecture, model.quantization) == ("ggml", family, "F32")
    assert (model.vocabulary_size, model.embedding_length, model.head_count) == (3, WIDTH, 4)
    assert model.context_tokens == context
    assert model.capabilities == ("chat", "completion")
    assert model.parameters == count * 3 * WIDTH


@pytest.mark.parametrize("version", [1, 2, 3])
def test_llama_in_ggjt(version: int, tmp_path: Path) -> None:
    head = numbers(GGJT, version, 3, WIDTH, 256, 4, 1, 8, 0) + vocabulary(scored=True)
    model = inspect(written(aligned(head, "tok_embeddings.weight", "layers.0.ffn.weight"), tmp_path))
    assert (model.architecture, model.parameters) == ("llama", 6 * WIDTH)


def test_llama_in_ggmf(tmp_path: Path) -> None:
    head = numbers(GGMF, 1, 3, WIDTH, 256, 4, 1, 8, 0) + vocabulary(scored=True)
    assert inspect(written(head + tensor("layers.0.ffn.weight"), tmp_path)).architecture == "llama"


def test_falcon_in_ggcc(tmp_path: Path) -> None:
    head = numbers(GGCC, 10, 3, WIDTH, 4, 1, 1, 7, 0, 1) + vocabulary(scored=True)
    head += numbers(1, 1) + b"b" + numbers(1) + b"c"
    model = inspect(written(aligned(head, "transformer.h.0.ln.weight"), tmp_path))
    assert (model.architecture, model.head_count_kv) == ("falcon", 1)


WHISPER_TENSORS = tensor("encoder.conv1.weight", (3, 80, WIDTH)) + tensor("decoder.blocks.0.token_embedding.weight")


def test_whisper_transcribes(tmp_path: Path) -> None:
    head = numbers(GGML, 3, 1500, WIDTH, 4, 1, 448, WIDTH, 4, 1, 80, 0) + numbers(80, 201) + bytes(4 * 80 * 201)
    model = inspect(written(head + vocabulary(counted=True) + WHISPER_TENSORS, tmp_path))
    assert (model.architecture, model.capabilities) == ("whisper", ("transcription",))


def test_gpt2_and_starcoder_cannot_be_told_apart_by_the_file(gpt2: Path) -> None:
    model = inspect(gpt2)
    assert (model.architecture, model.context_tokens, model.vocabulary_size) == ("", 256, 257)
    assert (model.block_count, model.kv_elements_per_token) == (1, 2 * 32)
    assert inspect(gpt2, model_type="gpt2").architecture == "gpt2"
    assert inspect(gpt2, model_type="gpt_bigcode").architecture == "starcoder"


def test_the_configuration_beside_the_file_names_the_family(gpt2: Path, tmp_path: Path) -> None:
    path = written(gpt2.read_bytes(), tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    assert inspect(path).architecture == "gpt2"


@pytest.mark.parametrize("text", ["", "[1]", '{"model_type": 3}', "{" * 100_000, '{"model_type": "llama"}'])
def test_a_configuration_that_does_not_help_is_passed_over(gpt2: Path, tmp_path: Path, text: str) -> None:
    path = written(gpt2.read_bytes(), tmp_path)
    (tmp_path / "config.json").write_text(text)
    assert inspect(path).architecture == ""


def test_a_family_that_the_file_is_not(gpt2: Path) -> None:
    with pytest.raises(InvalidModelFile, match="model_type is 'mpt', but the file is laid out as gpt2 or starcoder"):
        inspect(gpt2, model_type="mpt")


def test_a_token_tells_starcoder(tmp_path: Path) -> None:
    words = b"".join(numbers(len(word)) + word for word in (b"a", b"<fim_prefix>"))
    head = numbers(GGML, 2, 64, WIDTH, 4, 1, 0) + numbers(2) + words
    assert (
        inspect(written(head + tensor("model/wte", (WIDTH, 2)) + layer("model/h0/", 12), tmp_path)).architecture
        == "starcoder"
    )


GPT2 = numbers(GGML, 3, 64, WIDTH, 4, 1, 0) + vocabulary(counted=True)
NAME = "model/wte"
LIES = {
    "version 9": (numbers(GGJT, 9), "ggjt version 9 is not known"),
    "vocabulary of 2^31 - 1": (numbers(GGML, 2**31 - 1, 64, WIDTH, 4, 1, 0), "are allowed"),
    "negative width": (numbers(GGML, 3, 64, -WIDTH, 4, 1, 0), "are allowed"),
    "no heads": (numbers(GGML, 3, 64, WIDTH, 0, 1, 0), "are allowed"),
    "heads that do not divide": (numbers(GGML, 3, 64, WIDTH, 5, 1, 0) + bytes(64), "do not divide"),
    "key-value cache past 2^31": (numbers(GGML, 3, 2**20, 65536, 4, 1, 0) + bytes(64), "key-value cache"),
    "unknown file type": (numbers(GGML, 3, 64, WIDTH, 4, 1, 99) + bytes(64), "file type 99"),
    "word longer than the file": (
        numbers(GGML, 3, 64, WIDTH, 4, 1, 0, 3, 60_000) + bytes(64),
        "the file ends within token 0",
    ),
    "word of 2^32 - 1 bytes": (numbers(GGML, 3, 64, WIDTH, 4, 1, 0, 3, -1) + bytes(64), "65536 are allowed"),
    "three dimensions": (GPT2 + tensor(NAME, (WIDTH, 1, 3)), "claims 3 dimensions"),
    "2^31 dimensions": (GPT2 + numbers(-(2**31), 9, 0) + bytes(99), "dimensions"),
    "name of 2^31 - 1 bytes": (GPT2 + numbers(2, 2**31 - 1, 0) + bytes(99), "a name of 2147483647 bytes"),
    "removed tensor type": (GPT2 + tensor(NAME, kind=4), "unknown or removed type 4"),
    "integer tensor": (GPT2 + tensor(NAME, kind=18), "unknown or removed type 18"),
    "shape that overflows": (GPT2 + tensor(NAME, (2**16, 2**16), size=64), "impossible shape"),
    "shape with a zero": (GPT2 + tensor(NAME, (0, 3)), "impossible shape"),
    "tensor past the end": (GPT2 + tensor(NAME)[:-1], "the file ends within the tensor 'model/wte'"),
    "bytes after the last tensor": (GPT2 + tensor(NAME) + b"x", "a tensor's header"),
    "tensor twice": (GPT2 + tensor(NAME) + tensor(NAME), "occurs twice"),
    "no tensors": (GPT2, "the header promises 1 layers, the file has 0"),
    "other tensors": (GPT2 + tensor("blk.0.attn_q.weight"), "promises 1 layers, the file has 0"),
    "a layer too many": (GPT2 + layer("model/h0/", 12) + layer("model/h1/", 12), "promises 1 layers, the file has 2"),
    "a tensor missing": (GPT2 + layer("model/h0/", 11), "layer 0 has 11 tensors; 12 are needed"),
    "no token embeddings": (
        GPT2 + b"".join(tensor(f"model/h0/{index}", (WIDTH,)) for index in range(12)),
        r"no tensor has the shape of the token embeddings, \[32, 3\]",
    ),
    "one head": (numbers(GGML, 3, 64, WIDTH, 1, 1, 0) + bytes(64), "single attention head"),
    "file type 4": (numbers(GGML, 3, 64, WIDTH, 4, 1, 4) + bytes(64), "file type 4 is not known"),
    "old quantization": (GPT2 + layer("model/h0/", 12) + tensor(NAME, kind=2, size=3 * 18), "old quantization format"),
}


@pytest.mark.parametrize("name", LIES)
def test_a_lie_is_refused(name: str, tmp_path: Path) -> None:
    raw, message = LIES[name]
    with pytest.raises(InvalidModelFile, match=f"(?s){message}.*at byte"):
        inspect(written(raw, tmp_path), model_type="gpt2")


def test_a_lie_without_a_named_family(tmp_path: Path) -> None:
    with pytest.raises(InvalidModelFile, match=r"the file ends within the tensor 'model/wte'"):
        inspect(written(LIES["tensor past the end"][0], tmp_path))


def test_old_quantization_says_what_to_get_instead(tmp_path: Path) -> None:
    with pytest.raises(InvalidModelFile) as refused:
        inspect(written(LIES["old quantization"][0], tmp_path))
    assert "GGUF of the same model" in str(refused.value)


def written(raw: bytes, folder: Path) -> Path:
    path = folder / "model.bin"
    path.write_bytes(raw)
    return path
