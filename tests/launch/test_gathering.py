"""What goes to a front end at once, and what waits for company."""

from __future__ import annotations

import random

import pytest

from moe_serve.launch.gathering import Gathering
from moe_serve.types import RoutedExperts, StepOutput, TokenLogprobs


def out(name: str, *tokens: int, index: int = 0, end: bool = False) -> StepOutput:
    logprobs = tuple(TokenLogprobs(token, -1.0, 1) for token in tokens)
    return StepOutput(name, index, tokens, logprobs, "length" if end else None)


def test_the_first_token_and_the_end_go_at_once_and_the_rest_together() -> None:
    gathering = Gathering(0.05)
    gathering.add([out("a", 1)], {"a"})
    assert gathering.take(0.0, 1) == (out("a", 1),)
    for token in range(2, 6):
        gathering.add([out("a", token), out("b", token)], set())
        assert gathering.take(0.01, 2) == ()
    gathering.add([out("c", 9), out("b", 7, end=True)], {"c"})
    assert gathering.take(0.02, 3) == (out("c", 9), out("b", 2, 3, 4, 5, 7, end=True))
    assert gathering.take(0.04, 2) == ()
    assert gathering.take(0.06, 2) == (out("a", 2, 3, 4, 5),)
    assert gathering.take(1.0, 2) == ()


def test_outputs_of_one_request_are_kept_apart() -> None:
    gathering = Gathering(10.0)
    gathering.add([out("a", 1), out("a", 2, index=1)], {"a"})
    assert len(gathering.take(0.0, 1)) == 2
    gathering.add([out("a", 3), out("a", 4, index=1)], set())
    gathering.add([out("a", 5, end=True), out("a", 6, index=1)], set())
    assert gathering.take(1.0, 1) == (out("a", 3, 5, end=True),)
    assert gathering.take_all(1.0) == (out("a", 4, 6, index=1),)


@pytest.mark.parametrize(("num_requests", "gap_s"), [(1, 0.0015), (10, 0.015), (500, 0.05)])
def test_without_a_gap_it_grows_with_the_load(num_requests: int, gap_s: float) -> None:
    gathering = Gathering(None)
    gathering.add([out("a", 1)], set())
    assert gathering.take(0.0, num_requests)
    gathering.add([out("a", 2)], set())
    assert not gathering.take(0.99 * gap_s, num_requests)
    assert gathering.take(1.01 * gap_s, num_requests)


def test_how_long_it_may_wait_is_told() -> None:
    gathering = Gathering(0.05)
    assert gathering.left_s(0.0, 1) is None
    gathering.add([out("a", 1)], set())
    assert gathering.left_s(0.0, 1) == 0
    gathering.take(1.0, 1)
    assert gathering.left_s(1.0, 1) is None
    gathering.add([out("a", 2)], set())
    assert gathering.left_s(1.01, 1) == pytest.approx(0.04)
    assert gathering.left_s(2.0, 1) == 0


def test_a_gap_of_nothing_tells_each_step() -> None:
    gathering = Gathering(0.0)
    for token in range(5):
        gathering.add([out("a", token)], set())
        assert gathering.take(0.0, 1) == (out("a", token),)


def test_routed_experts_are_told_of_with_their_step() -> None:
    gathering = Gathering(10.0)
    gathering.add([out("a", 1)], {"a"})
    gathering.take(0.0, 1)
    routed = RoutedExperts(3, b"\0\0", (1, 1, 1))
    gathering.add([out("a", 2)], set())
    assert gathering.take(0.1, 1) == ()
    gathering.add([StepOutput("a", 0, (3,), routed_experts=routed)], set())
    (told,) = gathering.take(0.1, 1)
    assert (told.token_ids, told.routed_experts) == ((2, 3), routed)


def test_what_is_dropped_is_not_told() -> None:
    gathering = Gathering(0.0)
    gathering.add([out("a", 1), out("a", 1, index=1, end=True), out("b", 2)], {"a", "b"})
    gathering.drop("a")
    assert gathering.take(0.0, 1) == (out("b", 2),)


def test_nothing_is_lost_and_nothing_told_twice() -> None:
    chance = random.Random(1)
    for _ in range(200):
        gathering, now_s = Gathering(chance.choice((0.0, 0.004, None))), 0.0
        given: dict[str, list[int]] = {name: [] for name in "abcd"}
        told: dict[str, list[int]] = {name: [] for name in "abcd"}
        new, ended = set("abcd"), set()
        for step in range(30):
            names = [name for name in "abcd" if name not in ended and chance.random() < 0.7]
            ends = {name for name in names if chance.random() < 0.05}
            gathering.add([out(name, step, end=name in ends) for name in names], new)
            for name in names:
                given[name].append(step)
            ended |= ends
            now_s += 0.001
            taken = gathering.take(now_s, 4)
            for output in taken:
                told[output.request_id] += output.token_ids
                new.discard(output.request_id)
            assert ends <= {output.request_id for output in taken}
        for output in gathering.take_all(now_s):
            told[output.request_id] += output.token_ids
        assert told == given
