"""Ranks told of a step while at the one before it, or of several, give what they would else."""

from __future__ import annotations

import dataclasses
import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

import moe_serve
from moe_serve.channel import Channel
from moe_serve.config import EngineConfig
from moe_serve.engine.build import build_engine
from moe_serve.launch import coordinator
from moe_serve.launch.coordinator import RankedEngine
from moe_serve.launch.links import RemoteLink, wait_until_ready
from moe_serve.launch.messages import Add, Call, FromRank, Step
from moe_serve.launch.worker import Follower, Heart, RankWorker
from moe_serve.types import Request, SamplingParams, StepOutput

EMBEDDED = Path(moe_serve.__file__).parent / "assets" / "demo-moe"
Key = tuple[str, int]


@contextmanager
def ranked(most_begun: list[int] | None = None) -> Iterator[RankedEngine]:
    """Give an engine whose only rank is a thread, at the other end of a socket."""
    config = EngineConfig.from_options({"threads": 1, "num_kv_blocks": 128, "max_model_len": 256})
    ours, theirs = socket.socketpair()
    channel: Channel[Call] = Channel(theirs, Call)
    follower = Follower(RankWorker(build_engine(config, EMBEDDED)), channel, Heart(channel))
    thread = threading.Thread(target=follower.follow, args=(True,))
    thread.start()
    link = RemoteLink(0, Channel(ours, FromRank))
    wait_until_ready([link])
    spec = cast(Any, SimpleNamespace(vocab_size=6000))
    engine = RankedEngine(config, spec, [link], lambda error: None)
    read = engine._read_step

    def read_step() -> Any:
        if most_begun is not None:
            most_begun.append(engine._num_begun)
        return read()

    engine._read_step = read_step  # type: ignore[method-assign]
    try:
        yield engine
    finally:
        engine.close()
        thread.join(10)
        ours.close()
    assert not thread.is_alive()


def request(name: str, prompt: tuple[int, ...], num_tokens: int, n: int = 1) -> Request:
    sampling = SamplingParams(max_tokens=num_tokens, temperature=0.8, ignore_eos=True, n=n)
    return Request(request_id=name, prompt_ids=prompt, sampling=sampling, seed=5)


@dataclasses.dataclass(frozen=True)
class Way:
    """How steps are made: one ahead of what was read, or not; several at a time, or one."""

    is_ahead: bool
    for_s: float = 0.0

    def step(self, engine: RankedEngine) -> list[StepOutput]:
        engine.start_step(self.for_s)
        return engine.finish_step()


@pytest.fixture(
    params=[Way(False), Way(True), Way(False, 0.02), Way(True, 0.02)],
    ids=["in turns", "ahead", "several", "several ahead"],
)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Way:
    value: Way = request.param
    monkeypatch.setattr(coordinator, "_SHORT_STEP_S", 60.0 if value.is_ahead else 0.0)
    return value


def test_tokens_are_the_same_whatever_comes_between(way: Way) -> None:
    chance = random.Random(3)
    wanted = [
        request(f"r{i}", tuple(chance.randrange(2, 6000) for _ in range(chance.randint(1, 40))),
                chance.randint(1, 40), chance.choice((1, 1, 3)))
        for i in range(40)
    ]  # fmt: skip
    whole: dict[Key, tuple[int, ...]] = {}
    found: dict[Key, tuple[int, ...]] = {}
    ended: dict[Key, str] = {}
    dropped: set[Key] = set()
    begun: list[int] = []
    with ranked() as engine:
        for one in wanted:
            engine.add(one)
            while engine.has_unfinished:
                for out in engine.step():
                    key = out.request_id, out.index
                    whole[key] = whole.get(key, ()) + out.token_ids
    with ranked(begun) as engine:
        waiting = list(wanted)
        while waiting or engine.has_unfinished:
            for _ in range(chance.choice((0, 0, 0, 1, 4))):
                if waiting:
                    engine.add(waiting.pop())
            for out in way.step(engine):
                key = out.request_id, out.index
                assert key not in dropped
                assert key not in ended
                found[key] = found.get(key, ()) + out.token_ids
                if out.finish_reason is not None:
                    ended[key] = out.finish_reason
            going = sorted(set(found) - set(ended) - dropped)
            if going and chance.random() < 0.1:
                name, index = chance.choice(going)
                if chance.random() < 0.5:
                    assert engine.abort(name)
                    dropped |= {key for key in whole if key[0] == name and key not in ended}
                else:
                    assert engine.stop(name, index)
                    dropped.add((name, index))
        assert not engine.abort("r0")
        assert engine._num_begun == 0
    assert max(begun) == (2 if way.is_ahead else 1)
    assert len(dropped) > 5
    for key, tokens in found.items():
        assert tokens == whole[key][: len(tokens)]
        assert key in dropped or (tokens == whole[key] and ended[key] == "length")
    assert set(found) | dropped == set(whole)


def test_an_id_is_free_once_its_request_was_dropped_or_has_ended(way: Way) -> None:
    with ranked() as engine:
        for last in (4, 5, 6):
            engine.add(request("same", (last,), 30))
            num_tokens = 0
            while num_tokens < 3:
                num_tokens += sum(len(out.token_ids) for out in way.step(engine))
            engine.abort("same")
        engine.add(request("same", (7,), 3))
        tokens = []
        while engine.has_unfinished:
            tokens += [token for out in way.step(engine) for token in out.token_ids]
        engine.add(request("other", (7,), 3))
        again: list[int] = []
        while engine.has_unfinished:
            again += [token for out in way.step(engine) for token in out.token_ids]
    assert tokens == again


def test_counts_and_signs_of_life_between_steps(way: Way) -> None:
    with ranked() as engine:
        engine.add(request("a", (5,), 20))
        num_calls = 0
        while engine.has_unfinished:
            way.step(engine)
            num_calls += 1
            assert engine.stats().num_running <= 1
        engine.listen()
        assert way.for_s or num_calls == 20
        stats = engine.stats()
        assert stats.num_finished["length"] == 1
        assert stats.num_steps == stats.ranks[0]["num_steps"]
        assert stats.num_steps == 20 or (stats.num_steps == 21 and way == Way(True))


def test_several_steps_end_with_what_must_be_told_at_once() -> None:
    config = EngineConfig.from_options({"threads": 1, "num_kv_blocks": 64, "max_model_len": 128})
    worker = RankWorker(build_engine(config, EMBEDDED))
    worker.do(Add(request("a", (5,), 12)))
    first = worker.do(Step(for_s=60.0))  # a request's first token
    assert (first.num_steps, [len(out.token_ids) for out in first.outputs]) == (1, [1])
    assert first.has_unfinished
    assert worker.do(Step(for_s=60.0), lambda: True).num_steps == 0  # another call waits
    calls = iter([False, False, False, True])
    some = worker.do(Step(for_s=60.0), lambda: next(calls))
    assert (some.num_steps, [len(out.token_ids) for out in some.outputs]) == (3, [3])
    assert worker.do(Step()).num_steps == 1
    begun_s = time.perf_counter()
    last = worker.do(Step(for_s=60.0))  # an end
    assert time.perf_counter() - begun_s < 30
    assert (last.num_steps, last.outputs[0].finish_reason) == (7, "length")
    assert not last.has_unfinished
    worker.do(Add(request("b", (5,), 100)))
    worker.do(Step())
    again = worker.do(Step(for_s=0.02))  # the time
    assert 1 <= again.num_steps < 99
    worker.engine.close()


def test_a_request_joins_while_another_one_makes_several_steps() -> None:
    with ranked() as engine:
        engine.add(request("long", (5,), 200))
        engine.step()
        engine.start_step(60.0)
        begun_s = time.perf_counter()
        engine.add(request("late", (6,), 3))
        assert time.perf_counter() - begun_s < 30
        found = {out.request_id: len(out.token_ids) for out in engine.finish_step()}
        assert found.keys() <= {"long"}
        found = {}
        while "late" not in found:
            engine.start_step(60.0)
            found |= {out.request_id: len(out.token_ids) for out in engine.finish_step()}
        assert found["late"] == 1
        engine.abort("long")
        engine.abort("late")


def test_a_request_that_went_on_is_forgotten_when_the_rest_of_it_has_ended() -> None:
    with ranked() as engine:
        for _ in range(2):  # the id is free again
            begun = request("a", (5, 6), 8, n=2)
            engine.add(dataclasses.replace(begun, output_ids=(None, (7, 8))))
            num_tokens = 0
            while engine.has_unfinished:
                num_tokens += sum(len(out.token_ids) for out in engine.step())
            assert num_tokens == 6
            assert not engine._live


def test_a_pause_between_steps_is_no_long_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coordinator, "_SHORT_STEP_S", 60.0)
    with ranked() as engine:
        engine.add(request("a", (5,), 20))
        for _ in range(3):
            engine.step()
        assert engine._num_begun == 1
        time.sleep(0.5)
        engine.step()
        assert engine._longest_s < 0.5
