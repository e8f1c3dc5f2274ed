"""Time one decision over frozen records, as Python sees it: argument conversion, the script and the result.

usage: bench.py [CALLS]

Prints the least, median and greatest time, and the median for each record.
"""

import statistics
import sys
import time

import rhai

SCRIPTS = {
    "one filter, then the least": 'fn main(task, w) { w.filter(|w| w.host == "h1").min_by("load") }',
    "two filters, then the first": """fn main(task, w) {
        w.filter(|w| w.host == "h1").filter(|w| w.model == task.model).first()
    }""",
    "least, without a closure": 'fn main(task, w) { w.min_by("load") }',
    "loop over all": 'fn main(task, w) { let n = 0; for x in w { if x.host == "h1" { n += 1; } } n }',
    "nothing": "fn main(task, w) { 1 }",
}
TASK = {"type": "text-gen", "model": "m0", "priority": "high", "tokens": 512}


def records(count: int) -> rhai.Frozen:
    """Make records of a dozen properties."""
    return rhai.freeze(
        [
            {
                "id": f"w{n}",
                "host": f"h{n % 3}",
                "model": f"m{n % 2}",
                "load": (n * 37) % 101 / 100,
                "gpus": 1 + n % 4,
                "memory_bytes": n << 30,
                "state": "ready",
                "backend": "cuda",
                "region": "eu",
                "queue": n % 7,
                "tags": ["a", "b"],
                "tenant": None,
            }
            for n in range(count)
        ]
    )


def timed(script: rhai.Script, frozen: rhai.Frozen, calls: int) -> list[float]:
    """Return the time of each call in microseconds, in ascending order."""
    times = []
    for _ in range(calls):
        start = time.perf_counter_ns()
        script.call("main", TASK, frozen)
        times.append((time.perf_counter_ns() - start) / 1000)
    return sorted(times)


def main() -> None:
    """Print a line for each script and number of records."""
    calls = int(sys.argv[1]) if len(sys.argv) > 1 else 500
    engine = rhai.Engine(timeout_s=1.0)
    print(f"{'':30}{'records':>8}{'min µs':>10}{'median µs':>11}{'max µs':>10}{'µs/record':>11}")
    for name, source in SCRIPTS.items():
        script = engine.compile(source)
        for count in (100, 1000):
            times = timed(script, records(count), calls)
            median = statistics.median(times)
            print(f"{name:30}{count:8}{times[0]:10.1f}{median:11.1f}{times[-1]:10.1f}{median / count:11.2f}")


if __name__ == "__main__":
    main()
