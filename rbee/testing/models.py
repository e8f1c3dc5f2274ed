"""Writes small real model files, so that tests load what engines load and nothing has to be downloaded.

The files are made by arithmetic alone: weights come from a seed, nothing was trained. The text models babble lower-case
letters and spaces (the same text for the same prompt at temperature 0), so that their output can be printed and
compared. Needs the packages gguf and numpy: `pip install rbee[testing]`.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFWriter
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

Quantization = Literal["F32", "F16", "Q8_0", "Q4_0"]

BOS, EOS, USER, ASSISTANT = "<|bos|>", "<|eos|>", "<|user|>", "<|assistant|>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'assistant' %}<|assistant|>{{ message.content }}{{ eos_token }}"
    "{% else %}<|user|>{{ message.content }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_LETTERS = b"abcdefghijklmnopqrstuvwxyz "
_LOUD = 6.0
_SILENT = -60.0
_END_BONUS = 7.0


@dataclass(frozen=True)
class _Shape:
    layers: int
    width: int
    heads: int
    feed_forward: int
    context: int


def write_llama_gguf(
    path: Path,
    *,
    layers: int = 1,
    width: int = 64,
    heads: int = 4,
    context: int = 512,
    seed: int = 0,
    chat_template: bool = True,
    ends: bool = True,
    name: str = "tiny-llama",
    quantization: Quantization = "F16",
) -> Path:
    """Write a Llama model of about 100 kB that generates letters and spaces, and return `path`.

    It reads any text: its vocabulary is the 256 bytes, three merges and four control tokens. With `ends` it stops by
    itself at times, as one more letter of its alphabet; without, only at the limit of tokens or of the context.
    """
    shape = _Shape(layers, width, heads, 2 * width, context)
    return _write_llama(path, shape, seed, name=name, template=chat_template, ends=ends, quantization=quantization)


def write_random_gguf(path: Path, size_bytes: int, seed: int = 0, *, quantization: Quantization = "Q8_0") -> Path:
    """Write a Llama model of about `size_bytes` (at least 8 MB), to load an engine with real arithmetic.

    It never stops by itself and generates letters, so that a measurement gets every token it asks for. The size comes
    within one layer of what was asked: width 1024, 16 heads, as many layers as fit.
    """
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    width, feed_forward = 1024, 2816
    block_elements, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[quantization]]
    layer_bytes = (4 * width + 3 * feed_forward) * width * block_bytes // block_elements
    shape = _Shape(max(1, round(size_bytes / layer_bytes)), width, 16, feed_forward, 4096)
    return _write_llama(path, shape, seed, name="random-llama", template=True, ends=False, quantization=quantization)


def write_embedding_gguf(path: Path, *, width: int = 64, layers: int = 1, context: int = 512, seed: int = 0) -> Path:
    """Write a BERT of about 150 kB with mean pooling, and return `path`.

    Texts that share letters get vectors that point the same way, so that a test can ask for the nearest one.
    """
    return _write_bert(path, _Shape(layers, width, 4, 2 * width, context), seed, rank=False)


def write_rerank_gguf(path: Path, *, width: int = 64, layers: int = 1, context: int = 512, seed: int = 0) -> Path:
    """Write a BERT with a classification head (pooling RANK), and return `path`. Its scores say nothing."""
    return _write_bert(path, _Shape(layers, width, 4, 2 * width, context), seed, rank=True)


def write_gpt2_ggml(
    path: Path,
    *,
    layers: int = 1,
    width: int = 32,
    heads: int = 4,
    context: int = 256,
    seed: int = 0,
    ends: bool = False,
) -> Path:
    """Write a GPT-2 in the file format from before GGUF, as ctransformers 0.2.27 loads it, and return `path`.

    Little-endian: the magic 0x67676d6c, six int32 (vocabulary, context, width, heads, layers, file type 0 for f32), the
    tokens as length and bytes, then per tensor its number of dimensions, length of name, type, shape, name and data.
    """
    import numpy as np

    tokens = [bytes([value]) for value in range(256)] + [b"<|endoftext|>"]
    with path.open("wb") as stream:
        stream.write(struct.pack("<I6i", 0x67676D6C, len(tokens), context, width, heads, layers, 0))
        stream.write(struct.pack("<i", len(tokens)))
        for token in tokens:
            stream.write(struct.pack("<I", len(token)) + token)
        for tensor, value in _gpt2_weights(
            _Shape(layers, width, heads, 4 * width, context), seed, _wanted(tokens, ends)
        ):
            _write_ggml_tensor(stream, tensor, np.asarray(value, dtype=np.float32))
    return path


def _write_ggml_tensor(stream: BinaryIO, name: str, value: Floats) -> None:
    raw = name.encode()
    stream.write(struct.pack("<3i", value.ndim, len(raw), 0))
    stream.write(struct.pack(f"<{value.ndim}i", *reversed(value.shape)) + raw + value.astype("<f4").tobytes())


def _gpt2_weights(shape: _Shape, seed: int, wanted: Floats) -> list[tuple[str, Floats]]:
    """Return the tensors in the order of the file. The last norm's bias holds dimension 0 at one; see `_output`."""
    import numpy as np

    random = np.random.default_rng(seed)
    width, zeros, ones = shape.width, np.zeros(shape.width, np.float32), np.ones(shape.width, np.float32)

    def matrix(rows: int, columns: int, scale: float = 1.0) -> Floats:
        return random.standard_normal((rows, columns), np.float32) * np.float32(scale / columns**0.5)

    constant = zeros.copy()
    constant[0] = 1.0
    weights: list[tuple[str, Floats]] = [
        ("model/ln_f/g", ones - constant),
        ("model/ln_f/b", constant),
        ("model/wte", matrix(len(wanted), width, width**0.5)),
        ("model/wpe", matrix(shape.context, width)),
        ("model/lm_head", _output(matrix(len(wanted), width), wanted, 1.0)),
    ]
    for layer in range(shape.layers):
        prefix = f"model/h{layer}"
        for norm in ("ln_1", "ln_2"):
            weights += [(f"{prefix}/{norm}/g", ones), (f"{prefix}/{norm}/b", zeros)]
        for name, rows, columns in (
            ("attn/c_attn", 3 * width, width),
            ("attn/c_proj", width, width),
            ("mlp/c_fc", 4 * width, width),
            ("mlp/c_proj", width, 4 * width),
        ):
            weights += [
                (f"{prefix}/{name}/w", matrix(rows, columns)),
                (f"{prefix}/{name}/b", np.zeros(rows, np.float32)),
            ]
    return weights


def _wanted(tokens: list[bytes], ends: bool) -> Floats:
    """Return for each token how much the model shall want it: letters and spaces, perhaps the last token, no other."""
    import numpy as np

    wanted = [_LOUD if len(token) == 1 and token in _LETTERS else _SILENT for token in tokens]
    wanted[-1] = _LOUD + _END_BONUS if ends else _SILENT
    return np.array(wanted, dtype=np.float32)


def _output(rows: Floats, wanted: Floats, constant: float) -> Floats:
    """Make an output matrix that adds `wanted` to the logits, through dimension 0, which is about `constant`.

    The last token, the end, is wanted alike in every context; so each text meets a place where no letter outbids it.
    """
    import numpy as np

    rows = (rows * _LOUD).astype(np.float32)
    rows[-1] = 0.0
    rows[:, 0] = wanted / constant
    return rows


def _byte_texts() -> list[str]:
    """Return how GPT-2's byte-level tokenizers write each byte: itself when printable, else a character from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(value) if value in printable else chr(next(others)) for value in range(256)]


def _write_llama(
    path: Path, shape: _Shape, seed: int, *, name: str, template: bool, ends: bool, quantization: Quantization
) -> Path:
    from gguf import GGUFWriter, TokenType

    texts = _byte_texts()
    space, merged = texts[0x20], ["he", "th", "in"]
    tokens = [*texts, *merged, BOS, USER, ASSISTANT, *(f"<|unused{index}|>" for index in range(24)), EOS]
    kinds = [TokenType.CONTROL if text.startswith("<|") else TokenType.NORMAL for text in tokens]
    writer = GGUFWriter(path, "llama")
    _describe(writer, shape, name, quantization)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(shape.width // shape.heads)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([f"{text[0]} {text[1]}" for text in merged])
    writer.add_bos_token_id(tokens.index(BOS))
    writer.add_eos_token_id(tokens.index(EOS))
    writer.add_add_bos_token(True)
    if template:
        writer.add_chat_template(CHAT_TEMPLATE)
    letters = [b" " if text == space else text.encode() for text in tokens]
    _add_llama_weights(writer, shape, seed, _wanted(letters, ends), quantization)
    return _finish(writer, path)


def _add_llama_weights(
    writer: GGUFWriter, shape: _Shape, seed: int, wanted: Floats, quantization: Quantization
) -> None:
    """Add the tensors, each quantized as soon as it is made, so that a large file takes its own size of memory.

    Dimension 0 of every embedding is large, and no layer writes to it; so it survives the last norm as a good
    part of the vector's length, and the output matrix finds about a constant there. Sharp attention makes the text
    depend on the whole prompt; without it, a greedy text falls into a short loop.
    """
    import numpy as np

    random = np.random.default_rng(seed)
    width = shape.width
    ones = np.ones(width, np.float32)

    def matrix(rows: int, columns: int, scale: float = 1.0) -> Floats:
        return random.standard_normal((rows, columns), np.float32) * np.float32(scale / columns**0.5)

    def sharp(rows: int, columns: int) -> Floats:
        return matrix(rows, columns, 2.0)

    def quiet(rows: int, columns: int) -> Floats:
        weights = matrix(rows, columns, 1.5 / shape.layers**0.5)
        weights[0] = 0.0
        return weights

    embeddings = matrix(len(wanted), width, width**0.5)
    embeddings[:, 0] = width**0.5
    _add(writer, "token_embd.weight", embeddings, quantization)
    _add(writer, "output_norm.weight", ones, "F32")
    _add(writer, "output.weight", _output(matrix(len(wanted), width), wanted, (width / 2) ** 0.5), quantization)
    for layer in range(shape.layers):
        for name, make, rows, columns in (
            ("attn_q", sharp, width, width),
            ("attn_k", sharp, width, width),
            ("attn_v", matrix, width, width),
            ("attn_output", quiet, width, width),
            ("ffn_gate", matrix, shape.feed_forward, width),
            ("ffn_up", matrix, shape.feed_forward, width),
            ("ffn_down", quiet, width, shape.feed_forward),
        ):
            _add(writer, f"blk.{layer}.{name}.weight", make(rows, columns), quantization)
        _add(writer, f"blk.{layer}.attn_norm.weight", ones, "F32")
        _add(writer, f"blk.{layer}.ffn_norm.weight", ones, "F32")


def _write_bert(path: Path, shape: _Shape, seed: int, *, rank: bool) -> Path:
    from gguf import GGUFWriter, PoolingType, TokenType

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = [chr(value) for value in range(0x21, 0x7F) if not chr(value).isupper()]
    tokens = [*special, *("▁" + letter for letter in letters), *letters]
    writer = GGUFWriter(path, "bert")
    _describe(writer, shape, "tiny-reranker" if rank else "tiny-embedder", "F16")
    writer.add_layer_norm_eps(1e-12)
    writer.add_causal_attention(False)
    writer.add_pooling_type(PoolingType.RANK if rank else PoolingType.MEAN)
    writer.add_tokenizer_model("bert")
    writer.add_tokenizer_pre("jina-v2-en")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL] * len(special) + [TokenType.NORMAL] * (2 * len(letters)))
    writer.add_token_type_count(2)
    writer.add_pad_token_id(0)
    writer.add_unk_token_id(1)
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(3)
    writer.add_sep_token_id(3)
    writer.add_mask_token_id(4)
    _add_bert_weights(writer, shape, seed, special=len(special), letters=len(letters), rank=rank)
    return _finish(writer, path)


def _add_bert_weights(writer: GGUFWriter, shape: _Shape, seed: int, *, special: int, letters: int, rank: bool) -> None:
    """Add the tensors. A letter has one vector, whether it begins a word or not; the other weights are small."""
    import numpy as np

    random = np.random.default_rng(seed)
    width = shape.width

    def matrix(rows: int, columns: int, scale: float = 0.1) -> Floats:
        return random.standard_normal((rows, columns), np.float32) * np.float32(scale / columns**0.5)

    def norm(name: str) -> None:
        _add(writer, f"{name}.weight", np.ones(width, np.float32), "F32")
        _add(writer, f"{name}.bias", np.zeros(width, np.float32), "F32")

    def linear(name: str, rows: int, columns: int, scale: float = 0.1) -> None:
        _add(writer, f"{name}.weight", matrix(rows, columns, scale), "F16")
        _add(writer, f"{name}.bias", np.zeros(rows, np.float32), "F32")

    letter = matrix(letters, width, width**0.5)
    _add(writer, "token_embd.weight", np.concatenate([matrix(special, width), letter, letter]), "F16")
    _add(writer, "token_types.weight", matrix(2, width), "F32")
    _add(writer, "position_embd.weight", matrix(shape.context, width), "F16")
    norm("token_embd_norm")
    for layer in range(shape.layers):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            linear(f"blk.{layer}.{name}", width, width, 1.0 if rank else 0.1)
        linear(f"blk.{layer}.ffn_up", shape.feed_forward, width)
        linear(f"blk.{layer}.ffn_down", width, shape.feed_forward)
        norm(f"blk.{layer}.attn_output_norm")
        norm(f"blk.{layer}.layer_output_norm")
    if rank:
        linear("cls", width, width, 1.0)
        linear("cls.output", 1, width, 1.0)


def _describe(writer: GGUFWriter, shape: _Shape, name: str, quantization: Quantization) -> None:
    writer.add_name(name)
    writer.add_description("A test model with weights from a seed; it knows nothing.")
    writer.add_license("GPL-3.0-or-later")
    writer.add_file_type({"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7}[quantization])
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.feed_forward)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.heads)


def _add(writer: GGUFWriter, name: str, value: Floats, quantization: Quantization) -> None:
    import numpy as np
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    if quantization in ("F32", "F16") or value.ndim == 1:
        writer.add_tensor(name, value.astype(np.float16 if quantization == "F16" and value.ndim > 1 else np.float32))
        return
    kind = GGMLQuantizationType[quantization]
    writer.add_tensor(name, quantize(value, kind), raw_dtype=kind)


def _finish(writer: GGUFWriter, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
