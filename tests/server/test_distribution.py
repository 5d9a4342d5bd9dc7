"""Buckets, quantiles of the last minute, and what Prometheus is told."""

from __future__ import annotations

import random

import pytest

from moe_serve.server.distribution import Distribution


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.mark.parametrize("wanted", [0.01, 0.5, 0.9, 0.99])
def test_quantiles_are_right_to_within_a_bucket(wanted: float) -> None:
    chance = random.Random(3)
    values = sorted(chance.lognormvariate(-3, 1.5) for _ in range(5000))
    found = Distribution()
    for value in values:
        found.add(value)
    (told,) = found.quantiles([wanted])
    exact = values[int(wanted * len(values))]
    assert told is not None
    assert exact / 1.2 < told < exact * 1.2


def test_quantiles_are_of_the_last_minute() -> None:
    clock = Clock()
    found = Distribution(clock=clock)
    found.add(1.0)
    clock.now_s += 30
    found.add(0.01)
    first, last = found.quantiles([0.01, 0.99])
    assert first is not None
    assert last is not None
    assert first == pytest.approx(0.01, rel=0.2)
    assert last == pytest.approx(1.0, rel=0.2)
    clock.now_s += 40
    assert found.quantiles([0.99])[0] == pytest.approx(0.01, rel=0.2)
    clock.now_s += 3600
    assert found.quantiles([0.5]) == [None]
    assert sum(found.counts) == 2  # of all the time


def test_buckets_are_cumulative_and_end_with_all() -> None:
    found = Distribution(1.0, 3)
    for value in (0.5, 1.0, 1.5, 2.0, 7.9, 8.0, 9.0, 1e9):
        found.add(value)
    assert found.buckets() == [("1", 2), ("2", 4), ("4", 4), ("8", 6), ("+Inf", 8)]
    assert found.sum == pytest.approx(1e9 + 29.9)
