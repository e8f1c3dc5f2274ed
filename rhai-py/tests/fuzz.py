"""Compile and run random scripts; end with status 1 if anything but a rhai.Error comes out.

usage: fuzz.py SEED CASES
"""

import random
import sys
import threading
import traceback
from pathlib import Path

import rhai

TOKENS = r"""
fn main workers w x a b ( ) { } [ ] #{ | || , ; : . ?. ?? => .. ..= = == != < > <= >= + - * / % ** << >> & ^ ! && ||=
+= -= let const if else switch do while until loop for in break continue return throw try catch this global private true
false 0 1 -1 9223372036854775807 1.5 1e308 0x7f "s" 's' `t` `${ } "\\u1F4A9" "" .len() .filter( .map( .sort( .reduce(
.first() .push( .pad( .splice( .extract( .sub_string( .replace( .split( .min_by("load") .random() .hive .load type_of(
is_def_var( is_shared( Fn( call( curry( eval import export as // /* */ @ $ ~ \ é 😀
""".split()  # noqa: SIM905 -- a list of quoted tokens could not be read
VALID = [path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.glob("scripts/*.rhai"))]
WORKERS = rhai.freeze([{"hive": f"h{i % 3}", "load": i / 7, "gpus": i, "tags": ["a", "b"]} for i in range(7)])


def soup(rng: random.Random) -> str:
    """Return tokens at random inside a function."""
    tokens = " ".join(rng.choices(TOKENS, k=rng.randint(1, 60)))
    return f"fn main(workers) {{ {tokens} }}"


def mutated(rng: random.Random) -> str:
    """Return a valid script with a few spans deleted, doubled, swapped or replaced."""
    text = rng.choice(VALID)
    for _ in range(rng.randint(1, 3)):
        start = rng.randrange(len(text) + 1)
        end = min(len(text), start + rng.randint(0, 6))
        span = text[start:end]
        change = rng.choice(["", span * 2, span[::-1], rng.choice(TOKENS), rng.choice(VALID)[start:end], span * 50])
        text = text[:start] + change + text[end:]
    return text


def run(engine: rhai.Engine, source: str) -> None:
    """Compile a script and call each of its functions."""
    script = engine.compile(source, name="fuzz")
    for function in script.functions():
        arguments = [WORKERS, {"type": "text-gen", "model": "m", "n": 3}, 7, "text", None]
        try:
            script.call(function.name, *arguments[: len(function.params)])
        except rhai.InternalError as error:
            print(f"panic: {error}\n{source}\n", file=sys.stderr)
        except rhai.Error:
            pass


def cases(seed: int, count: int) -> int:
    """Run so many cases; return how many compiled."""
    rng = random.Random(seed)
    engine = rhai.Engine(
        max_operations=5_000,
        timeout_s=0.05,
        prelude='fn least_loaded() { this.min_by("load") }',
        print=lambda _: None,
    )
    compiled = 0
    for number in range(count):
        source = soup(rng) if number % 2 else mutated(rng)
        try:
            run(engine, source)
            compiled += 1
        except rhai.Error:
            pass
        except BaseException:
            traceback.print_exc()
            print(f"case {number}:\n{source}", file=sys.stderr)
            return -1
    return compiled


def main() -> None:
    """Run on a thread with a small stack, so that recursion without a bound is found."""
    results: list[int] = []
    threading.stack_size(512 * 1024)
    thread = threading.Thread(target=lambda: results.append(cases(int(sys.argv[1]), int(sys.argv[2]))))
    thread.start()
    thread.join()
    if not results or results[0] < 0:
        sys.exit(1)
    print(results[0])


if __name__ == "__main__":
    main()
