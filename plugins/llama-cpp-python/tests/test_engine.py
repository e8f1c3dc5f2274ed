"""The batching loop over a decoder that fails on demand: what no real model does when asked."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from rbee_llama_cpp_python.batching import Piece, Reader, common_prefix, share
from rbee_llama_cpp_python.engine import DecodeFailed, Engine, Job

POISON = 666
END = 0


class CountingDecoder:
    """A model that answers each prompt with the numbers after its last token, and cannot decode POISON."""

    context_tokens = 64

    def __init__(self) -> None:
        self.cache: dict[int, list[int]] = {}
        self.batches: list[list[Piece]] = []
        self.can_go_back = True
        self.last: list[int] = []

    def decode(self, pieces: Sequence[Piece]) -> int:
        self.batches.append(list(pieces))
        self.last = []
        for piece in pieces:
            cached = self.cache.setdefault(piece.slot, [])
            assert piece.position == len(cached), "a piece must follow what its slot holds"
            for token in piece.tokens:
                if token == POISON:
                    return 1
                cached.append(token)
                self.last.append(token)
        return 0

    def keep(self, slot: int, tokens: int) -> bool:
        cached = self.cache.setdefault(slot, [])
        if tokens and len(cached) > tokens and not self.can_go_back:
            return False
        del cached[tokens:]
        return True


class NextNumber:
    """Chooses the number after the last one, and END after a given one."""

    def __init__(self, decoder: CountingDecoder, last: int) -> None:
        self.decoder = decoder
        self.stop_at = last
        self.closed = 0

    def sample(self, output: int) -> int | None:
        token = self.decoder.last[output]
        if token == self.stop_at:
            return END
        if token == POISON - 100:
            raise ArithmeticError("this sampler breaks")
        return token + 1

    def close(self) -> None:
        self.closed += 1


class Numbers:
    """Token n is the text n."""

    def ends(self, token: int) -> bool:
        return token == END

    def piece(self, token: int) -> bytes:
        return str(token).encode()


@pytest.fixture
def decoder() -> CountingDecoder:
    return CountingDecoder()


@pytest.fixture
def engine(decoder: CountingDecoder) -> Iterator[Engine]:
    engine = Engine(decoder, Numbers(), slots=3, batch_tokens=16, prompt_chunk_tokens=4)
    yield engine
    engine.close()


def count(engine: Engine, decoder: CountingDecoder, prompt: list[int], last: int) -> list[int]:
    sampler = NextNumber(decoder, last)
    try:
        job = engine.generate(lambda: Job(prompt, None, sampler, lambda: False))
        return [token.id for token in job]
    finally:
        assert sampler.closed == 1


def test_jobs_that_cannot_be_decoded_end_alone(engine: Engine, decoder: CountingDecoder) -> None:
    barrier = threading.Barrier(6)

    def run(prompt: list[int]) -> list[int] | Exception:
        barrier.wait(30)
        try:
            return count(engine, decoder, prompt, prompt[0] + 30)
        except (DecodeFailed, ArithmeticError) as error:
            return error

    prompts = [[100], [POISON - 3], [200], [POISON], [300], [POISON - 101]]
    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(run, prompts))
    assert results[0::2] == [list(range(start + 1, start + 31)) for start in (100, 200, 300)]
    assert [type(result) for result in results[1::2]] == [DecodeFailed, DecodeFailed, ArithmeticError]
    assert "no room" in str(results[1])


def test_a_prompt_starts_from_what_its_slot_still_holds(engine: Engine, decoder: CountingDecoder) -> None:
    first = count(engine, decoder, [10, 11, 12], 15)
    decoder.batches.clear()
    assert count(engine, decoder, [10, 11, 12, *first, 40], 42) == [41, 42]
    assert decoder.batches[0] == [Piece(0, [40], 6, True)]


def test_the_last_prompt_token_is_decoded_again_for_its_logits(engine: Engine, decoder: CountingDecoder) -> None:
    assert count(engine, decoder, [10, 11, 12], 15) == count(engine, decoder, [10, 11, 12], 15)


def test_the_slot_with_the_longest_common_prefix_is_chosen(engine: Engine, decoder: CountingDecoder) -> None:
    held = threading.Event()
    other = engine.generate(lambda: Job([50, 51, 52], None, NextNumber(decoder, 10_000), held.is_set))
    next(other)
    count(engine, decoder, [70, 71, 72, 73], 75)
    held.set()
    list(other)
    decoder.batches.clear()
    count(engine, decoder, [50, 51, 52, 99], 99)
    assert decoder.batches[0][0].position == 3


def test_a_memory_that_cannot_go_back_is_read_anew(engine: Engine, decoder: CountingDecoder) -> None:
    count(engine, decoder, [10, 11, 12], 15)
    decoder.can_go_back = False
    assert count(engine, decoder, [10, 11, 30], 32) == [31, 32]


def test_a_failed_batch_that_cannot_be_taken_back_ends_its_jobs(engine: Engine, decoder: CountingDecoder) -> None:
    decoder.can_go_back = False
    decoder.context_tokens = 10**9
    writing = engine.generate(lambda: Job([1000, 1001], None, NextNumber(decoder, 10_000), lambda: False))
    next(writing)
    with pytest.raises(DecodeFailed):
        count(engine, decoder, [1, 2, POISON], 5)
    with pytest.raises(DecodeFailed):
        list(writing)
    assert count(engine, decoder, [10], 12) == [11, 12]


def test_a_broken_loop_fails_its_jobs_and_takes_no_more(
    engine: Engine, decoder: CountingDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode(_pieces: Sequence[Piece]) -> int:
        raise MemoryError("no memory")

    monkeypatch.setattr(decoder, "decode", explode)
    with pytest.raises(RuntimeError, match="no memory"):
        count(engine, decoder, [1], 2)
    with pytest.raises(RuntimeError, match="shutting down"):
        count(engine, decoder, [1], 2)


def test_closing_fails_jobs_that_wait(decoder: CountingDecoder) -> None:
    engine = Engine(decoder, Numbers(), slots=1, batch_tokens=4, prompt_chunk_tokens=2)
    decoder.context_tokens = 10**9
    running = engine.generate(lambda: Job([1000], None, NextNumber(decoder, 0), lambda: False))
    next(running)
    with ThreadPoolExecutor(1) as pool:
        submitted = threading.Event()

        def make_job() -> Job:
            submitted.set()
            return Job([1000], None, NextNumber(decoder, 0), lambda: False)

        waiting = pool.submit(lambda: list(engine.generate(make_job)))
        assert submitted.wait(30)
        engine.close()
        with pytest.raises(RuntimeError, match="shutting down"):
            waiting.result(30)
    with pytest.raises(RuntimeError, match="shutting down"):
        list(running)


@pytest.mark.parametrize(
    ("lengths", "budget", "expected"),
    [
        ((100,), 30, {0: 30}),
        ((100, 100), 30, {0: 15, 1: 15}),
        ((100, 3), 30, {1: 3, 0: 27}),
        ((2, 3, 4), 30, {0: 2, 1: 3, 2: 4}),
        ((50, 50, 50), 2, {0: 1, 1: 1}),
        ((50,), 0, {}),
        ((), 30, {}),
    ],
)
def test_a_budget_is_shared_evenly_and_wholly(lengths: tuple[int, ...], budget: int, expected: dict[int, int]) -> None:
    pieces = share([Reader(slot, [7] * length, 0) for slot, length in enumerate(lengths)], budget)
    assert {piece.slot: len(piece.tokens) for piece in pieces} == expected
    assert all(piece.output == (len(piece.tokens) == lengths[piece.slot]) for piece in pieces)


@pytest.mark.parametrize(
    ("left", "right", "shared"), [([], [1], 0), ([1, 2], [1, 2, 3], 2), ([1, 2, 3], [1, 9, 3], 1), ([1], [2], 0)]
)
def test_common_prefix(left: list[int], right: list[int], shared: int) -> None:
    assert common_prefix(left, right) == shared
