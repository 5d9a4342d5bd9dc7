"""Splits end within 2 % of the best of all subsets, and what costs nothing is not copied."""

from __future__ import annotations

import itertools
import random

import pytest

from moe_serve.experts.split import MissCosts, MissPlanner, finish_s, split

MOST_OVER_BEST = 1.02
MOST_ACTIVE = 12


def random_costs(chance: random.Random) -> MissCosts:
    """Return costs over magnitudes, of both kinds of machine."""
    host_s = 10 ** chance.uniform(-5, -3)
    device_s = host_s / 10 ** chance.uniform(0, 2)
    return MissCosts(
        copy_s=10 ** chance.uniform(-5, -2.5),
        host_s=host_s,
        host_row_s=host_s / chance.choice((3, 10, 50)),
        device_s=device_s,
        device_row_s=device_s / chance.choice((3, 10, 100, 1000)),
        is_one_processor=chance.random() < 0.4,
    )


def random_rows(chance: random.Random, count: int) -> list[int]:
    return [chance.choice((1, 1, 1, 2, 3, 8, 40, chance.randint(1, 200))) for _ in range(count)]


def best_of_all_s(rows: dict[int, int], hits: list[int], costs: MissCosts) -> float:
    """Return the earliest end over all subsets of copied experts, the heaviest copied first."""
    best_s = float("inf")
    for number in range(len(rows) + 1):
        for copied in itertools.combinations(rows, number):
            first = sorted((rows[expert] for expert in copied), reverse=True)
            left = [rows[expert] for expert in rows if expert not in copied]
            best_s = min(best_s, finish_s(first, left, hits, costs))
    return best_s


def end_s(misses: dict[int, int], hits: list[int], costs: MissCosts) -> float:
    copied, in_place = split(misses, hits, costs)
    assert sorted(copied + in_place) == sorted(misses)
    return finish_s([misses[e] for e in copied], [misses[e] for e in in_place], hits, costs)


@pytest.mark.parametrize(("num_active", "num_cases"), [(n, 20) for n in range(1, 11)] + [(12, 8)])
def test_is_within_two_percent_of_all_subsets(num_active: int, num_cases: int) -> None:
    chance = random.Random(num_active)
    for case in range(num_cases):
        num_misses = num_active if case < 3 else chance.randint(1, num_active)
        misses = dict(enumerate(random_rows(chance, num_misses)))
        hits = random_rows(chance, num_active - num_misses)
        costs = random_costs(chance)
        best_s = best_of_all_s(misses, hits, costs)
        assert end_s(misses, hits, costs) <= MOST_OVER_BEST * best_s, (misses, hits, costs)


@pytest.mark.parametrize("is_one_processor", [True, False])
def test_few_rows_each_is_within_two_percent_too(is_one_processor: bool) -> None:
    """What decode has: 12 experts of one to three rows, costs near one another."""
    chance = random.Random(5)
    for _ in range(6):
        misses = {expert: chance.randint(1, 3) for expert in range(MOST_ACTIVE - 2)}
        costs = MissCosts(
            copy_s=chance.uniform(1, 4) * 1e-4,
            host_s=chance.uniform(1, 4) * 1e-4,
            host_row_s=2e-5,
            device_s=chance.uniform(0.2, 1) * 1e-4,
            device_row_s=1e-5,
            is_one_processor=is_one_processor,
        )
        best_s = best_of_all_s(misses, [1, 2], costs)
        assert end_s(misses, [1, 2], costs) <= MOST_OVER_BEST * best_s, (misses, costs)


def test_finish_by_hand() -> None:
    costs = MissCosts(
        copy_s=10.0, host_s=5.0, host_row_s=1.0, device_s=2.0, device_row_s=0.5,
        is_one_processor=False,
    )  # fmt: skip
    # hits end at 3; copies arrive at 10 and 20 and take 4 and 2.5; the host takes 8 beside them
    assert finish_s([4, 1], [3], [2], costs) == 22.5
    assert finish_s([4], [3, 3, 3], [2], costs) == 24.0  # the host ends last
    assert finish_s([], [], [2, 2], costs) == 6.0
    one = MissCosts(
        copy_s=10.0, host_s=5.0, host_row_s=1.0, device_s=2.0, device_row_s=0.5,
        is_one_processor=True,
    )  # fmt: skip
    assert finish_s([4, 1], [3], [2], one) == 22.5  # hits and host end at 11, before the copy did
    assert finish_s([4], [3, 3, 3], [2], one) == 31.0


def costs(copy_s: float, host_s: float, is_one_processor: bool = True) -> MissCosts:
    return MissCosts(
        copy_s=copy_s, host_s=host_s, host_row_s=host_s / 10, device_s=1e-5, device_row_s=1e-6,
        is_one_processor=is_one_processor,
    )  # fmt: skip


def test_slow_links_copy_nothing_and_fast_ones_all() -> None:
    misses = {3: 1, 5: 1, 9: 7}
    copied, in_place = split(misses, [1], costs(copy_s=1.0, host_s=1e-4))
    assert (copied, sorted(in_place)) == ([], [3, 5, 9])
    copied, in_place = split(misses, [1], costs(copy_s=1e-6, host_s=1e-1))
    assert copied == [9, 3, 5], "the heaviest first"
    assert in_place == []
    assert split({}, [1, 2], costs(1e-4, 1e-4)) == ([], [])


def test_of_equal_ends_most_are_copied() -> None:
    free = MissCosts(
        copy_s=1e-3, host_s=1e-3, host_row_s=0.0, device_s=0.0, device_row_s=0.0,
        is_one_processor=False,
    )  # fmt: skip
    copied, in_place = split(dict.fromkeys(range(4), 1), [], free)
    assert (len(copied), len(in_place)) == (2, 2)
    # with one expert both ends are equal: what is copied is there the next time
    assert split({6: 1}, [], free) == ([6], [])


@pytest.mark.parametrize("num_misses", [13, 60])
def test_many_misses_are_split_quickly_and_all_dealt_with(num_misses: int) -> None:
    chance = random.Random(num_misses)
    misses = dict(enumerate(random_rows(chance, num_misses)))
    some = costs(1e-4, 1e-4)
    alone = [misses[expert] for expert in misses]
    ends = (finish_s([], alone, [], some), finish_s(sorted(alone, reverse=True), [], [], some))
    assert end_s(misses, [], some) <= min(ends)


def test_the_planner_does_as_it_is_told() -> None:
    misses = {3: 1, 5: 1}
    slow = costs(copy_s=1.0, host_s=1e-4)
    assert MissPlanner("copy", slow).in_place(misses, []) == []
    for kind in ("split", "auto"):
        assert sorted(MissPlanner(kind, slow).in_place(misses, [])) == [3, 5]
