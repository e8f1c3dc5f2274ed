"""Which tokens go into the next step: pure decisions, no engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Piece:
    """Tokens of one slot in one step, from `position` on; `output`: the last one's logits are wanted."""

    slot: int
    tokens: Sequence[int]
    position: int
    output: bool


@dataclass(frozen=True)
class Reader:
    """A slot that still reads its prompt, of which the first `position` tokens are in the cache."""

    slot: int
    prompt: Sequence[int]
    position: int

    @property
    def remaining(self) -> int:
        """Tokens still to read."""
        return len(self.prompt) - self.position


def share(readers: Sequence[Reader], budget: int) -> list[Piece]:
    """Divide a budget of tokens evenly among prompts; what a short prompt leaves goes to the longer ones.

    So a short prompt starts to write soon, whatever else is being read, and every prompt moves while there is budget.
    """
    pieces = []
    ordered = sorted(readers, key=lambda reader: reader.remaining)
    for index, reader in enumerate(ordered):
        count = min(reader.remaining, -(-budget // (len(ordered) - index)))
        budget -= count
        if count > 0:
            end = reader.position + count
            tokens = reader.prompt[reader.position : end]
            pieces.append(Piece(reader.slot, tokens, reader.position, end == len(reader.prompt)))
    return pieces


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """Return how many tokens two sequences share from the start."""
    for index, (one, other) in enumerate(zip(left, right, strict=False)):
        if one != other:
            return index
    return min(len(left), len(right))
