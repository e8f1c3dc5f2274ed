"""Embeddings: of a chat model by option, and of a model whose file asks for them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
from llama_bench import PROMPTS, Answer, Bench

from rbee.plugin import Capability
from rbee.testing.models import write_embedding_gguf, write_rerank_gguf


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
    bench = make_bench(path=write_embedding_gguf(tmp_path / "embedding.gguf"))
    assert bench.loaded.capabilities == {Capability.EMBEDDING}
    inputs = [bench.backend.tokenize(text, special=False) for text in ("honey", "honey bees", "qqqq wwww", "honey")]
    honey, bees, other, same = bench.backend.embed(inputs)
    assert honey == pytest.approx(same, abs=1e-4)
    assert math.dist(honey, bees) < math.dist(honey, other)
    assert bench.backend.embed(inputs[:1])[0] == pytest.approx(honey, abs=1e-3)
    with pytest.raises(NotImplementedError):
        bench.ask([5])


def test_a_rerank_model_is_refused_with_an_alternative(make_bench: Callable[..., Bench], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="xllamacpp"):
        make_bench(path=write_rerank_gguf(tmp_path / "rerank.gguf"))


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
