"""Training examples: which text a server would show the network, and which continuation it learns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from dialogue import ASSISTANT, BOS, EOS, Message, render

_PROMPT_WEIGHT = 0.05
"""Reading is learned a little too: it teaches the network the words that it must copy."""
_IMPOSED_WEIGHT = 0.02
"""For tokens that only a grammar brings about. Small enough that min-p sampling never picks them by itself."""


@dataclass(frozen=True)
class Example:
    """A text, cut where the last answer begins."""

    prompt: str
    answer: str
    imposed: str = ""
    """The answer's tokens up to the first one that starts with this are the server's doing, not the network's."""

    @classmethod
    def of_dialogue(cls, messages: Sequence[Message], tools: Sequence[Message] = (), imposed: str = "") -> Example:
        """Learn the assistant's messages; the last message must be one."""
        text = render(messages, tools)
        cut = text.rindex(ASSISTANT) + len(ASSISTANT)
        return cls(text[:cut], text[cut:], imposed)

    @classmethod
    def of_text(cls, prompt: str, answer: str) -> Example:
        """Learn plain text without roles, as /v1/completions sends it."""
        return cls(BOS + prompt, answer + EOS)


@dataclass(frozen=True)
class Encoded:
    """Token ids and how much each one counts in the loss."""

    tokens: NDArray[np.int32]
    weights: NDArray[np.float32]


def encode(example: Example, tokenizer: Tokenizer) -> Encoded:
    """Turn one example into ids and weights of equal length."""
    prompt = tokenizer.encode(example.prompt, add_special_tokens=False)
    answer = tokenizer.encode(example.answer, add_special_tokens=False)
    weights = [*_prompt_weights(prompt.tokens), *[1.0] * len(answer.ids)]
    for position in range(_imposed_tokens(answer.tokens, example.imposed)):
        weights[len(prompt.ids) + position] = _IMPOSED_WEIGHT
    return Encoded(np.array(prompt.ids + answer.ids, np.int32), np.array(weights, np.float32))


def _prompt_weights(tokens: Sequence[str]) -> Iterator[float]:
    """Earlier answers in a dialogue count in full, everything else a little."""
    answering = False
    for token in tokens:
        yield 1.0 if answering else _PROMPT_WEIGHT
        answering = token == ASSISTANT or (answering and token != EOS)


def _imposed_tokens(tokens: Sequence[str], imposed: str) -> int:
    if not imposed:
        return 0
    return next(index for index, token in enumerate(tokens, 1) if token.startswith(imposed))
