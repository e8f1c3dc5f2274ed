"""Which worker has the start of a prompt in its cache: a guess from what was sent where.

Engines keep the keys and values of a prompt's start, and the same start is then answered sooner. A prompt is cut into
blocks, each known by the hash of all text up to its end, so equal starts have equal first hashes. Only hashes are
kept, salted anew in each process.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

BLOCK_BYTES = 512
MAX_BLOCKS = 64
MAX_HASHES = 50_000
MAX_HOLDERS = 16
"""Workers remembered for one block, the latest ones."""


def prefix_hashes(texts: Iterable[str], *, salt: str = "") -> list[int]:
    """Return the hash of each whole block of a prompt's first 32 KiB; a prompt shorter than a block has none."""
    text = "\0".join(texts)[: BLOCK_BYTES * MAX_BLOCKS]
    found, so_far = [], hash(salt)
    for start in range(0, len(text) - BLOCK_BYTES + 1, BLOCK_BYTES):
        so_far = hash((so_far, text[start : start + BLOCK_BYTES]))
        found.append(so_far)
    return found


class PrefixIndex:
    """Remembers who was sent what, the latest 50,000 blocks."""

    def __init__(self) -> None:
        self._holders: OrderedDict[int, dict[str, None]] = OrderedDict()

    def learn(self, hashes: Sequence[int], holder: str) -> None:
        """Note that a worker has been sent a prompt."""
        for block in hashes:
            holders = self._holders.setdefault(block, {})
            holders.pop(holder, None)
            holders[holder] = None
            if len(holders) > MAX_HOLDERS:
                del holders[next(iter(holders))]
            self._holders.move_to_end(block)
        while len(self._holders) > MAX_HASHES:
            self._holders.popitem(last=False)

    def match(self, hashes: Sequence[int]) -> dict[str, float]:
        """Return the share of a prompt's start that each worker has been sent; workers without any are left out."""
        found: dict[str, float] = {}
        for count, block in enumerate(hashes, 1):
            holders = self._holders.get(block)
            if not holders:
                break
            for holder in holders:
                # Only an unbroken start counts.
                if count == 1 or found.get(holder) == (count - 1) / len(hashes):
                    found[holder] = count / len(hashes)
        return found
