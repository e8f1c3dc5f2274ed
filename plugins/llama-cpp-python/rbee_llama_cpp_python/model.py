"""A model of llama.cpp, by llama-cpp-python's ctypes functions.

Importing this module imports the engine. It is a thin, typed layer; no decision about jobs is made here.
"""

from __future__ import annotations

import ctypes
import os
from collections import deque

# libgomp reads it when it is loaded, so it stands before the engine. By default its threads spin for seconds while they
# wait for each other; where another program needs a core, that makes a token take up to a hundred times as long.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import llama_cpp.llama_cpp as api

from rbee.plugin import Progress
from rbee_llama_cpp_python.settings import Settings

LOG_LINES: deque[str] = deque(maxlen=20)
_LOG_WARNING, _LOG_ERROR, _LOG_CONTINUED = 3, 4, 5  # enum ggml_log_level (ggml.h)


class EngineError(RuntimeError):
    """llama.cpp refused, with its own words where it gave any."""


@api.llama_log_callback  # type: ignore[untyped-decorator]  # a ctypes callback type has no signature
def _keep_log(level: int, text: bytes, _user_data: object) -> None:
    """Keep warnings and errors: stderr is the worker's log, and llama.cpp writes hundreds of lines at each load."""
    line = text.decode("utf-8", "replace").strip()
    if line and level in (_LOG_WARNING, _LOG_ERROR):
        LOG_LINES.append(line)
    elif line and level == _LOG_CONTINUED and LOG_LINES:
        LOG_LINES[-1] += line


# Set at import and again at each load: llama_cpp sets a callback of its own that prints every line.
api.llama_log_set(_keep_log, ctypes.c_void_p(0))


def last_words() -> str:
    """Return the last warnings and errors of llama.cpp on one line."""
    return "; ".join(list(LOG_LINES)[-4:]) or "llama.cpp gave no reason"


class Model:
    """The weights and the vocabulary of one GGUF file. Its methods may be called from any thread."""

    def __init__(self, settings: Settings, progress: Progress) -> None:
        """Load a model file; raise EngineError with llama.cpp's own words when it refuses."""
        api.llama_log_set(_keep_log, ctypes.c_void_p(0))
        LOG_LINES.clear()
        api.llama_backend_init()
        params, kept = _model_params(settings, progress)
        self._pointer: int | None = api.llama_model_load_from_file(str(settings.path).encode(), params)
        del kept
        if not self._pointer:
            raise EngineError(f"llama.cpp cannot load {settings.path}: {last_words()}")
        self._vocab = api.llama_model_get_vocab(self._pointer)
        self.vocabulary_tokens = int(api.llama_vocab_n_tokens(self._vocab))
        self.trained_context_tokens = int(api.llama_model_n_ctx_train(self._pointer))
        self.embedding_width = int(api.llama_model_n_embd_out(self._pointer))
        self._pieces: dict[int, bytes] = {}

    @property
    def pointer(self) -> int:
        """The `llama_model *`; raise EngineError when the model is closed."""
        if not self._pointer:
            raise EngineError("The model is closed")
        return self._pointer

    @property
    def vocab(self) -> int:
        """The `llama_vocab *`, which lives as long as the model."""
        return int(self._vocab) if self.pointer else 0

    def close(self) -> None:
        """Free the weights; all contexts and samplers of this model must be gone."""
        pointer, self._pointer = self._pointer, None
        if pointer:
            api.llama_model_free(pointer)

    def metadata(self, key: str) -> str | None:
        """Return one value of the file's metadata as text, or None."""
        size = 256
        while True:
            buffer = ctypes.create_string_buffer(size)
            needed = api.llama_model_meta_val_str(self.pointer, key.encode(), buffer, size)
            if needed < 0:
                return None
            if needed < size:
                return buffer.value.decode("utf-8", "replace")
            size = needed + 1

    def chat_template(self) -> str | None:
        """Return the text of the model's default chat template, unrendered."""
        text = api.llama_model_chat_template(self.pointer, None)
        return text.decode("utf-8", "replace") if text else None

    def token_text(self, token: int) -> str:
        """Return a token's text in the vocabulary; empty for one that the model has not."""
        text = api.llama_vocab_get_text(self.vocab, token) if 0 <= token < self.vocabulary_tokens else None
        return text.decode("utf-8", "replace") if text else ""

    def bos(self) -> int:
        """Return the id of the token that begins a text, or -1."""
        return int(api.llama_vocab_bos(self.vocab))

    def eos(self) -> int:
        """Return the id of the token that ends a text, or -1."""
        return int(api.llama_vocab_eos(self.vocab))

    def ends(self, token: int) -> bool:
        """Tell whether a token ends the generation."""
        return bool(api.llama_vocab_is_eog(self.vocab, token))

    def can_generate(self) -> bool:
        """Tell whether text comes out of this model token by token."""
        model = self.pointer
        return not (
            api.llama_model_has_encoder(model)
            or api.llama_model_is_diffusion(model)
            or not api.llama_model_has_decoder(model)
        )

    def tokenize(self, text: str, *, special: bool) -> list[int]:
        """Return the ids of a whole prompt, begun and ended by the tokens that the vocabulary asks for.

        A text that brings the beginning token itself, as rendered chat templates do, does not get a second one.
        """
        data = text.encode("utf-8", "replace")
        size = len(data) + 8
        tokens = (api.llama_token * size)()
        count = api.llama_tokenize(self.vocab, data, len(data), tokens, size, True, special)
        if count < 0:
            raise ValueError(f"The text of {len(data)} bytes cannot be tokenized")
        ids = tokens[:count]
        bos = self.bos()
        return ids[1:] if special and bos >= 0 and ids[:2] == [bos, bos] else ids

    def piece(self, token: int) -> bytes:
        """Return the bytes that a token adds; control tokens add none, and a character may span several tokens."""
        known = self._pieces.get(token)
        if known is None:
            known = self._pieces[token] = self._read_piece(token)
        return known

    def _read_piece(self, token: int) -> bytes:
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            count = api.llama_token_to_piece(self.vocab, token, buffer, size, 0, False)
            if count >= 0:
                return buffer.raw[:count]
            size = -count


def _model_params(settings: Settings, progress: Progress) -> tuple[api.llama_model_params, list[object]]:
    """Return the parameters, and what must live until the load is over."""
    params = api.llama_model_default_params()
    params.n_gpu_layers = settings.gpu_layers
    params.load_mode = (api.LLAMA_LOAD_MODE_MMAP if settings.mmap else api.LLAMA_LOAD_MODE_NONE) + (
        api.LLAMA_LOAD_MODE_MLOCK if settings.mlock else 0
    )

    def report(fraction: float, _user_data: object) -> bool:
        progress(fraction)
        return True

    callback = api.llama_progress_callback(report)
    params.progress_callback = callback
    return params, [callback, _place(params, settings)]


def _place(params: api.llama_model_params, settings: Settings) -> object:
    """Choose the devices; return the array of shares, which must live until the load is over."""
    if not settings.gpus:
        # No layers on a GPU is not enough: a CUDA build would still hold buffers there and run large products on it.
        params.split_mode, params.main_gpu = api.LLAMA_SPLIT_MODE_NONE, -1
        return None
    if not api.llama_supports_gpu_offload():
        raise EngineError(
            "This build of llama-cpp-python runs on the CPU only, but the worker was given a GPU. "
            "Try: install llama-cpp-python with CMAKE_ARGS=-DGGML_CUDA=on, or give the worker device cpu"
        )
    if settings.main_gpu >= len(settings.gpus):
        raise ValueError(f"Option main_gpu: {settings.main_gpu} is not below the {len(settings.gpus)} gpus given")
    params.main_gpu = settings.gpus[settings.main_gpu]
    if len(settings.gpus) == 1:
        params.split_mode = api.LLAMA_SPLIT_MODE_NONE
        return None
    shares = (ctypes.c_float * int(api.llama_max_devices()))()
    for gpu, share in zip(settings.gpus, settings.tensor_split or (1.0,) * len(settings.gpus), strict=True):
        if gpu >= len(shares):
            raise ValueError(f"There is no gpu {gpu}: llama.cpp counts at most {len(shares)}")
        shares[gpu] = share
    params.split_mode = api.LLAMA_SPLIT_MODE_LAYER
    params.tensor_split = shares
    return shares
