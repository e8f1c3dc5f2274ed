"""The tiny models of `rbee.testing.models`, loaded by the real engines."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from formats_engine import ask, serve

from rbee.formats import inspect
from rbee.testing.models import write_gpt2_ggml, write_llama_gguf, write_random_gguf

LETTERS = set("abcdefghijklmnopqrstuvwxyz ")


@pytest.fixture(scope="module")
def xllamacpp() -> None:
    pytest.importorskip("xllamacpp", reason="needs the engine: pip install -e ./plugins/xllamacpp")


@pytest.fixture(scope="module")
def chat(xllamacpp: None, llama: Path) -> Iterator[Any]:
    server = serve(llama, "chat")
    yield server
    del server


def complete(server: Any, prompt: str, **options: Any) -> Any:
    return ask(server, "/v1/completions", {"prompt": prompt, "max_tokens": 64, "temperature": 0, **options})["choices"][
        0
    ]


def test_the_same_seed_makes_the_same_file(llama: Path, tmp_path: Path) -> None:
    assert write_llama_gguf(tmp_path / "again.gguf").read_bytes() == llama.read_bytes()
    assert write_llama_gguf(tmp_path / "other.gguf", seed=1).read_bytes() != llama.read_bytes()


def test_it_completes_in_letters_and_the_same_prompt_gives_the_same_text(chat: Any) -> None:
    first, second, other = (complete(chat, prompt)["text"] for prompt in ("the bees", "the bees", "the queen"))
    assert first == second != other
    assert set(first + other) <= LETTERS


def test_it_chats_through_its_own_template(chat: Any) -> None:
    messages = [{"role": "user", "content": "Hello é €"}]
    answer = ask(chat, "/v1/chat/completions", {"messages": messages, "max_tokens": 16, "temperature": 0})
    assert set(answer["choices"][0]["message"]["content"]) <= LETTERS
    # Begin and user, five letters and two spaces, characters of two and three bytes, assistant.
    assert answer["usage"]["prompt_tokens"] == 15


def finish_reasons(server: Any) -> set[str]:
    return {complete(server, "a", temperature=1, seed=seed, max_tokens=100)["finish_reason"] for seed in range(20)}


def test_it_ends_by_itself_at_times(chat: Any) -> None:
    assert "stop" in finish_reasons(chat)


def test_without_ends_it_never_does(xllamacpp: None, tmp_path: Path) -> None:
    server = serve(write_llama_gguf(tmp_path / "endless.gguf", ends=False), "chat")
    assert finish_reasons(server) == {"length"}


def test_similar_texts_have_similar_vectors(xllamacpp: None, embedder: Path) -> None:
    server = serve(embedder, "embedding")
    answer = ask(server, "/v1/embeddings", {"input": ["the queen bee", "a queen bee", "xyz 123"]})
    near, query, far = (entry["embedding"] for entry in answer["data"])
    assert len(query) == inspect(embedder).embedding_length
    assert dot(query, near) > 0.8 > dot(query, far)


def dot(left: list[float], right: list[float]) -> float:
    return sum(one * other for one, other in zip(left, right, strict=True))


def test_the_reranker_scores_every_document(xllamacpp: None, reranker: Path) -> None:
    body = {"query": "queen", "documents": ["a bee", "the queen", "zzz"], "top_n": 2}
    answer = ask(serve(reranker, "rerank"), "/v1/rerank", body)
    scores = [result["relevance_score"] for result in answer["results"]]
    assert len(scores) == 2
    assert scores == sorted(scores, reverse=True)
    assert scores[0] != scores[1]


@pytest.mark.parametrize("quantization", ["F16", "Q8_0", "Q4_0"])
def test_a_random_model_has_about_the_size_and_writes_letters(
    xllamacpp: None, tmp_path: Path, quantization: Any
) -> None:
    path = write_random_gguf(tmp_path / "random.gguf", 40_000_000, quantization=quantization)
    assert path.stat().st_size == pytest.approx(40_000_000, rel=0.4)
    text = complete(serve(path, "chat"), "the bees", max_tokens=12)["text"]
    assert len(text) == 12
    assert set(text) <= LETTERS


GENERATE = """
import sys
from ctransformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], model_type="gpt2", local_files_only=True, context_length=64)
for prompt in ("the bees", "the bees", "hello"):
    print(repr(model(prompt, top_k=1, max_new_tokens=40, threads=1)))
"""


def test_ctransformers_generates_from_the_old_gpt2_file(gpt2: Path) -> None:
    pytest.importorskip("ctransformers", reason="needs the engine: pip install -e ./plugins/ctransformers")
    # A child: the library prints to stderr and aborts where it finds fault.
    done = subprocess.run([sys.executable, "-c", GENERATE, str(gpt2)], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    first, second, other = (line.strip("'") for line in done.stdout.splitlines())
    assert first == second != other
    assert len(first) == 40
    assert set(first + other) <= LETTERS


def test_gpt2_files_differ_by_seed(gpt2: Path, tmp_path: Path) -> None:
    assert write_gpt2_ggml(tmp_path / "same.bin").read_bytes() == gpt2.read_bytes()
    assert write_gpt2_ggml(tmp_path / "other.bin", seed=1).read_bytes() != gpt2.read_bytes()
