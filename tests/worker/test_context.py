"""The context that a worker gives when nobody said how long."""

from __future__ import annotations

import pytest

from rbee.worker.context import default_context

GIB = 1 << 30


@pytest.mark.parametrize(
    ("trained", "bytes_per_token", "slots", "memory", "expected"),
    [
        (131_072, 131_072, 4, 16 * GIB, 4096),
        (131_072, 131_072, 4, 64 * GIB, 16_384),
        (131_072, 131_072, 1, 16 * GIB, 16_384),
        (131_072, 131_072, 4, 4 * GIB, 2048),
        (2048, 2560, 4, 24 * GIB, 2048),
        (512, 131_072, 4, 1 * GIB, 512),
        (32_768, 0, 4, 16 * GIB, 16_384),
        (0, 131_072, 4, 16 * GIB, 0),
    ],
)
def test_it_fits_the_machine(trained: int, bytes_per_token: int, slots: int, memory: int, expected: int) -> None:
    assert default_context(trained, bytes_per_token, slots, memory) == expected
