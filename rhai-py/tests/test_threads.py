"""A running script does not hold the GIL, and many threads may share one script."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

import rhai

HANG_GUARD_S = 60.0


def test_other_threads_run_while_a_script_does() -> None:
    """The script loops until Python, on another thread, has answered: with the GIL held it would not end."""
    started, seen = threading.Event(), threading.Event()
    engine = rhai.Engine(max_operations=2**62, timeout_s=HANG_GUARD_S)
    engine.register("started", started.set)
    engine.register("seen", seen.is_set)
    script = engine.compile("fn main() { started(); while !seen() { for i in 0..20000 { i + 1; } } true }")
    progress: list[int] = []

    def answer() -> None:
        started.wait(HANG_GUARD_S)
        progress.extend(range(1000))
        seen.set()

    other = threading.Thread(target=answer)
    other.start()

    assert script.call("main") is True
    other.join()
    assert len(progress) == 1000


def test_python_thread_makes_progress_during_one_uninterrupted_run() -> None:
    """No callable is involved: the GIL is free from the first operation to the deadline."""
    script = rhai.Engine(max_operations=2**62, timeout_s=1.0).compile("fn main() { loop { } }")
    running, counted = threading.Event(), [0]

    def count() -> None:
        while not running.is_set():
            counted[0] += 1

    other = threading.Thread(target=count)
    other.start()
    before = counted[0]
    with pytest.raises(rhai.LimitError):
        script.call("main")
    during = counted[0] - before
    running.set()
    other.join()

    # With the GIL held, the other thread could run only in the moments before and after the call.
    assert during > 100_000


def test_one_script_on_many_threads() -> None:
    workers = rhai.freeze([{"n": n} for n in range(100)])
    engine = rhai.Engine(timeout_s=HANG_GUARD_S)
    engine.register("twice", lambda n: n * 2)
    script = engine.compile("fn main(w, n) { let at = n; [w.find(|x| x.n == at), twice(n)] }")

    def call(n: int) -> bool:
        record, doubled = script.call("main", workers, n % 100)
        return (record.index, doubled) == (n % 100, 2 * (n % 100))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(call, range(4000)))


def test_budgets_of_threads_are_their_own() -> None:
    engine = rhai.Engine(max_operations=20_000, timeout_s=HANG_GUARD_S)
    script = engine.compile("fn main(n) { let i = 0; while i < n { i += 1; } i }")

    def call(n: int) -> str:
        try:
            return str(script.call("main", n))
        except rhai.LimitError as error:
            return error.limit

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(call, [500, 10**9] * 50))
    assert results == ["500", "operations"] * 50


@pytest.mark.parametrize("stack_kib", [128, 256, 16_384])
def test_thread_with_any_stack(stack_kib: int) -> None:
    engine = rhai.Engine(timeout_s=HANG_GUARD_S)
    results: list[object] = []

    def work() -> None:
        script = engine.compile("fn f(n) { if n == 0 { 0 } else { 1 + f(n - 1) } } fn main() { f(12) }")
        results.append(script.call("main"))

    before = threading.stack_size(stack_kib * 1024)
    try:
        thread = threading.Thread(target=work)
        thread.start()
    finally:
        threading.stack_size(before)
    thread.join()
    assert results == [12]
