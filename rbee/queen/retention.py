"""How long the queen's records are kept."""

from __future__ import annotations

from dataclasses import dataclass

DAY_S = 86400.0
MAX_KEEP_DAYS = 36_500


@dataclass(frozen=True)
class Retention:
    """How long records are kept. `results` are the answers of jobs that nobody waited for, and files."""

    jobs_s: float = 30 * DAY_S
    results_s: float = 7 * DAY_S
    usage_s: float = 400 * DAY_S


RETENTION = Retention()
"""What holds where the operator says nothing."""
