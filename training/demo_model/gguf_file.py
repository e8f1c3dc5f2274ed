"""Writes the trained network as a GGUF file that llama.cpp loads."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from gguf import GGUFWriter, TokenType

from dialogue import BOS, CONTROL_TOKENS, EOS, PAD, TEMPLATE_FILE, VISIBLE_TOKENS
from network import Params, Shape
from tokens import Vocabulary

DESCRIPTION = (
    "rbee's built-in demo model. It answers questions about using rbee, calls simple tools, and knows nothing else."
)
_FILE_TYPE_MOSTLY_F16 = 1


def write_gguf(path: Path, params: Params, shape: Shape, vocabulary: Vocabulary) -> None:
    """Write `path` in one step, so that a reader never sees half a file. Matrices are f16, norms f32."""
    partial = path.with_suffix(".partial")
    writer = GGUFWriter(partial, "llama")
    _describe(writer, shape)
    _add_tokenizer(writer, shape, vocabulary)
    _add_weights(writer, params)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(partial, path)


def padded_vocabulary(vocabulary: Vocabulary) -> int:
    """Round the number of tokens up to a multiple of 32, the block that CPU kernels like."""
    return -(-len(vocabulary.tokens) // 32) * 32


def _describe(writer: GGUFWriter, shape: Shape) -> None:
    writer.add_name("rbee-demo")
    writer.add_description(DESCRIPTION)
    writer.add_license("GPL-3.0-or-later")
    writer.add_author("the rbee project")
    writer.add_languages(["en"])
    writer.add_file_type(_FILE_TYPE_MOSTLY_F16)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.hidden)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.heads)
    writer.add_layer_norm_rms_eps(shape.norm_epsilon)
    writer.add_rope_dimension_count(shape.head_width)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_vocab_size(shape.vocabulary)


def _add_tokenizer(writer: GGUFWriter, shape: Shape, vocabulary: Vocabulary) -> None:
    tokens = list(vocabulary.tokens)
    unused = [f"<|unused{index}|>" for index in range(shape.vocabulary - len(tokens))]
    kinds = [_token_type(token) for token in tokens] + [TokenType.UNUSED] * len(unused)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens + unused)
    writer.add_token_types(kinds)
    writer.add_token_merges([f"{left} {right}" for left, right in vocabulary.merges])
    writer.add_bos_token_id(tokens.index(BOS))
    writer.add_eos_token_id(tokens.index(EOS))
    writer.add_eot_token_id(tokens.index(EOS))
    writer.add_pad_token_id(tokens.index(PAD))
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_chat_template(TEMPLATE_FILE.read_text("utf-8").rstrip("\n"))


def _token_type(token: str) -> TokenType:
    if token in CONTROL_TOKENS:
        return TokenType.CONTROL
    return TokenType.USER_DEFINED if token in VISIBLE_TOKENS else TokenType.NORMAL


def _add_weights(writer: GGUFWriter, params: Params) -> None:
    def matrix(name: str, value: object) -> None:
        writer.add_tensor(f"{name}.weight", np.asarray(value, dtype=np.float16))

    def vector(name: str, value: object) -> None:
        writer.add_tensor(f"{name}.weight", np.asarray(value, dtype=np.float32))

    matrix("token_embd", params["token_embd"])
    vector("output_norm", params["output_norm"])
    for index, layer in enumerate(params["layers"]):
        for name, value in layer.items():
            (vector if name.endswith("norm") else matrix)(f"blk.{index}.{name}", value)
