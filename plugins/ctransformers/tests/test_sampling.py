"""Choosing from logits."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from rbee.plugin import Sampling
from rbee_ctransformers.sampling import check, choose, log_probability

LOGITS = np.log(np.array([0.4, 0.3, 0.2, 0.06, 0.04]))


def draw(sampling: Sampling, recent: tuple[int, ...] = (), count: int = 4000) -> Counter[int]:
    random = np.random.default_rng(1)
    return Counter(choose(LOGITS.copy(), sampling, recent, random) for _draw in range(count))


def plain(**changes: float | dict[int, float]) -> Sampling:
    """Return settings that change nothing but what is named."""
    settings: dict[str, object] = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, **changes}
    return Sampling(**settings)  # type: ignore[arg-type]  # a test's own changes


def test_draws_follow_the_probabilities() -> None:
    drawn = draw(plain())
    for token, share in enumerate(np.exp(LOGITS)):
        assert drawn[token] / 4000 == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({"top_k": 2}, {0, 1}),
        ({"top_k": 1}, {0}),
        ({"top_k": 10_000}, {0, 1, 2, 3, 4}),
        ({"top_p": 0.69}, {0, 1}),
        ({"top_p": 0.71}, {0, 1, 2}),
        ({"top_p": 0.0}, {0}),
        ({"min_p": 0.45}, {0, 1, 2}),
        ({"min_p": 1.0}, {0}),
        ({"min_p": 5.0}, {0}),
        ({"temperature": 0.0}, {0}),
        ({"temperature": 1e-9}, {0}),
        ({"logit_bias": {4: 100.0}}, {4}),
        ({"logit_bias": {0: -100.0, 1: -100.0}}, {2, 3, 4}),
    ],
)
def test_what_may_be_drawn(changes: dict[str, float], kept: set[int]) -> None:
    assert set(draw(plain(**changes))) == kept


def test_penalties_count_what_was_said() -> None:
    greedy = {"temperature": 0.0}
    assert set(draw(plain(**greedy, presence_penalty=0.2), (0,))) == {0}
    assert set(draw(plain(**greedy, presence_penalty=0.3), (0,))) == {1}
    assert set(draw(plain(**greedy, frequency_penalty=0.2), (0,))) == {0}
    assert set(draw(plain(**greedy, frequency_penalty=0.2), (0, 0))) == {1}
    assert set(draw(plain(**greedy, repeat_penalty=2.0), (0, 1))) == {2}


def test_a_hot_temperature_evens_the_draws() -> None:
    assert draw(plain(temperature=50.0))[4] / 4000 == pytest.approx(0.2, abs=0.03)


def test_log_probabilities_are_of_the_model_alone() -> None:
    assert log_probability(LOGITS + 7, 2) == pytest.approx(np.log(0.2))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"repeat_penalty": 0.0}, "repeat_penalty"),
        ({"presence_penalty": float("inf")}, "presence_penalty"),
        ({"logit_bias": {5: 1.0}}, "no token 5"),
        ({"logit_bias": {0: float("nan")}}, "logit_bias"),
        ({"json_schema": {}}, "json_schema"),
    ],
)
def test_a_bad_setting_is_refused_by_name(changes: dict[str, float], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        check(plain(**changes), 5)
