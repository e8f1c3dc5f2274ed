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
_OPENING_TOKENS = 6
_OPENING_WEIGHT = 6.0
"""A long answer's first tokens decide which answer it is; the rest follows from them, and would drown them."""
_SHORT_TOKENS = 48
_SHORT_WEIGHT = 4.0
"""Short answers are mostly calls and echoes, where each token is copied from the prompt."""
_GLIMPSE_TOKENS = 12
_IMPOSED_WEIGHT = 0.02
"""For tokens that only a grammar brings about. Small enough that min-p sampling never picks them by itself."""


@dataclass(frozen=True)
class Example:
    """A text, cut where the last answer begins."""

    prompt: str
    answer: str
    imposed: str = ""
    """The answer's tokens up to the first one that starts with this are the server's doing, not the network's."""
    glimpse: bool = False
    """Show only the answer's opening: choosing the answer needs far more practice than finishing it."""

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
    weights = [*_prompt_weights(prompt.tokens), *_answer_weights(answer.tokens, example.imposed)]
    kept = len(prompt.ids) + (_GLIMPSE_TOKENS if example.glimpse else len(answer.ids))
    return Encoded(np.array(prompt.ids + answer.ids, np.int32)[:kept], np.array(weights, np.float32)[:kept])


def _prompt_weights(tokens: Sequence[str]) -> Iterator[float]:
    """Earlier answers in a dialogue count like the last one, everything else a little."""
    answered: int | None = None
    for token in tokens:
        yield _PROMPT_WEIGHT if answered is None else _long_answer_weight(answered)
        if token == ASSISTANT:
            answered = 0
        elif answered is not None:
            answered = None if token == EOS else answered + 1


def _answer_weights(tokens: Sequence[str], imposed: str) -> Iterator[float]:
    start = _imposed_tokens(tokens, imposed)
    for place in range(len(tokens)):
        if place < start:
            yield _IMPOSED_WEIGHT
        else:
            yield _SHORT_WEIGHT if len(tokens) <= _SHORT_TOKENS else _long_answer_weight(place)


def _long_answer_weight(place: int) -> float:
    return _OPENING_WEIGHT if place < _OPENING_TOKENS else 1.0


def _imposed_tokens(tokens: Sequence[str], imposed: str) -> int:
    if not imposed:
        return 0
    return next(index for index, token in enumerate(tokens, 1) if token.startswith(imposed))
