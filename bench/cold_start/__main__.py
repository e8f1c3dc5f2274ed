"""Time whole processes from start to end, in turns: `rbee infer` with and without a queen, and llama_cpp.

usage: python -m bench.cold_start [--rounds N]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path

from bench.figures import conditions, ratio, spread, table

PROMPT = "How do I add a machine?"
MAX_TOKENS = "16"
RBEE = str(Path(sys.executable).with_name("rbee"))
INFER = (RBEE, "infer", "-p", PROMPT, "--max-tokens", MAX_TOKENS, "--temperature", "0")
FIRST, AGAIN, WARM = "rbee infer, first ever", "rbee infer, no queen running", "rbee infer, queen and worker up"
LLAMA_CPP, BARE = "llama_cpp.Llama in a script", "python -c pass"
LIMIT_S = 120.0


def main() -> None:
    """Run the rounds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    print(conditions(["rbee", "xllamacpp", "llama-cpp-python"]), end="\n\n", flush=True)
    times: dict[str, list[float]] = {name: [] for name in (FIRST, AGAIN, WARM, LLAMA_CPP, BARE)}
    answers: dict[str, set[str]] = {name: set() for name in times}
    for _ in range(rounds):
        for name, seconds, answer in one_round():
            times[name].append(seconds)
            answers[name].add(answer)
    rows = [[name, *spread(of).cells(3), _against(of, times[LLAMA_CPP])] for name, of in times.items()]
    print(table(["whole process", "min s", "median s", "max s", "of llama_cpp's (min / median / max)"], rows))
    said = {answer for name, of in answers.items() if name != BARE for answer in of}
    print(f"\nAll answered: {said.pop()!r}" if len(said) == 1 else f"\nThe answers differ: {answers}")


def one_round() -> list[tuple[str, float, str]]:
    """Time each contender once, and return its name, seconds and answer."""
    with tempfile.TemporaryDirectory(prefix="rbee-bench-") as home:
        # Free ports, so that a queen of the person's own goes on undisturbed.
        env = {**os.environ, "RBEE_HOME": home, "RBEE_QUEEN_PORT": "0", "RBEE_HIVE_PORT": "0"}
        try:
            first = timed(FIRST, INFER, env)
            warm = timed(WARM, INFER, env)
            stop(env)
            again = timed(AGAIN, INFER, env)
        finally:
            stop(env)
    model = str(resources.files("rbee") / "models" / "rbee-demo.gguf")
    script = str(Path(__file__).with_name("llama_cpp_answer.py"))
    other = timed(LLAMA_CPP, (sys.executable, script, model, PROMPT, MAX_TOKENS), os.environ)
    return [first, warm, again, other, timed(BARE, (sys.executable, "-c", "pass"), os.environ)]


def timed(name: str, command: Sequence[str], env: Mapping[str, str]) -> tuple[str, float, str]:
    """Run a process to its end. Raises: RuntimeError with what it said when it fails or answers nothing."""
    started = time.perf_counter()
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=LIMIT_S, stdin=subprocess.DEVNULL)
    seconds = time.perf_counter() - started
    answer = done.stdout.strip()
    if done.returncode or (not answer and name != BARE):
        raise RuntimeError(f"{' '.join(command)} ended with code {done.returncode}: {done.stderr.strip()}")
    return name, seconds, answer


def stop(env: Mapping[str, str]) -> None:
    """End the queen of this home, with its hive and worker."""
    subprocess.run((RBEE, "queen", "stop"), env=env, capture_output=True, timeout=LIMIT_S, stdin=subprocess.DEVNULL)


def _against(times: Sequence[float], others: Sequence[float]) -> str:
    found = ratio(times, others)
    return found.text(2) if found else "-"


if __name__ == "__main__":
    main()
