"""Files that were changed and still accepted must not end the engine's process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
from formats_draft import read_draft
from formats_mutate import mutate

from rbee.errors import InvalidModelFile
from rbee.formats import inspect

pytest.importorskip("xllamacpp", reason="needs the engine: pip install -e ./plugins/xllamacpp")

SAMPLE = 40
HANG_GUARD_S = 280


def accepted_mutations(good: dict[str, Path], folder: Path) -> dict[Path, str]:
    """Return files that inspect accepts, half of them changed in the header and half in the weights as well."""
    random, accepted = Random(7), dict[Path, str]()
    for number in range(100 * SAMPLE):
        kind = random.choice(["chat", *good])
        path = folder / f"{number}.{kind}.gguf"
        raw, what = mutate(read_draft(good[kind]), random)
        path.write_bytes(raw)
        try:
            inspect(path)
        except InvalidModelFile:
            path.unlink()
            continue
        accepted[path] = what
        if len(accepted) == SAMPLE:
            break
    return accepted


def test_accepted_mutations_do_not_end_the_engine(llama: Path, embedder: Path, reranker: Path, tmp_path: Path) -> None:
    mutations = accepted_mutations({"chat": llama, "embedding": embedder, "rerank": reranker}, tmp_path)
    report = tmp_path / "report"
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("formats_engine.py")), str(report), *map(str, mutations)],
        env={**os.environ, "GGML_NO_BACKTRACE": "1"},
        capture_output=True,
        timeout=HANG_GUARD_S,
        check=False,
    )
    lines = [line.split(" ", 1) for line in report.read_text().splitlines()]
    last = mutations[Path(lines[-1][1])]
    assert done.returncode == 0, f"exit {done.returncode} after {last}: {done.stderr[-2000:].decode(errors='replace')}"
    outcomes = [outcome for outcome, _ in lines if outcome != "begin"]
    assert len(outcomes) == SAMPLE
    assert "answered" in outcomes
