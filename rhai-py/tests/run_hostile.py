"""Run one script of tests/hostile, in a process of its own, and print how it ended.

usage: run_hostile.py SCRIPT STACK_KIB
"""

import resource
import sys
import threading
from pathlib import Path

import rhai

MEMORY_BYTES = 2 * 1024**3

# Far more than any of them takes, so that it does not depend on the load of the machine which limit is reached first.
TIMEOUT_S = 60.0


def outcome(source: str) -> str:
    """Return "value", or the class and the limit of the error."""
    workers = rhai.freeze([{"hive": "a", "load": 0.5}, {"hive": "b", "load": 0.25}, {"hive": "c", "load": 1}])
    try:
        rhai.Engine(timeout_s=TIMEOUT_S).compile(source, name="hostile").call("main", workers)
    except rhai.LimitError as error:
        return f"LimitError {error.limit}"
    except rhai.Error as error:
        return type(error).__name__
    return "value"


def main() -> None:
    """Run the script on a thread with the given stack."""
    source = Path(sys.argv[1]).read_text(encoding="utf-8")
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    threading.stack_size(int(sys.argv[2]) * 1024)
    thread = threading.Thread(target=lambda: print(outcome(source)))
    thread.start()
    thread.join()


if __name__ == "__main__":
    main()
