"""A hive that a person starts by hand."""

from __future__ import annotations

import pytest

from rbee.cli.programs import hive_arguments


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], ["--queen", "http://127.0.0.1:7833"]),
        (["--port", "7900"], ["--port", "7900", "--queen", "http://127.0.0.1:7833"]),
        (["--queen", "http://queen:7833"], ["--queen", "http://queen:7833"]),
        (["--queen=http://queen:7833"], ["--queen=http://queen:7833"]),
    ],
)
def test_it_reports_to_this_machines_queen_unless_told_of_another(given: list[str], expected: list[str]) -> None:
    assert hive_arguments(given) == expected
