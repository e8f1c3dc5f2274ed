"""Embeddings: of a chat model by option, and of a model whose file asks for them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
from llama_bench import DEMO, PROMPTS, Answer, Bench

from rbee.plugin import Capability


def with_metadata(target: Path, **numbers: int) -> Path:
    """Copy the built-in model with more metadata of its architecture."""
    reader = gguf.GGUFReader(DEMO)
    writer = gguf.GGUFWriter(target, "llama")
    for key, value in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture":
            continue
        kind, *inner = value.types
        writer.add_key_value(key, value.contents(), kind, inner[-1] if inner else None)
    for name, number in numbers.items():
        writer.add_uint32(f"llama.{name}", number)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def test_pooling_gives_a_chat_model_embeddings_beside_its_text(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(options={"pooling": "mean"}, slots=4)
    assert bench.loaded.capabilities == {Capability.CHAT, Capability.COMPLETION, Capability.EMBEDDING}
    inputs = [bench.tokens(text) for text in PROMPTS]
    expected = bench.ask("Hello")
    alone = [bench.backend.embed([one])[0] for one in inputs]
    together = bench.backend.embed(inputs)
    assert bench.ask("Hello") == expected
    assert all(math.hypot(*vector) == pytest.approx(1) for vector in together)
    for one, other in zip(alone, together, strict=True):
        assert one == pytest.approx(other, abs=1e-3)
    assert together[0] != pytest.approx(together[1], abs=1e-3)


def test_embeddings_and_text_run_beside_each_other(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(options={"pooling": "last"}, slots=4)
    alone = bench.ask(PROMPTS[0])
    vector = bench.backend.embed([bench.tokens(PROMPTS[1])])[0]

    def embed() -> Answer | list[float]:
        return bench.backend.embed([bench.tokens(PROMPTS[1])])[0]

    def ask() -> Answer | list[float]:
        return bench.ask(PROMPTS[0])

    results = bench.ask_together([ask, embed] * 4)
    assert results[0::2] == [alone] * 4
    assert all(result == pytest.approx(vector) for result in results[1::2])


def test_an_embedding_model_says_so_and_generates_nothing(make_bench: Callable[..., Bench], tmp_path: Path) -> None:
    bench = make_bench(path=with_metadata(tmp_path / "embedding.gguf", pooling_type=1))
    assert bench.loaded.capabilities == {Capability.EMBEDDING}
    assert len(bench.backend.embed([bench.tokens("Hello")])[0]) > 1
    with pytest.raises(NotImplementedError):
        bench.ask("Hello")


def test_a_rerank_model_is_refused_with_an_alternative(make_bench: Callable[..., Bench], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="xllamacpp"):
        make_bench(path=with_metadata(tmp_path / "rerank.gguf", pooling_type=4))


def test_a_chat_model_without_pooling_refuses_to_embed(bench: Bench) -> None:
    with pytest.raises(NotImplementedError, match="pooling"):
        bench.backend.embed([[1]])


def test_inputs_that_do_not_fit_are_refused(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(options={"pooling": "mean"}, slots=2, context_tokens=256)
    with pytest.raises(ValueError, match="257 tokens"):
        bench.backend.embed([[5], [5] * 257])
    with pytest.raises(ValueError, match="empty"):
        bench.backend.embed([[]])
    assert len(bench.backend.embed([[5] * 256, [5] * 200, [6], [7], [8]])) == 5
