"""Read the tokens that an answer reports as it passes, in the words of each dialect."""

from __future__ import annotations

import msgspec
from msgspec import Struct


class _Usage(Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cache_read_input_tokens: int = 0


class _Inner(Struct):
    usage: _Usage | None = None


class _Timings(Struct):
    """llama.cpp's own: told on the last chunk even when the client asked for no usage."""

    prompt_n: int = 0
    cache_n: int = 0
    predicted_n: int = 0


class _Body(Struct):
    usage: _Usage | None = None
    message: _Inner | None = None
    response: _Inner | None = None
    timings: _Timings | None = None


_decoder = msgspec.json.Decoder(_Body)


class UsageReader:
    """The largest token counts seen so far: streams repeat and refine them."""

    def __init__(self) -> None:
        self.prompt = 0
        self.generated = 0

    def whole(self, body: bytes) -> None:
        """Read a whole JSON body."""
        if b'"usage"' in body[-4096:] or b'"usage"' in body[:4096] or b'"timings"' in body[-4096:]:
            self._read(body)

    def part(self, data: bytes) -> None:
        """Read whole server-sent events; most have no usage and cost one search."""
        if b'"usage":{' not in data and b'"timings"' not in data and b'"usage": {' not in data:
            return
        for line in data.split(b"\n"):
            if line.startswith(b"data:") and (b'"usage"' in line or b'"timings"' in line):
                self._read(line[5:])

    def _read(self, body: bytes) -> None:
        try:
            read = _decoder.decode(body)
        except msgspec.DecodeError:
            return
        for usage in (read.usage, read.message and read.message.usage, read.response and read.response.usage):
            if usage:
                self.prompt = max(self.prompt, usage.prompt_tokens, usage.input_tokens + usage.cache_read_input_tokens)
                self.generated = max(self.generated, usage.completion_tokens, usage.output_tokens)
        if read.timings:
            self.prompt = max(self.prompt, read.timings.prompt_n + read.timings.cache_n)
            self.generated = max(self.generated, read.timings.predicted_n)
