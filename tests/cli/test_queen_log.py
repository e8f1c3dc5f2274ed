"""What is said of a queen that did not start, and how much of her log is kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from rbee.cli import queen_log


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([], ""),
        (["listening on http://127.0.0.1:1", "rbee: Port 1 is in use. Try: another"], "Port 1 is in use. Try: another"),
        (["2026-01-02 03:04:05,678 ERROR q: no disk", "2026-01-02 03:04:06,000 INFO bye"], "q: no disk"),
        (["[2026-01-02 03:04:05 +0000] [77] [ERROR] Connection in use"], "Connection in use"),
        (["Traceback (most recent call last):", "  File x", "ModuleNotFoundError: No module named 'y'"],
         "ModuleNotFoundError: No module named 'y'"),
        (["2026-01-02 03:04:05,678 ERROR q: no boot", "    Traceback (most recent call last):", "      File x",
          "        fail()", "    rbee.errors.SetupProblem: an error"], "rbee.errors.SetupProblem: an error"),
        (['{"time":"2026-01-02T03:04:05.678Z","level":"ERROR","message":"no disk"}',
          '{"time":"2026-01-02T03:04:06.678Z","level":"INFO","message":"bye"}'], "no disk"),
        (['{"time":"2026-01-02T03:04:05.678Z","level":"ERROR","exception":"Traceback\\n  x\\nOSError: y"}'],
         "OSError: y"),
        (["{no JSON"], "{no JSON"),
        (["one", "two", ""], "two"),
    ],
)  # fmt: skip
def test_the_line_that_tells_best_why_it_ended(lines: list[str], words: str) -> None:
    assert queen_log.last_words(lines) == words


def test_a_log_that_has_grown_is_put_aside_and_the_oldest_is_forgotten(tmp_path: Path) -> None:
    log = tmp_path / "queen.log"
    for number in range(queen_log.KEPT + 2):
        log.write_bytes(b"%d" % number + bytes(queen_log.LIMIT_BYTES))
        queen_log.rotate(log)
    assert not log.exists()
    kept = sorted(tmp_path.iterdir())
    assert [path.name for path in kept] == [f"queen.log.{number}" for number in range(1, queen_log.KEPT + 1)]
    assert [path.read_bytes()[:1] for path in kept] == [b"4", b"3", b"2"]


def test_a_small_log_goes_on(tmp_path: Path) -> None:
    (tmp_path / "queen.log").write_text("short")
    queen_log.rotate(tmp_path / "queen.log")
    assert (tmp_path / "queen.log").read_text() == "short"
