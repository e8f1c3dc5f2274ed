"""How each model family from before GGUF orders its header (ctransformers 0.2.27, whisper.cpp)."""

from __future__ import annotations

from typing import NamedTuple

MAX_VOCABULARY = 1_048_576

BOUNDS: dict[str, tuple[int, int] | None] = {
    "vocabulary": (1, MAX_VOCABULARY),
    "context": (1, 1_048_576),
    "width": (1, 65_536),
    "heads": (1, 4096),
    "heads_kv": (1, 4096),
    "layers": (1, 512),
    "rotary": (0, 65_536),
    "multiple": (1, 65_536),
    "flag": (0, 1),
    "variant": (0, 1000),
    "float": None,
    "merges": (0, 4 * MAX_VOCABULARY),
    "bins": (1, 65_536),
    "ftype": (0, 9999),
}


class Layout(NamedTuple):
    """How one family orders its integers, and how its vocabulary is written.

    `names` are the families that share it; `layer` is what a layer's tensors begin with, before the layer's number;
    `each` is how many tensors a layer has, where the engine does not count them itself.
    """

    names: tuple[str, ...]
    magics: tuple[str, ...]
    fields: tuple[str, ...]
    layer: str
    each: int = 0
    counted: bool = False
    scored: bool = False
    filters: bool = False


_GPT2 = ("vocabulary", "context", "width", "heads", "layers", "ftype")
_GPTJ = ("vocabulary", "context", "width", "heads", "layers", "rotary", "ftype")
_NEOX = ("vocabulary", "context", "width", "heads", "layers", "rotary", "flag", "ftype")
_MPT = ("width", "context", "heads", "layers", "vocabulary", "float", "float", "ftype")
_REPLIT = ("width", "context", "heads", "layers", "vocabulary", "ftype")
_LLAMA = ("vocabulary", "width", "multiple", "heads", "layers", "rotary", "ftype")
_FALCON = ("vocabulary", "width", "heads", "heads_kv", "layers", "variant", "ftype")
_WHISPER = (
    "vocabulary",
    *("bins", "width", "heads", "layers"),
    *("context", "width", "heads", "layers"),
    "bins",
    "ftype",
)

LAYOUTS = (
    Layout(("gpt2", "starcoder"), ("ggml",), _GPT2, "model/h", each=12, counted=True),
    Layout(("gptj",), ("ggml",), _GPTJ, "transformer.h.", each=10, counted=True),
    Layout(("gpt_neox", "dolly-v2"), ("ggml",), _NEOX, "gpt_neox.layers.", each=12),
    Layout(("mpt",), ("ggml",), _MPT, "transformer.blocks.", each=6),
    Layout(("replit",), ("ggml",), _REPLIT, "transformer.blocks.", each=6, scored=True),
    Layout(("whisper",), ("ggml",), _WHISPER, "decoder.blocks.", counted=True, filters=True),
    Layout(("llama",), ("ggml",), _LLAMA, "layers."),
    Layout(("llama",), ("ggmf", "ggjt"), _LLAMA, "layers.", scored=True),
    Layout(("falcon",), ("ggml",), _FALCON, "transformer.h."),
    Layout(("falcon",), ("ggmf", "ggjt"), _FALCON, "transformer.h.", scored=True),
    Layout(("falcon",), ("ggcc",), (*_FALCON, "merges"), "transformer.h.", scored=True),
)
