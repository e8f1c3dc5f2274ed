"""Each lie that a GGUF file can tell, one at a time, and the words by which it is refused."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from formats_draft import ARRAY, BOOL, F32, F64, I32, STRING, U8, U32, U64, Draft, Pair, array, text, u32, u64

from rbee.errors import InvalidModelFile
from rbee.formats import inspect

Lie = Callable[[Draft], object]
LIES: dict[str, tuple[Lie, str]] = {}


def lie(name: str, message: str) -> Callable[[Lie], Lie]:
    def keep(tell: Lie) -> Lie:
        assert name not in LIES
        LIES[name] = (tell, message)
        return tell

    return keep


def put(name: str, message: str, key: str, kind: int, value: bytes) -> None:
    LIES[name] = (lambda draft: draft.put(key, kind, value), message)


def change(title: str, message: str, row: str, **claims: object) -> None:
    def tell(draft: Draft) -> None:
        for claim, value in claims.items():
            setattr(draft.row(row), claim, value)

    LIES[title] = (tell, message)


def header(name: str, message: str, **claims: object) -> None:
    def tell(draft: Draft) -> None:
        for claim, value in claims.items():
            setattr(draft, claim, value)

    LIES[name] = (tell, message)


header("version 1", "GGUF version 1 is not known", version=u32(1))
header("version 4", "GGUF version 4 is not known.*Try: a newer rbee", version=u32(4))
header("version 0", "GGUF version 0", version=u32(0))
header("big-endian", r"big-endian GGUF \(version 3\).*at byte 4", version=struct.pack(">I", 3))
header("big-endian magic", "big-endian order", magic=b"FUGG")
header("n_kv 2^63", f"{2**63} metadata keys are claimed", keys=2**63)
header("n_kv 2^64-1", "metadata keys are claimed", keys=2**64 - 1)
header("n_kv over the limit", "metadata keys are claimed", keys=10_001)
header("n_kv more than there are", "a metadata key has [0-9]+ bytes", keys=99)
header("n_tensors 2^63", f"{2**63} tensors are claimed.*at byte 8", tensors=2**63)
header("n_tensors over the limit", "tensors are claimed", tensors=32_769)
header("no tensors", "no tensors", tensors=0)

put("string of 2^62 bytes", f"claims {2**62} bytes", "general.name", STRING, text("tiny", 2**62))
put("string one byte too long", "claims", "general.zzz", STRING, text("", 10**9))
put("value type 13", "unknown value type 13", "general.x", 13, b"")
put("value type -1", f"unknown value type {2**32 - 1}", "general.x", 2**32 - 1, b"")
put("array of 2^60 numbers", f"claims {2**60} elements", "general.x", ARRAY, array(U32, [], 2**60))
put("array of 2^61 strings", f"claims {2**61} elements", "general.x", ARRAY, array(STRING, [], 2**61))
put("array of 2^63 arrays", f"claims {2**63} elements", "general.x", ARRAY, array(ARRAY, [], 2**63))
put("array of type 99", "unknown element type 99", "general.x", ARRAY, array(99, []))
put("array of long strings", f"claims {2**62} bytes", "general.x", ARRAY, array(STRING, [text("a", 2**62)]))
put("bool of 2", "bool of value 2", "general.x", BOOL, b"\2")
put("alignment 0", "general.alignment is 0", "general.alignment", U32, u32(0))
put("alignment 1", "general.alignment is 1", "general.alignment", U32, u32(1))
put("alignment 3", "general.alignment is 3;", "general.alignment", U32, u32(3))
put("alignment 2^31", "power of two from 8", "general.alignment", U32, u32(2**31))
put("alignment as uint64", "must be a uint32", "general.alignment", U64, u64(32))
put("alignment as text", "is a string; it must be a uint32", "general.alignment", STRING, text("32"))
put("key of spaces and newlines", "control characters", "general\n.x", U32, u32(0))
put("architecture a number", "general.architecture is a uint32", "general.architecture", U32, u32(1))
put("architecture empty", "general.architecture is not one printable word", "general.architecture", STRING, text(""))
put("architecture not UTF-8", "architecture", "general.architecture", STRING, text(b"\xff\0"))
put("name a number", "general.name is a uint32; it must be a string", "general.name", U32, u32(1))
put("unknown architecture", "zebra.block_count is missing", "general.architecture", STRING, text("zebra"))
put("no blocks", "llama.block_count is 0", "llama.block_count", U32, u32(0))
put("2^32 - 1 blocks", "llama.block_count is 4294967295; 1 to 512", "llama.block_count", U32, u32(2**32 - 1))
put("blocks as text", "block_count is a string; it must be an integer", "llama.block_count", STRING, text("1"))
put("blocks as a float", "block_count is a float32", "llama.block_count", F32, struct.pack("<f", 1.0))
put(
    "blocks as an array",
    "block_count is an array of uint32; it must be an integer",
    "llama.block_count",
    ARRAY,
    array(U32, [u32(1)]),
)
put("context 0", "llama.context_length is 0", "llama.context_length", U32, u32(0))
put("context 2^32 - 1", "llama.context_length is 4294967295", "llama.context_length", U32, u32(2**32 - 1))
put("width 0", "llama.embedding_length is 0", "llama.embedding_length", U32, u32(0))
put("width 2^31", "llama.embedding_length is 2147483648", "llama.embedding_length", U32, u32(2**31))
put("heads 2^31", "head_count is 2147483648", "llama.attention.head_count", U32, u32(2**31))
put("heads of more layers", "must hold 1 integers", "llama.attention.head_count", ARRAY, array(U32, [u32(4)] * 2))
put("heads as texts", "one integer for each", "llama.attention.head_count", ARRAY, array(STRING, [text("4")]))
put("heads that do not divide", "is 3 in block 0", "llama.attention.head_count_kv", U32, u32(3))
put("experts 2^31", "expert_count is 2147483648", "llama.expert_count", U32, u32(2**31))
put("more experts used than there are", "expert_used_count is 2 of 0 experts", "llama.expert_used_count", U32, u32(2))
put("no expert used of two", "expert_used_count is 0 of 2 experts", "llama.expert_count", U32, u32(2))
put("groups of no experts", "is 1, of which 0 are used, for 0 experts", "llama.expert_group_count", U32, u32(1))
put("more predicted layers than layers", "nextn_predict_layers is 2", "llama.nextn_predict_layers", U32, u32(2))
put("output wider than the model", "embedding_length_out is 65", "llama.embedding_length_out", U32, u32(65))
put("rotary sections of zero", "not all of them 0", "llama.rope.dimension_sections", ARRAY, array(I32, [u32(0)] * 4))
put("rotary sections a number", "array of integers", "llama.rope.dimension_sections", U32, u32(1))
put("pooling 9", "pooling_type is 9", "llama.pooling_type", U32, u32(9))
put("negative epsilon", "from 0 to 1", "llama.attention.layer_norm_rms_epsilon", F32, struct.pack("<f", -1.0))
put("infinite rope base", "must be finite", "llama.rope.freq_base", F32, struct.pack("<f", float("inf")))
put("rope scale not a number", "must be finite", "llama.rope.scaling.factor", F64, struct.pack("<d", float("nan")))
put("chat template too long", "has 65537 bytes; 65536", "tokenizer.chat_template", STRING, text("x" * 65_537))
put("named chat template too long", "chat_template.tool", "tokenizer.chat_template.tool", STRING, text("x" * 99_999))
put("chat template a number", "must be a string", "tokenizer.chat_template", U32, u32(1))
put("tokenizer a number", "must be a string", "tokenizer.ggml.model", U32, u32(1))
put("tokens as numbers", "array of strings", "tokenizer.ggml.tokens", ARRAY, array(U32, [u32(1)] * 287))
put("tokens as one text", "array of strings", "tokenizer.ggml.tokens", STRING, text("abc"))
put("no tokens", "has 0 tokens", "tokenizer.ggml.tokens", ARRAY, array(STRING, []))
put("fewer token types", "286 elements for 287", "tokenizer.ggml.token_type", ARRAY, array(I32, [u32(1)] * 286))
put("token types of one byte", "array of int32", "tokenizer.ggml.token_type", ARRAY, array(U8, [b"\1"] * 287))
put("fewer scores", "1 elements for 287", "tokenizer.ggml.scores", ARRAY, array(F32, [u32(0)]))
put("scores of one byte", "array of float32 or int32", "tokenizer.ggml.scores", ARRAY, array(U8, [b"\1"] * 287))
put("merges as numbers", "array of string", "tokenizer.ggml.merges", ARRAY, array(U32, [u32(1)]))
put("merges as one text", "array of string", "tokenizer.ggml.merges", STRING, text("a b"))
put("character map of numbers", "charsmap", "tokenizer.ggml.precompiled_charsmap", ARRAY, array(U32, [u32(1)]))
put("byte tokens that name no byte", "names no byte", "tokenizer.ggml.token_type", ARRAY, array(I32, [u32(6)] * 287))

change("tensor 128 bytes past the end", "ends 128 bytes past the end", "blk.0.ffn_norm.weight", shape=[96])
change("tensor far past the end", "past the end of the file", "output.weight", offset=2**62)
change("tensor offset at 2^64 - 32", "past the end of the file", "output.weight", offset=2**64 - 32)
change("tensor not aligned", "no multiple of 32", "output.weight", offset=33)
change("tensors that overlap", "overlap", "output.weight", offset=0)
change("shape with a zero", "impossible shape", "output.weight", shape=[64, 0])
change("shape that overflows", "impossible shape", "output.weight", shape=[2**32, 2**32])
change("shape that wraps to its true size", "impossible shape", "output.weight", shape=[2**63 + 32, 2])
change("negative dimension", "impossible shape", "output.weight", shape=[2**64 - 64, 287])
change("no dimensions", "has 0 dimensions", "output.weight", shape=[])
change("five dimensions", "has 5 dimensions", "output.weight", shape=[64, 287, 1, 1, 1])
change("2^32 - 1 dimensions", "has 4294967295 dimensions", "output.weight", dimensions=2**32 - 1)
change("tensor type -1", "unknown type -1", "output.weight", kind=2**32 - 1)
change("tensor type 43", "unknown type 43", "output.weight", kind=43)
change("tensor type 1000", "unknown type 1000", "output.weight", kind=1000)
change("tensor type that was removed", "removed type 4", "output.weight", kind=4)
change("row shorter than a block", "no multiple of 256", "output.weight", kind=12)
change("integer weight", "is I16, which no weight is", "output.weight", kind=25)
change("quantized norm", "is Q8_0, which no weight is", "output_norm.weight", kind=8)
change("tensor name empty", "has 0 bytes", "output.weight", name=b"")
change("tensor name of 65 bytes", "has 65 bytes; 1 to 64", "output.weight", name=b"x" * 65)
change("tensor name of 2^63 bytes", f"has {2**63} bytes", "output.weight", length=2**63)
change("tensor name not UTF-8", "is not UTF-8", "output.weight", name=b"\xff\xfe")
change("two tensors of one name", "occurs twice", "output.weight", name=b"token_embd.weight")


@lie("duplicate key", "'general.name' occurs twice")
def duplicate_key(draft: Draft) -> None:
    draft.pairs.append(Pair(b"general.name", STRING, text("again")))


def rename_architecture(draft: Draft, name: bytes) -> None:
    for pair in draft.pairs:
        pair.key = pair.key.replace(b"llama.", name + b".")
    draft.put("general.architecture", STRING, text(name))


@lie("architecture of experts without any", "llada-moe.expert_count is missing or 0")
def no_experts(draft: Draft) -> None:
    rename_architecture(draft, b"llada-moe")


@lie("architecture of rotary sections without any", "paddleocr.rope.dimension_sections must be an array")
def no_sections(draft: Draft) -> None:
    rename_architecture(draft, b"paddleocr")


@lie("no group used of four", "is 4, of which 0 are used, for 8 experts")
def expert_groups(draft: Draft) -> None:
    draft.put("llama.expert_count", U32, u32(8))
    draft.put("llama.expert_used_count", U32, u32(2))
    draft.put("llama.expert_group_count", U32, u32(4))


@lie("heads of BERT of another width", "key_length is 8; 16 is a head's share of 64")
def bert_heads(draft: Draft) -> None:
    rename_architecture(draft, b"bert")
    draft.put("bert.attention.key_length", U32, u32(8))


@lie("key empty", "has 0 bytes")
def key_empty(draft: Draft) -> None:
    draft.pairs[0].key = b""


@lie("key of 2^63 bytes", f"has {2**63} bytes")
def key_too_long(draft: Draft) -> None:
    draft.pairs[0].length = 2**63


@lie("key of 1025 bytes", "has 1025 bytes")
def key_long(draft: Draft) -> None:
    draft.pairs[0].key = b"k" * 1025


@lie("key not UTF-8", "is not UTF-8")
def key_not_utf8(draft: Draft) -> None:
    draft.pairs[0].key = b"general.\xff"


@lie("architecture missing", "general.architecture is missing")
def no_architecture(draft: Draft) -> None:
    draft.drop("general.architecture")


@lie("block count missing", "llama.block_count is missing")
def no_blocks(draft: Draft) -> None:
    draft.drop("llama.block_count")


@lie("context length missing", "llama.context_length is missing")
def no_context(draft: Draft) -> None:
    draft.drop("llama.context_length")


@lie("embedding length missing", "llama.embedding_length is missing")
def no_width(draft: Draft) -> None:
    draft.drop("llama.embedding_length")


@lie("tokenizer missing", "tokenizer.ggml.model is missing")
def no_tokenizer(draft: Draft) -> None:
    draft.drop("tokenizer.ggml.model")


@lie("tokens missing", "tokens must be an array of strings")
def no_tokens(draft: Draft) -> None:
    draft.drop("tokenizer.ggml.tokens")


@lie("duplicate vocabulary tokens", "has 'word-3' twice, as tokens 3 and 286")
def duplicate_tokens(draft: Draft) -> None:
    words = [text(f"word-{index if index < 286 else 3}") for index in range(287)]
    draft.put("tokenizer.ggml.tokens", ARRAY, array(STRING, words))


@lie("tokens that are one up to a zero byte", "has 'word' twice, as tokens 3 and 4")
def tokens_with_zero_bytes(draft: Draft) -> None:
    words = [text({3: b"word\0a", 4: b"word\0b"}.get(index, b"word-%d" % index)) for index in range(287)]
    draft.put("tokenizer.ggml.tokens", ARRAY, array(STRING, words))


@lie("token that an empty one is called", r"has '\[EMPTY_5\]' twice, as tokens 5 and 9")
def empty_token(draft: Draft) -> None:
    words = [text({5: b"", 9: b"[EMPTY_5]"}.get(index, b"word-%d" % index)) for index in range(287)]
    draft.put("tokenizer.ggml.tokens", ARRAY, array(STRING, words))


@lie("arrays nested too deep", "nested more than 3 deep")
def nested(draft: Draft) -> None:
    value = array(U32, [u32(1)])
    for _ in range(6):
        value = array(ARRAY, [value])
    draft.put("general.x", ARRAY, value)


@lie("more strings than any model has", "more than 4194304 strings")
def too_many_strings(draft: Draft) -> None:
    draft.put("general.x", ARRAY, u32(STRING) + u64(4_194_305) + bytes(8 * 4_194_305))


@pytest.mark.parametrize("name", LIES)
def test_a_lie_is_refused(name: str, draft: Draft, tmp_path: Path) -> None:
    tell, message = LIES[name]
    tell(draft)
    path = tmp_path / "hostile.gguf"
    path.write_bytes(draft.encode())
    with pytest.raises(InvalidModelFile) as refused:
        inspect(path)
    assert re.search(message, str(refused.value)), str(refused.value)
    assert re.search(rf"^{re.escape(str(path))}: .* \(at byte \d+\)$", refused.value.message, re.DOTALL)
    assert refused.value.hint


def test_untrusted_text_is_escaped_in_the_message(draft: Draft, tmp_path: Path) -> None:
    draft.row("output.weight").name = b"\x1b[31mred\n"
    path = tmp_path / "model.gguf"
    path.write_bytes(draft.encode())
    with pytest.raises(InvalidModelFile) as refused:
        inspect(path)
    assert str(refused.value).isprintable()
