"""Reads a GGUF file's claims as a model: its architecture, its sizes, its tokenizer, what it can be used for."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from types import MappingProxyType
from typing import TypedDict

from rbee.formats.gguf import Gguf
from rbee.formats.gguf_claims import Claims
from rbee.formats.gguf_tokenizer import chat_template, check_tokenizer
from rbee.formats.reading import Bytes, ModelFile, shown
from rbee.formats.tensor_types import FILE_TYPES
from rbee.plugin import Capability

MAX_BLOCKS = 512
MAX_CONTEXT_TOKENS = 16_777_216
MAX_WIDTH = 1_048_576
MAX_HEADS = 65_536
MAX_EXPERTS = 1024
_RANK = 4

_EMBEDDING = frozenset({
    "bert", "nomic-bert", "nomic-bert-moe", "neo-bert", "modern-bert", "jina-bert-v2", "jina-bert-v3", "eurobert",
    "gemma-embedding", "llama-embed", "t5encoder",
})  # fmt: skip
_IMAGE = frozenset({
    "flux", "sd1", "sd2", "sd3", "sdxl", "aura", "lumina2", "hidream", "qwen_image", "chroma", "pixart",
})  # fmt: skip
_VIDEO = frozenset({"cosmos", "hyvid", "ltxv", "wan"})
_NO_WEIGHTS = frozenset({"I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K"})
_VECTORS = frozenset({"F32", "F16", "BF16"})
_BERTS = frozenset({"bert", "nomic-bert", "nomic-bert-moe", "jina-bert-v2", "jina-bert-v3"})
_NEED_EXPERTS = frozenset({"smallthinker", "llada-moe"})
_NEED_SECTIONS = frozenset({"paddleocr"})
_PARTS = frozenset({"adapter", "mmproj", "imatrix", "vocab"})
"""Values of general.type for files that are a part of a model or say something about one."""


class Sizes(TypedDict):
    """The fields of `ModelFile` that an engine's memory follows from."""

    context_tokens: int
    embedding_length: int
    block_count: int
    head_count: int
    head_count_kv: int
    key_length: int
    value_length: int
    kv_elements_per_token: int


def model_of(file: Bytes, gguf: Gguf, parts: Sequence[Gguf], size_bytes: int) -> ModelFile:
    """Check what a GGUF file claims as a model and return it; `parts` are all files of a split one."""
    claims = Claims(file, gguf)
    architecture = claims.text("general.architecture", required=True)
    capabilities = _capabilities(claims, architecture)
    texts = bool(capabilities) and not set(capabilities) & {Capability.IMAGE, Capability.VIDEO}
    sizes = _sizes(claims, architecture, required=texts)
    vocabulary = check_tokenizer(claims, required=texts)
    if texts:
        _check_floats(claims, architecture)
        _check_weights(file, parts)
    if texts and not gguf.tensors:
        file.refuse(
            "the file has no tensors",
            at=8,
            hint="the whole model; this one has a vocabulary or a header only",
        )
    return ModelFile(
        path=file.path,
        format="gguf",
        size_bytes=size_bytes,
        name=claims.text("general.name"),
        architecture=architecture,
        parameters=sum(tensor.elements for part in parts for tensor in part.tensors),
        quantization=_quantization(gguf, parts),
        capabilities=capabilities,
        chat_template=chat_template(claims),
        vocabulary_size=vocabulary,
        license=claims.text("general.license"),
        metadata=MappingProxyType(gguf.metadata),
        **sizes,
    )


def _capabilities(claims: Claims, architecture: str) -> tuple[str, ...]:
    if architecture == "clip" or claims.text("general.type") in _PARTS:
        return ()
    for group, capability in ((_IMAGE, Capability.IMAGE), (_VIDEO, Capability.VIDEO)):
        if architecture in group:
            return (capability.value,)
    pooling = claims.number(f"{architecture}.pooling_type", 0, _RANK)
    heads = {"cls.output.weight", "cls.weight"}
    if pooling == _RANK or (architecture in _EMBEDDING and any(tensor.name in heads for tensor in claims.gguf.tensors)):
        return (Capability.RERANK.value,)
    if architecture in _EMBEDDING or pooling:
        return (Capability.EMBEDDING.value,)
    return (Capability.CHAT.value, Capability.COMPLETION.value)


def _sizes(claims: Claims, architecture: str, *, required: bool) -> Sizes:
    """Check the numbers from which an engine computes its buffers."""

    def number(key: str, high: int, *, low: int = 1, needed: bool = False) -> int:
        return claims.number(f"{architecture}.{key}", low, high, required=needed and required)

    blocks = number("block_count", MAX_BLOCKS, needed=True)
    width = number("embedding_length", MAX_WIDTH, needed=True)
    context = number("context_length", MAX_CONTEXT_TOKENS, needed=True)
    _check_experts(claims, architecture)
    _check_sections(claims, architecture)
    number("rope.dimension_count", MAX_WIDTH, low=0)
    claims.numbers(f"{architecture}.feed_forward_length", blocks, MAX_WIDTH)
    heads = claims.numbers(f"{architecture}.attention.head_count", blocks, MAX_HEADS)
    heads_kv = claims.numbers(f"{architecture}.attention.head_count_kv", blocks, MAX_HEADS) or heads
    for index, (all_heads, kv) in enumerate(zip(heads, heads_kv, strict=False)):
        if kv and all_heads % kv:
            claims.refuse(
                f"{architecture}.attention.head_count_kv",
                f"is {kv} in block {index}, which does not divide {all_heads}",
            )
    default = width // max((*heads, 1)) if any(heads) else 0
    number("nextn_predict_layers", blocks, low=0)
    number("embedding_length_out", width)
    key_length = number("attention.key_length", MAX_WIDTH) or default
    value_length = number("attention.value_length", MAX_WIDTH) or default
    if architecture in _BERTS and not key_length == value_length == default:
        claims.refuse(
            f"{architecture}.attention.key_length", f"is {key_length}; {default} is a head's share of {width}"
        )
    return Sizes(
        context_tokens=context,
        embedding_length=width,
        block_count=blocks,
        head_count=max((*heads, 0)),
        head_count_kv=max((*heads_kv, 0)),
        key_length=key_length,
        value_length=value_length,
        kv_elements_per_token=sum(heads_kv) * (key_length + value_length),
    )


def _check_experts(claims: Claims, architecture: str) -> None:
    """Refuse numbers of experts that llama.cpp asserts against while it loads."""
    count_key, used_key = f"{architecture}.expert_count", f"{architecture}.expert_used_count"
    experts = claims.number(count_key, 0, MAX_EXPERTS)
    if architecture in _NEED_EXPERTS and not experts:
        claims.refuse(count_key, "is missing or 0, but this architecture has experts")
    used = claims.number(used_key, 0, MAX_EXPERTS)
    if used > experts or (experts and not used):
        claims.refuse(used_key, f"is {used} of {experts} experts")
    groups_key = f"{architecture}.expert_group_count"
    groups = claims.number(groups_key, 0, MAX_EXPERTS)
    groups_used = claims.number(f"{architecture}.expert_group_used_count", 0, MAX_EXPERTS)
    fits = groups < experts and experts % groups == 0 and 0 < groups_used <= groups if groups > 1 else groups <= experts
    if not fits:
        claims.refuse(groups_key, f"is {groups}, of which {groups_used} are used, for {experts} experts")


def _check_sections(claims: Claims, architecture: str) -> None:
    """Refuse rotary sections that are all zero; ggml asserts against them when it computes."""
    key = f"{architecture}.rope.dimension_sections"
    sections = claims.gguf.metadata.get(key)
    if sections is None and architecture not in _NEED_SECTIONS:
        return
    whole = isinstance(sections, tuple) and all(isinstance(one, int) and 0 <= one <= MAX_WIDTH for one in sections)
    if not whole or not isinstance(sections, tuple) or not any(sections[:3]):
        claims.refuse(key, "must be an array of integers, not all of them 0")


def _check_floats(claims: Claims, architecture: str) -> None:
    """Refuse a float that is not finite, and a negative epsilon: ggml asserts on them while it computes."""
    for key, value in claims.gguf.metadata.items():
        if isinstance(value, float) and key.startswith(architecture + "."):
            if not isfinite(value):
                claims.refuse(key, f"is {value}; it must be finite")
            if key.endswith("epsilon") and not 0 <= value < 1:
                claims.refuse(key, f"is {value}; it must be from 0 to 1")


def _check_weights(file: Bytes, parts: Sequence[Gguf]) -> None:
    """Refuse a weight of a type that ggml stores but does not multiply with; it ends the process when it meets one."""
    for part in parts:
        for tensor in part.tensors:
            # DeepSeek V4's tid2eid is a table of expert numbers by token, and looked up, not multiplied.
            if not tensor.name.endswith((".weight", ".bias")) or "tid2eid" in tensor.name:
                continue
            if tensor.type.name in _NO_WEIGHTS or (len(tensor.shape) == 1 and tensor.type.name not in _VECTORS):
                file.refuse(f"the tensor {shown(tensor.name)} is {tensor.type.name}, which no weight is", at=tensor.at)


def _quantization(gguf: Gguf, parts: Sequence[Gguf]) -> str:
    """Name the mixture that the file claims, or the type that most bytes have."""
    claimed = gguf.metadata.get("general.file_type")
    if isinstance(claimed, int) and claimed in FILE_TYPES:
        return FILE_TYPES[claimed]
    bytes_of: dict[str, int] = {}
    for part in parts:
        for tensor in part.tensors:
            bytes_of[tensor.type.name] = bytes_of.get(tensor.type.name, 0) + tensor.size_bytes
    return max(bytes_of, key=lambda name: bytes_of[name], default="")
