"""Whether to look at every layer or once: what costs less, as measured."""

from __future__ import annotations

import pytest

from moe_serve.kernels.gpu.pace import Mean, Pace


def test_a_mean_is_of_all_at_first_and_then_of_the_last() -> None:
    mean = Mean()
    assert not mean.is_known
    for value in (1.0, 2.0, 6.0):
        mean.add(value)
    assert mean.value == pytest.approx(3.0)
    for _ in range(300):
        mean.add(10.0)
    assert mean.value == pytest.approx(10.0, abs=1e-2)


def _pace(whole_s: float, looking_s: float, first_missed: list[int | None]) -> Pace:
    pace = Pace(num_layers=10)
    pace.ran_whole(whole_s)
    pace.ran_looking(looking_s, 10)
    for first in first_missed:
        pace.missed(first)
    return pace


def test_whole_until_both_were_measured() -> None:
    pace = Pace(10)
    assert pace.is_whole_faster
    pace.ran_whole(5.0)
    pace.missed(0)
    assert pace.is_whole_faster
    pace.ran_looking(0.6, 1)
    assert not pace.is_whole_faster


@pytest.mark.parametrize(
    ("whole_s", "looking_s", "first_missed", "is_whole"),
    [
        (1.0, 1.1, [None], True),
        (1.0, 1.1, [0], False),
        (1.0, 3.0, [0], False),  # a miss at once: the whole step was for nothing
        (1.0, 3.0, [0, None], True),  # 1 + 3 / 2 against 3
        (1.0, 1.9, [0, None], False),
        (1.0, 2.5, [9], True),  # 1 + 9 / 10 + 2.5 / 10 against 2.5
        (1.0, 2.1, [9], False),
    ],
)
def test_by_what_a_miss_costs_and_how_often_there_is_one(
    whole_s: float, looking_s: float, first_missed: list[int | None], is_whole: bool
) -> None:
    assert _pace(whole_s, looking_s, first_missed).is_whole_faster is is_whole


def test_the_last_layers_stand_for_all() -> None:
    pace = Pace(10)
    pace.ran_whole(1.0)
    pace.missed(9)
    pace.ran_looking(0.25, 1)
    assert pace.is_whole_faster  # 1 + 0.9 + 0.25 against 2.5
