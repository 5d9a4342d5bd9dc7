"""Worlds that come and go under an engine, without processes: its books, and when it gives up."""

from __future__ import annotations

from typing import Any, cast

import pytest

from moe_serve.errors import (
    CapacityError,
    CheckpointError,
    CommError,
    MoeServeError,
    RequestError,
)
from moe_serve.launch.coordinator import RankedEngine
from moe_serve.launch.lasting import LastingEngine
from moe_serve.types import Request, SamplingParams, StepOutput


class World:
    """Gives each output its next token a step: the position it has in the whole output."""

    def __init__(self, generation: int, fate: dict[str, int]) -> None:
        self.generation = generation
        self.requests: dict[str, Request] = {}
        self.given: dict[tuple[str, int], int] = {}
        self.fate = fate  # call name: how many of it before the world is lost
        self.slots: int | None = None

    def _live(self, name: str) -> None:
        self.fate[name] = self.fate.get(name, -1) - 1
        if self.fate[name] == -1:
            raise CommError(f"lost in {name}")

    @property
    def has_unfinished(self) -> bool:
        return bool(self.requests)

    def add(self, request: Request) -> None:
        if len(request.prompt_ids) > 100:
            raise CapacityError("too long")
        self._live("add")
        self.requests[request.request_id] = request
        for index in range(request.sampling.n):
            tokens = request.output_ids[index] if request.output_ids else ()
            if tokens is not None:
                self.given[request.request_id, index] = len(tokens)

    def start_step(self, for_s: float = 0.0) -> None:
        self._live("start_step")

    def finish_step(self) -> list[StepOutput]:
        self._live("finish_step")
        outputs = []
        for (name, index), count in list(self.given.items()):
            most = self.requests[name].sampling.max_tokens or 0
            reason = "length" if count + 1 == most + index else None
            outputs.append(StepOutput(name, index, (count,), finish_reason=cast(Any, reason)))
            self.given[name, index] = count + 1
            if reason:
                self._end(name, index)
        return outputs

    def _end(self, name: str, index: int) -> None:
        del self.given[name, index]
        if not any(other == name for other, _ in self.given):
            del self.requests[name]

    def abort(self, request_id: str) -> bool:
        self._live("abort")
        for name, index in list(self.given):
            if name == request_id:
                self._end(name, index)
        return True

    def stop(self, request_id: str, index: int) -> bool:
        self._live("stop")
        self._end(request_id, index)
        return True

    def listen(self) -> None:
        self._live("listen")

    def stats(self) -> str:
        self._live("stats")
        return f"world {self.generation}"

    def resize_expert_cache(self, slots: int) -> None:
        self._live("resize")
        self.slots = slots

    def close(self) -> None:
        pass


class Worlds:
    """fates: of each world to come, one after the other; then worlds that live for ever."""

    def __init__(self, *fates: dict[str, int] | MoeServeError, **options: Any) -> None:
        self.fates = list(fates)
        self.formed: list[World] = []
        self.why: list[str] = []
        self.engine = LastingEngine(self.form, on_loss=self.why.append, **options)

    def form(self, generation: int) -> RankedEngine:
        fate = self.fates.pop(0) if self.fates else {}
        if isinstance(fate, MoeServeError):
            raise fate
        self.formed.append(World(generation, dict(fate)))
        return cast(RankedEngine, self.formed[-1])


def request(name: str, length: int = 6, n: int = 1) -> Request:
    return Request(
        request_id=name, prompt_ids=(1,), sampling=SamplingParams(max_tokens=length, n=n)
    )


def run(engine: LastingEngine) -> dict[tuple[str, int], list[int]]:
    found: dict[tuple[str, int], list[int]] = {}
    for _ in range(100):
        if not engine.has_unfinished:
            return found
        for output in engine.step():
            found.setdefault((output.request_id, output.index), []).extend(output.token_ids)
            assert output.finish_reason != "error", output.error
    raise AssertionError("it does not end")


@pytest.mark.parametrize("call", ["start_step", "finish_step"])
@pytest.mark.parametrize("after", [0, 1, 4])
def test_every_token_comes_once_whenever_the_world_is_lost(call: str, after: int) -> None:
    worlds = Worlds({call: after}, {call: 0})
    for name in ("a", "b"):
        worlds.engine.add(request(name))
    assert run(worlds.engine) == {("a", 0): [*range(6)], ("b", 0): [*range(6)]}
    assert worlds.engine.generation == 2
    assert worlds.why == [f"lost in {call}"] * 2
    assert worlds.engine.num_resubmitted == 4


def test_outputs_that_have_ended_stay_ended() -> None:
    worlds = Worlds({"finish_step": 4})
    worlds.engine.add(request("a", 3, n=3))  # of 3, 4 and 5 tokens
    assert run(worlds.engine) == {("a", i): [*range(3 + i)] for i in range(3)}
    assert worlds.engine.generation == 1


def test_a_world_lost_while_a_request_is_added_has_it_afterwards() -> None:
    worlds = Worlds({"add": 1})
    worlds.engine.add(request("a"))
    worlds.engine.add(request("b"))
    assert run(worlds.engine) == {("a", 0): [*range(6)], ("b", 0): [*range(6)]}


def test_what_is_refused_is_not_kept() -> None:
    worlds = Worlds({"finish_step": 0})
    long = Request(request_id="a", prompt_ids=(1,) * 101, sampling=SamplingParams())
    with pytest.raises(CapacityError):
        worlds.engine.add(long)
    worlds.engine.add(request("a"))
    with pytest.raises(RequestError, match="in use"):
        worlds.engine.add(request("a"))
    assert run(worlds.engine) == {("a", 0): [*range(6)]}
    worlds.engine.add(request("a"))  # free again


def test_who_was_dropped_does_not_come_back() -> None:
    worlds = Worlds({"abort": 0, "stop": 5})
    worlds.engine.add(request("a"))
    worlds.engine.add(request("b", n=2))
    worlds.engine.step()
    assert worlds.engine.abort("a")  # the world is lost in this
    assert not worlds.engine.abort("a")
    assert worlds.engine.stop("b", 0)
    assert not worlds.engine.stop("b", 0)
    assert run(worlds.engine) == {("b", 1): [*range(1, 7)]}


@pytest.mark.parametrize("call", ["listen", "stats"])
def test_a_world_lost_while_nobody_asks_is_formed_anew(call: str) -> None:
    worlds = Worlds({call: 0})
    engine = worlds.engine
    engine.listen() if call == "listen" else engine.stats()
    assert str(engine.stats()) == "world 1"


def test_it_gives_up_after_too_many_losses() -> None:
    worlds = Worlds(*[{"finish_step": 0}] * 9, max_losses=1)
    worlds.engine.add(request("a"))
    worlds.engine.step()
    with pytest.raises(CommError, match=r"lost in finish_step .*: 2; the limit is 1"):
        worlds.engine.step()


def test_a_world_that_cannot_be_formed_is_tried_again() -> None:
    worlds = Worlds({"finish_step": 0}, CommError("a rank did not come"))
    worlds.engine.add(request("a"))
    assert run(worlds.engine) == {("a", 0): [*range(6)]}
    assert worlds.why == ["lost in finish_step", "a rank did not come"]


def test_a_new_world_has_the_slots_of_the_old_one() -> None:
    worlds = Worlds({"listen": 0})
    worlds.engine.resize_expert_cache(5)
    worlds.engine.listen()
    assert [world.slots for world in worlds.formed] == [5, 5]


def test_a_closed_engine_forms_no_world() -> None:
    worlds = Worlds({"add": 0})
    worlds.engine.close()
    with pytest.raises(CommError, match="lost in add"):
        worlds.engine.add(request("a"))
    assert len(worlds.formed) == 1


def test_a_world_that_is_refused_ends_it_for_everybody() -> None:
    worlds = Worlds({"add": 1}, CheckpointError("no such folder"))
    worlds.engine.add(request("a"))
    with pytest.raises(CommError, match=r"lost in add; .* not be started again: no such folder"):
        worlds.engine.add(request("b"))


def test_a_world_lost_while_it_is_told_of_slots_leaves_them_to_the_next() -> None:
    worlds = Worlds({"resize": 0})
    worlds.engine.add(request("a"))
    worlds.engine.resize_expert_cache(5)
    assert [world.slots for world in worlds.formed] == [None, 5]
    assert run(worlds.engine) == {("a", 0): [*range(6)]}


def test_counts_are_those_of_a_world_that_lives() -> None:
    worlds = Worlds({"stats": 0}, {"stats": 0})
    assert str(worlds.engine.stats()) == "world 2"
