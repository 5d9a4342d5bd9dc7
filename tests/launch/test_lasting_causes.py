"""Worlds that are lost again and again: the cause is found, and all other requests are served."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest

from moe_serve.errors import CommError, MoeServeError
from moe_serve.launch.lasting import LastingEngine
from moe_serve.types import Request, SamplingParams, StepOutput

NUM_TOKENS = 6


class FakeWorld:
    """Gives each request a token a step: how many it had. ends: whether a step, or add, ends it."""

    def __init__(self, ends: Callable[[Request, int], bool], limit: int = 100) -> None:
        self.requests: dict[str, tuple[Request, list[list[int] | None]]] = {}
        self._ends = ends
        self._limit = limit

    @property
    def has_unfinished(self) -> bool:
        return bool(self.requests)

    def add(self, request: Request) -> None:
        if len(self.requests) >= self._limit:
            raise MoeServeError("no room")
        outputs = request.output_ids or ((),) * request.sampling.n
        self.requests[request.request_id] = (
            request, [None if tokens is None else list(tokens) for tokens in outputs]
        )  # fmt: skip
        if self._ends(request, -1):
            raise CommError("a rank is gone")

    def start_step(self, for_s: float = 0.0) -> None:
        pass

    def finish_step(self) -> list[StepOutput]:
        found = []
        for request, outputs in list(self.requests.values()):
            for index, tokens in enumerate(outputs):
                if tokens is None:
                    continue
                if self._ends(request, len(tokens)):
                    raise CommError("a rank is gone")
                tokens.append(len(tokens))
                is_last = len(tokens) == NUM_TOKENS
                reason: Any = "length" if is_last else None
                found.append(StepOutput(request.request_id, index, (len(tokens) - 1,), (), reason))
                if is_last:
                    outputs[index] = None
            if all(tokens is None for tokens in outputs):
                del self.requests[request.request_id]
        return found

    def abort(self, request_id: str) -> bool:
        return self.requests.pop(request_id, None) is not None

    def stop(self, request_id: str, index: int) -> bool:
        if request_id not in self.requests:
            return False
        self.requests[request_id][1][index] = None
        return True


def lasting(
    ends: Callable[[Request, int], bool], max_losses: int = 3, limit: int = 100
) -> LastingEngine:
    return LastingEngine(
        lambda generation: cast(Any, FakeWorld(ends, limit)), max_losses=max_losses
    )


def request(name: str, n: int = 1) -> Request:
    return Request(request_id=name, prompt_ids=(1,), sampling=SamplingParams(n=n))


def drain(engine: LastingEngine, limit: int = 100) -> dict[str, list[list[Any]]]:
    """Step until all has ended; return the tokens of each output, with its error at the end."""
    found: dict[str, list[list[Any]]] = {}
    for _ in range(limit):
        if not engine.has_unfinished:
            return found
        for output in engine.step():
            lists = found.setdefault(output.request_id, [])
            while len(lists) <= output.index:
                lists.append([])
            lists[output.index] += output.token_ids
            if output.error is not None:
                lists[output.index].append(output.error)
    raise AssertionError("it has not ended")


WHOLE = list(range(NUM_TOKENS))


@pytest.mark.parametrize("at", [-1, 0, 3, NUM_TOKENS - 1])
def test_the_request_that_ends_worlds_is_ended_and_the_others_are_served(at: int) -> None:
    engine = lasting(lambda one, length: one.request_id == "bad" and length == at)
    for name in ("a", "b", "bad", "c"):
        engine.add(request(name, n=2 if name == "b" else 1))
    found = drain(engine)
    assert found.pop("b") == [WHOLE, WHOLE]
    (bad,) = found.pop("bad")
    assert bad[:-1] == WHOLE[: max(0, at)]
    assert "under way when ranks were lost 3 times: a rank is gone" in bad[-1]
    assert found == {"a": [WHOLE], "c": [WHOLE]}
    assert engine.generation == 3


def test_what_comes_while_one_is_tried_is_served_beside_it() -> None:
    engine = lasting(lambda one, length: one.request_id == "bad" and length == 2)
    engine.add(request("a"))
    engine.add(request("bad"))
    while engine.generation < 2:
        engine.step()
    engine.add(request("late"))
    found = drain(engine)
    assert found["late"] == [WHOLE]
    assert found["a"][0][-2:] == WHOLE[-2:]
    assert isinstance(found["bad"][0][-1], str)


def test_two_causes_cost_a_world_more() -> None:
    engine = lasting(lambda one, length: one.request_id.startswith("bad") and length == 2, 4)
    for name in ("bad 1", "a", "bad 2", "b"):
        engine.add(request(name))
    found = drain(engine)
    assert [found["a"], found["b"]] == [[WHOLE], [WHOLE]]
    assert engine.generation == 4


@pytest.mark.parametrize("losses", [(2,), (2, 4), (2, 4, 6)])
def test_losses_that_no_request_causes_end_none_until_there_are_too_many(
    losses: tuple[int, ...],
) -> None:
    num_calls = 0

    def ends(one: Request, length: int) -> bool:
        nonlocal num_calls
        num_calls += one.request_id == "a" and length >= 0
        return one.request_id == "a" and length >= 0 and num_calls in losses

    engine = lasting(ends, max_losses=2)
    for name in ("a", "b", "c"):
        engine.add(request(name))
    if len(losses) > 2:
        with pytest.raises(CommError, match="the limit is 2"):
            drain(engine)
    else:
        assert drain(engine) == {name: [WHOLE] for name in ("a", "b", "c")}


def test_suspects_that_wait_can_be_aborted_and_stopped() -> None:
    engine = lasting(lambda one, length: one.request_id == "bad" and length == 2)
    for name in ("a", "b", "c", "bad"):
        engine.add(request(name, n=2 if name == "c" else 1))
    while engine.generation < 2:
        engine.step()
    assert engine.abort("b")
    assert not engine.abort("b")
    assert engine.stop("c", 0)
    assert not engine.stop("c", 7)
    found = drain(engine)
    assert "b" not in found
    assert found["c"][0] == []
    assert found["c"][1][-1] == NUM_TOKENS - 1


def test_what_a_smaller_world_does_not_take_is_ended() -> None:
    engine = lasting(lambda one, length: False, limit=2)
    engine.add(request("a"))
    engine.add(request("b"))
    with pytest.raises(MoeServeError, match="no room"):
        engine.add(request("c"))
    assert drain(engine) == {"a": [WHOLE], "b": [WHOLE]}
