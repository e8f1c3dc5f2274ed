"""What a good file tells about itself."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from random import Random

import pytest
from formats_draft import ARRAY, STRING, U32, Draft, array, text, u32

import rbee
from rbee.errors import InvalidModelFile
from rbee.formats import LeftOut, inspect
from rbee.testing.models import CHAT_TEMPLATE, write_llama_gguf, write_random_gguf

BUILT_IN = Path(rbee.__file__).parent / "models" / "rbee-demo.gguf"


def test_a_chat_model(llama: Path) -> None:
    model = inspect(llama)
    assert (model.format, model.path, model.size_bytes) == ("gguf", llama, llama.stat().st_size)
    assert (model.name, model.architecture, model.quantization) == ("tiny-llama", "llama", "F16")
    assert model.capabilities == ("chat", "completion")
    assert (model.context_tokens, model.embedding_length, model.block_count) == (512, 64, 1)
    assert (model.head_count, model.head_count_kv, model.key_length, model.value_length) == (4, 4, 16, 16)
    assert model.kv_elements_per_token == 2 * 64
    assert model.vocabulary_size == 287
    assert model.chat_template == CHAT_TEMPLATE
    assert model.license == "GPL-3.0-or-later"
    embeddings, attention, feed_forward, norms = 2 * 287 * 64, 4 * 64 * 64, 3 * 64 * 128, 3 * 64
    assert model.parameters == embeddings + attention + feed_forward + norms


def test_metadata_keeps_short_values_and_leaves_long_ones_out(llama: Path) -> None:
    metadata = inspect(llama).metadata
    assert metadata["llama.context_length"] == 512
    assert metadata["tokenizer.ggml.add_bos_token"] is True
    assert metadata["tokenizer.ggml.merges"] == ("h e", "t h", "i n")
    assert metadata["tokenizer.ggml.tokens"] == LeftOut("array of string", 287)


def test_an_embedding_model(embedder: Path) -> None:
    model = inspect(embedder)
    assert (model.architecture, model.capabilities) == ("bert", ("embedding",))


def test_a_rerank_model(reranker: Path) -> None:
    assert inspect(reranker).capabilities == ("rerank",)


def test_a_generative_model_with_pooling_embeds(draft: Draft, tmp_path: Path) -> None:
    draft.put("llama.pooling_type", U32, u32(3))
    assert inspect(written(draft, tmp_path)).capabilities == ("embedding",)


def test_a_model_without_a_chat_template(tmp_path: Path) -> None:
    assert inspect(write_llama_gguf(tmp_path / "plain.gguf", chat_template=False)).chat_template is None


@pytest.mark.parametrize("quantization", ["F32", "F16", "Q8_0", "Q4_0"])
def test_every_quantization_that_the_maker_writes(tmp_path: Path, quantization: str) -> None:
    path = write_random_gguf(tmp_path / "random.gguf", 8_000_000, quantization=quantization)  # type: ignore[arg-type]
    assert inspect(path).quantization == quantization


def test_the_type_of_most_bytes_names_a_file_that_does_not(draft: Draft, tmp_path: Path) -> None:
    draft.drop("general.file_type")
    assert inspect(written(draft, tmp_path)).quantization == "F16"


def test_grouped_heads_given_per_layer(draft: Draft, tmp_path: Path) -> None:
    draft.put("llama.attention.head_count_kv", ARRAY, array(U32, [u32(2)]))
    model = inspect(written(draft, tmp_path))
    assert (model.head_count_kv, model.kv_elements_per_token) == (2, 2 * 2 * 16)


def test_version_2_is_read_like_version_3(draft: Draft, tmp_path: Path) -> None:
    draft.version = u32(2)
    assert inspect(written(draft, tmp_path)).parameters > 0


@pytest.mark.parametrize("alignment", [8, 64, 4096])
def test_other_alignments(draft: Draft, tmp_path: Path, alignment: int) -> None:
    draft.alignment = alignment
    draft.put("general.alignment", U32, u32(alignment))
    at, data = 0, b""
    for row in draft.rows:
        size = 2 * row.shape[0] * row.shape[1] if len(row.shape) > 1 else 4 * row.shape[0]
        data += draft.data[row.offset : row.offset + size]
        data += b"\0" * (-len(data) % alignment)
        row.offset, at = at, len(data)
    draft.data = data
    assert inspect(written(draft, tmp_path)).parameters > 0


def test_nested_arrays_are_passed_over(draft: Draft, tmp_path: Path) -> None:
    inner = array(STRING, [text("a"), text("b")])
    draft.put("general.nested", ARRAY, array(ARRAY, [inner, inner]))
    assert inspect(written(draft, tmp_path)).metadata["general.nested"] == LeftOut("array of array", 2)


@pytest.mark.parametrize(
    ("key", "value", "capabilities"),
    [
        ("general.architecture", "clip", ()),
        ("general.architecture", "flux", ("image",)),
        ("general.architecture", "wan", ("video",)),
        ("general.type", "adapter", ()),
    ],
)
def test_files_that_are_no_text_model(
    draft: Draft, tmp_path: Path, key: str, value: str, capabilities: tuple[str, ...]
) -> None:
    draft.put(key, STRING, text(value))
    draft.pairs = [pair for pair in draft.pairs if not pair.key.startswith((b"llama.", b"tokenizer."))]
    assert inspect(written(draft, tmp_path)).capabilities == capabilities


@pytest.mark.parametrize("words", [1, 3])
def test_a_large_vocabulary_is_checked_in_little_memory(draft: Draft, tmp_path: Path, words: int) -> None:
    random = Random(0)
    count = 60_000
    tokens = [text(" ".join(random.randbytes(6).hex() for _ in range(words)) + str(index)) for index in range(count)]
    put_tokens(draft, tokens)
    path = written(draft, tmp_path)
    tracemalloc.start()
    try:
        assert inspect(path).vocabulary_size == count
        assert tracemalloc.get_traced_memory()[1] < 5 * 1024 * 1024
        tokens[-1] = tokens[7]
        put_tokens(draft, tokens)
        path.write_bytes(draft.encode())
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        with pytest.raises(InvalidModelFile, match=r"twice, as tokens 7 and 59999"):
            inspect(path)
        assert tracemalloc.get_traced_memory()[1] - before < 5 * 1024 * 1024
    finally:
        tracemalloc.stop()


def put_tokens(draft: Draft, tokens: list[bytes]) -> None:
    draft.put("tokenizer.ggml.tokens", ARRAY, array(STRING, tokens))
    draft.put("tokenizer.ggml.token_type", ARRAY, array(5, [u32(1)] * len(tokens)))


def test_a_table_of_expert_numbers_may_hold_integers(draft: Draft, tmp_path: Path) -> None:
    row = draft.row("blk.0.attn_q.weight")
    row.name, row.kind = b"blk.0.ffn_gate_tid2eid.weight", 25
    assert inspect(written(draft, tmp_path)).parameters > 0


def test_empty_tokens_may_be_many(draft: Draft, tmp_path: Path) -> None:
    put_tokens(draft, [text(b"" if index < 9 else b"%d" % index) for index in range(287)])
    assert inspect(written(draft, tmp_path)).vocabulary_size == 287


def test_names_are_fit_for_a_terminal(draft: Draft, tmp_path: Path) -> None:
    draft.put("general.name", STRING, text("Tiny \x1b[31mred\n\nmodel"))
    assert inspect(written(draft, tmp_path)).name == "Tiny [31mred model"


def test_the_built_in_model() -> None:
    model = inspect(BUILT_IN)
    assert (model.name, model.capabilities) == ("rbee-demo", ("chat", "completion"))
    assert model.chat_template


def written(draft: Draft, folder: Path) -> Path:
    path = folder / "model.gguf"
    path.write_bytes(draft.encode())
    return path
