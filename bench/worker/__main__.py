"""Measure the tokens/s of whole answers, streamed to 1 and to several clients, of all contenders in turns.

usage: python -m bench.worker [--rounds N] [--clients N] [--requests N] [--max-tokens N] [--quantization Q]
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import msgspec

from bench.figures import conditions, ratio, spread, table
from bench.worker import contenders
from bench.worker.contenders import Contender, all_running
from bench.worker.load import Order, Result
from rbee.testing.models import Quantization, write_random_gguf

MODEL_BYTES = 150_000_000

PACKAGES = ("rbee", "xllamacpp", "llama-cpp-python", "uvicorn")
COMPARED = (
    (contenders.WORKER, contenders.SERVER),
    (contenders.WORKER, contenders.TUNED_SERVER),
    (contenders.LLAMA_WORKER, contenders.SERVER),
    (contenders.LLAMA_WORKER, contenders.TUNED_SERVER),
    (contenders.QUEEN, contenders.WORKER),
    (contenders.QUEEN, contenders.ENGINE),
    (contenders.WORKER, contenders.ENGINE),
)


class Measured(Result, frozen=True):
    """What clients got, and the CPU time that it took the contender to answer."""

    server_cpu_s: float = 0.0


Results = dict[tuple[int, str], list[Measured]]


def main() -> None:
    """Make the model, run the rounds, print the tables."""
    given = _arguments()
    threads = len(os.sched_getaffinity(0))
    print(conditions(PACKAGES), flush=True)
    results: Results = defaultdict(list)
    with random_model(given.quantization) as model, all_running(model, given.clients, threads) as running:
        size_mb = model.stat().st_size / 1e6
        tokens = f"{given.requests} x {given.max_tokens} tokens a client"
        print(f"Model of {size_mb:.0f} MB in {given.quantization}, {threads} threads, {tokens}, {given.rounds} rounds.")
        for number in range(given.rounds + 1):
            for clients in (1, given.clients):
                for contender in running[number % len(running) :] + running[: number % len(running)]:
                    result = measured(contender, clients, given, f"{number}.{running.index(contender)}")
                    if number:  # the first round warms everything up
                        results[clients, contender.name].append(result)
    for clients in (1, given.clients):
        of = {contender.name: results[clients, contender.name] for contender in running}
        print(f"\n{clients} client{'s' * (clients > 1)}:\n\n{figures(of)}\n\n{ratios(of)}")
    for (clients, name), of_one in results.items():
        for problem in sorted({answer.problem for one in of_one for answer in one.answers if answer.problem})[:2]:
            print(f"\nnot whole: {name}, {clients} clients: {problem}")


def measured(contender: Contender, clients: int, given: argparse.Namespace, label: str) -> Measured:
    """Let the clients of one measurement ask a contender."""
    order = Order(
        url=contender.url,
        token=contender.token,
        model=contenders.MODEL,
        clients=clients,
        requests=given.requests,
        max_tokens=given.max_tokens,
        label=label,
    )
    command = [sys.executable, "-m", "bench.worker.load"]
    before_s = contender.cpu_s()
    done = subprocess.run(command, input=msgspec.json.encode(order), capture_output=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the clients failed: {done.stderr.decode(errors='replace')}")
    got = msgspec.json.decode(done.stdout, type=Result)
    return Measured(got.seconds, got.cpu_s, got.answers, contender.cpu_s() - before_s)


def figures(results: dict[str, list[Measured]]) -> str:
    """Return the table of what was measured."""
    rows = []
    for name, of in results.items():
        whole, asked = sum(one.whole for one in of), sum(len(one.answers) for one in of)
        first = [answer.first_token_s * 1000 for one in of for answer in one.answers if not answer.problem]
        rows.append(
            [
                name,
                f"{whole} of {asked}",
                *spread(one.tokens_per_s for one in of).cells(1),
                f"{spread(first).median:.0f}" if first else "-",
                spread(1000 * one.server_cpu_s / one.tokens for one in of).text(1) if whole == asked else "-",
                f"{spread(100 * one.cpu_s / one.seconds for one in of).median:.0f} %",
            ]
        )
    head = [
        "",
        "whole answers",
        "tokens/s min",
        "median",
        "max",
        "first token ms, median",
        "server CPU ms/token",
        "clients' CPU",
    ]
    return table(head, rows)


def ratios(results: dict[str, list[Measured]]) -> str:
    """Return the table of ratios, each taken within its round."""
    speeds = {name: [one.tokens_per_s for one in of] for name, of in results.items()}
    rows = []
    for one, other in COMPARED:
        found = ratio(speeds[one], speeds[other])
        rows.append([f"{one} / {other}", *(found.cells(2) if found else ["-"] * 3)])
    return table(["ratio of tokens/s", "min", "median", "max"], rows)


@contextlib.contextmanager
def random_model(quantization: Quantization) -> Iterator[Path]:
    """Yield a model file with random weights that is deleted at last."""
    with tempfile.TemporaryDirectory(prefix="rbee-bench-") as folder:
        path = Path(folder) / f"{contenders.MODEL}.gguf"
        yield write_random_gguf(path, MODEL_BYTES, quantization=quantization)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds, after one that is not counted")
    parser.add_argument("--clients", type=int, default=8, help="clients at once, beside the measurement with one")
    parser.add_argument("--requests", type=int, default=1, help="requests of each client, one after the other")
    parser.add_argument("--max-tokens", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--quantization", choices=get_args(Quantization), default="Q8_0", help="of the weights")
    return parser.parse_args()


if __name__ == "__main__":
    main()
