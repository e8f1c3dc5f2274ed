"""Makes a tiny GPT-2 in the GGML format of 2023, with random weights."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

WORDS = (b"<|endoftext|>", *(bytes([byte]) for byte in range(1, 256)), b" the", b"the", b" queen", b"hello", b" bee")


def write_gpt2_ggml(path: Path, *, context_tokens: int = 128, width: int = 32, layers: int = 2, seed: int = 1) -> Path:
    """Write a model that ctransformers loads as gpt2; its vocabulary is every byte but NUL, and a few words."""
    random = np.random.default_rng(seed)

    def values(*shape: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        return random.normal(0, 0.4, shape).astype(np.float32)

    tensors = {"model/ln_f/g": values(width), "model/ln_f/b": values(width)}
    tensors |= {"model/wte": values(len(WORDS), width), "model/wpe": values(context_tokens, width)}
    for layer in range(layers):
        for norm in ("ln_1", "ln_2"):
            tensors |= {f"model/h{layer}/{norm}/g": values(width), f"model/h{layer}/{norm}/b": values(width)}
        shapes = {"attn/c_attn": (3 * width, width), "attn/c_proj": (width, width)}
        shapes |= {"mlp/c_fc": (4 * width, width), "mlp/c_proj": (width, 4 * width)}
        for name, shape in shapes.items():
            tensors |= {f"model/h{layer}/{name}/w": values(*shape), f"model/h{layer}/{name}/b": values(shape[0])}
    with path.open("wb") as file:
        file.write(struct.pack("<I6iI", 0x67676D6C, len(WORDS), context_tokens, width, 4, layers, 0, len(WORDS)))
        for word in WORDS:
            file.write(struct.pack("<I", len(word)) + word)
        for name, data in tensors.items():
            sizes = data.shape[::-1]
            file.write(struct.pack(f"<3i{len(sizes)}i", len(sizes), len(name), 0, *sizes) + name.encode())
            file.write(data.tobytes())
    return path
