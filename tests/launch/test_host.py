"""A host between a front end and an engine, both played by the test: who is told what, and when."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from moe_serve.channel import Closed, Mailbox
from moe_serve.errors import CapacityError, CommError, RequestError
from moe_serve.launch.host import Host, ServedEngine
from moe_serve.server.messages import (
    SILENT_AFTER_S,
    Beat,
    Cancel,
    Drain,
    Drained,
    Failed,
    FrontBeat,
    Join,
    Outputs,
    Refused,
    Start,
    StatsReport,
    StopOutput,
    ToFront,
    ToHost,
    Welcome,
)
from moe_serve.types import Request, SamplingParams, StepOutput
from tests.server.test_metrics import stats

LIMIT_S = 10.0


class Engine:
    """Gives every output a token a step, until max_tokens. Calls are noted."""

    config: Any = None
    max_model_len = 64
    numerics_id = "fake"
    about = "1 rank"
    remote_links: tuple[Any, ...] = ()

    def __init__(self, step_s: float = 0.001) -> None:
        self.step_s = step_s
        self.given: dict[tuple[str, int], int] = {}
        self.most: dict[str, int] = {}
        self.calls: list[str] = []
        self.failure: CommError | None = None
        self.on_step: Callable[[], None] = lambda: None

    @property
    def has_unfinished(self) -> bool:
        return bool(self.given)

    def add(self, request: Request) -> None:
        if request.prompt_ids == (13,):
            raise RequestError("an unlucky number")
        if request.prompt_ids == (14,):
            raise CapacityError("too much")
        self.most[request.request_id] = request.sampling.max_tokens or 1
        for index in range(request.sampling.n):
            self.given[request.request_id, index] = 0

    def start_step(self, for_s: float = 0.0) -> None:
        pass

    def finish_step(self) -> list[StepOutput]:
        time.sleep(self.step_s)
        self.on_step()
        if self.failure is not None:
            raise self.failure
        outputs = []
        for (name, index), count in list(self.given.items()):
            is_last = count + 1 == self.most[name]
            reason: Any = "length" if is_last else None
            outputs.append(StepOutput(name, index, (count,), finish_reason=reason))
            self.given[name, index] = count + 1
            if is_last:
                del self.given[name, index]
        return outputs

    def abort(self, request_id: str) -> bool:
        self.calls.append(f"abort {request_id}")
        mine = [key for key in self.given if key[0] == request_id]
        for key in mine:
            del self.given[key]
        return bool(mine)

    def stop(self, request_id: str, index: int) -> bool:
        self.calls.append(f"stop {request_id} {index}")
        return self.given.pop((request_id, index), None) is not None

    def listen(self) -> None:
        pass

    def stats(self) -> Any:
        return stats()

    def close(self) -> None:
        pass


class Played:
    """A host that runs in a thread, and the front end's end of its mailbox."""

    def __init__(self, engine: Engine, shutdown_timeout_s: float = 5.0, gap_s: float = 0.0) -> None:
        self.engine = engine
        self.lost: list[str] = []
        self.error: BaseException | None = None
        self.front = cast(
            Any,
            SimpleNamespace(
                mailbox=None, check=lambda: None, lost=self._lost, silent_after_s=SILENT_AFTER_S
            ),
        )
        self.mailbox = self._meet()
        self.host = Host(self.front, shutdown_timeout_s, gap_s)
        self.said: list[ToFront] = []
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _meet(self) -> Mailbox[ToFront]:
        ours, theirs = socket.socketpair()
        self.front.mailbox = Mailbox[ToHost](theirs, ToHost)
        return Mailbox[ToFront](ours, ToFront)

    def _lost(self, why: str) -> None:
        self.front.mailbox.close()
        self.lost.append(why)
        self.mailbox.close()
        self.said.clear()
        self.mailbox = self._meet()

    def _run(self) -> None:
        try:
            self.host.run(cast(ServedEngine, self.engine))
        except BaseException as error:
            self.error = error

    def say(self, *messages: ToHost) -> None:
        for message in messages:
            self.mailbox.send(message)

    def hear(self, kind: type[Any], count: int = 1) -> list[Any]:
        """Return the first `count` messages of a kind; all others that came are in `said`."""
        end_s = time.monotonic() + LIMIT_S
        while len(found := [m for m in self.said if isinstance(m, kind)]) < count:
            assert time.monotonic() < end_s, f"no {kind.__name__}: {self.said}"
            self.said += self.mailbox.receive()
            time.sleep(0.001)
        return found[:count]

    def tokens(self, request_id: str, until_end: bool = True) -> list[int]:
        """Return the tokens of a request's output 0, when it has ended."""
        end_s = time.monotonic() + LIMIT_S
        while True:
            self.said += self.mailbox.receive()
            mine = [
                output
                for message in self.said
                if isinstance(message, Outputs)
                for output in message.outputs
                if (output.request_id, output.index) == (request_id, 0)
            ]
            if (mine and mine[-1].finish_reason) or (mine and not until_end):
                return [token for output in mine for token in output.token_ids]
            assert time.monotonic() < end_s
            time.sleep(0.001)

    def end(self) -> None:
        self.host.stop()
        self.host.stop()
        self.thread.join(LIMIT_S)
        assert not self.thread.is_alive()
        self.host.close()
        self.mailbox.close()
        if self.front.mailbox is not None:
            self.front.mailbox.close()


@pytest.fixture
def played() -> Iterator[Played]:
    one = Played(Engine())
    yield one
    one.end()


def request(name: str, length: int = 5, prompt: int = 1, n: int = 1) -> Request:
    sampling = SamplingParams(max_tokens=length, n=n)
    return Request(request_id=name, prompt_ids=(prompt,), sampling=sampling)


def test_a_front_end_is_welcomed_and_its_requests_are_served(played: Played) -> None:
    (welcome,) = played.hear(Welcome)
    assert (welcome.max_model_len, welcome.numerics_id, welcome.about) == (64, "fake", "1 rank")
    played.say(Join(), Start(request("a")), Start(request("b", 3)))
    assert played.tokens("a") == [*range(5)]
    assert played.tokens("b") == [*range(3)]
    assert played.hear(Beat)[0].state == "serving"


def test_what_the_engine_refuses_is_told_with_whose_fault_it_is(played: Played) -> None:
    played.say(Start(request("a", prompt=13)), Start(request("b", prompt=14)), Start(request("c")))
    refused = played.hear(Refused, 2)
    assert [(r.request_id, r.kind, r.message) for r in refused] == [
        ("a", "request", "an unlucky number"),
        ("b", "capacity", "too much"),
    ]
    assert played.tokens("c") == [*range(5)]


def test_requests_are_dropped_and_outputs_stopped(played: Played) -> None:
    played.say(Start(request("a", 10**6)), Start(request("b", 10**6, n=2)))
    assert played.tokens("a", until_end=False)[0] == 0
    played.say(Cancel("a"), StopOutput("b", 0), Cancel("never"))
    played.say(Start(request("c")))
    assert played.tokens("c") == [*range(5)]
    assert played.engine.calls == ["abort a", "stop b 0"]
    played.say(Cancel("b"), Start(request("d")))
    assert played.tokens("d") == [*range(5)]
    assert not played.engine.has_unfinished


def test_books_are_empty_when_all_has_ended(played: Played) -> None:
    for index in range(50):
        played.say(Start(request(f"{index}", 2, n=1 + index % 3)))
    played.say(Start(request("last")))
    played.tokens("last")
    assert played.host._num_open == {}


def test_a_front_end_that_is_gone_takes_its_requests_along(played: Played) -> None:
    played.say(Start(request("a", 10**6)), Start(request("b", 1)))
    assert played.tokens("b") == [0]
    played.mailbox.close()
    end_s = time.monotonic() + LIMIT_S
    while not played.lost:
        assert time.monotonic() < end_s
        time.sleep(0.005)
    played.hear(Welcome)  # the next one
    assert played.engine.calls == ["abort a"]
    played.say(Start(request("c")))
    assert played.tokens("c") == [*range(5)]


def test_nothing_of_a_host_lives_on_when_it_is_closed() -> None:
    one = Played(Engine())
    one.end()
    # else that thread may free the engine while the interpreter ends, which aborts the process
    assert not one.host._heart.is_alive()


def test_what_was_counted_is_told_while_there_are_steps(played: Played) -> None:
    played.say(Start(request("a", 10**6)))
    assert played.hear(StatsReport)[0].stats.num_steps == 40


def test_a_drain_waits_for_what_runs(played: Played) -> None:
    played.say(Start(request("a", 50)))
    played.tokens("a", until_end=False)
    played.host.stop()
    assert played.hear(Drain)[0].limit_s == 5.0
    assert played.tokens("a") == [*range(50)]
    assert played.thread.is_alive()
    played.say(Drained())
    played.thread.join(LIMIT_S)
    assert not played.thread.is_alive()
    assert played.error is None


def test_what_was_counted_is_told_at_once_after_the_last_step(played: Played) -> None:
    played.say(Start(request("a")))
    assert played.tokens("a") == [*range(5)]
    begun_s = time.monotonic()
    num_before = sum(isinstance(message, StatsReport) for message in played.said)
    played.hear(StatsReport, num_before + 1)
    assert time.monotonic() - begun_s < 0.6


def test_a_stop_while_a_world_is_formed_anew_is_a_drain() -> None:
    class Losing(Engine):
        def finish_step(self) -> list[StepOutput]:
            if not lost.is_set():
                played.host.lost_world("a rank is gone")
                lost.set()
                assert may_go_on.wait(LIMIT_S)
                played.host.has_world()
            return super().finish_step()

    lost, may_go_on = threading.Event(), threading.Event()
    played = Played(Losing())
    played.say(Start(request("a")))
    assert lost.wait(LIMIT_S)
    played.host.stop()
    assert played.hear(Drain)[0].limit_s == 5.0  # though no world is there yet
    may_go_on.set()
    assert played.tokens("a") == [*range(5)]
    played.say(Drained())
    played.thread.join(LIMIT_S)
    assert not played.thread.is_alive()
    beats = [message.state for message in played.said if isinstance(message, Beat)]
    assert "serving" not in beats[beats.index("reforming") :]
    played.end()


def test_a_front_end_that_comes_during_a_drain_is_told_of_it(played: Played) -> None:
    played.say(Start(request("a", 10**6)))
    played.tokens("a", until_end=False)
    played.host.stop()
    played.hear(Drain)
    played.mailbox.close()
    end_s = time.monotonic() + LIMIT_S
    while not played.lost:
        assert time.monotonic() < end_s
        time.sleep(0.005)
    assert 0 < played.hear(Drain)[0].limit_s <= 5.0


def test_a_front_end_has_time_to_come_and_then_must_give_signs_of_life(
    played: Played,
) -> None:
    played.front.silent_after_s = 0.5
    played.hear(Welcome)
    time.sleep(1.5)
    assert played.lost == []
    played.say(Join())
    end_s = time.monotonic() + LIMIT_S
    while not played.lost:
        assert time.monotonic() < end_s
        time.sleep(0.005)
    assert "no sign of life" in played.lost[0]
    time.sleep(1.5)  # of the next one, too
    assert len(played.lost) == 1


def test_an_engine_that_is_lost_for_good_is_told_of() -> None:
    played = Played(Engine())
    played.say(Start(request("a", 10**6)))
    played.tokens("a", until_end=False)
    played.engine.failure = CommError("no world")
    assert played.hear(Failed)[0].message == "no world"
    played.say(Drained())
    played.thread.join(LIMIT_S)
    assert isinstance(played.error, CommError)
    played.end()


def test_a_long_step_is_no_silence() -> None:
    played = Played(Engine(step_s=3.0))
    played.hear(Welcome)
    played.say(Start(request("a", 1)))
    time.sleep(0.5)
    played.said.clear()
    begun_s = time.monotonic()
    played.hear(Beat, 2)
    assert time.monotonic() - begun_s < 2.5
    played.say(FrontBeat(1))
    assert played.tokens("a") == [0]
    assert played.lost == []
    played.end()


def test_a_closed_mailbox_says_so(played: Played) -> None:
    played.hear(Welcome)
    played.end()
    with pytest.raises((Closed, OSError)):
        played.mailbox.receive()


@pytest.mark.parametrize("is_for_good", [True, False])
def test_what_was_gathered_is_told_before_a_loss(is_for_good: bool) -> None:
    engine = Engine()
    one = Played(engine, gap_s=60.0)
    try:
        one.say(Start(request("a", 50)))
        assert one.tokens("a", until_end=False) == [0]
        while engine.given["a", 0] < 20:
            time.sleep(0.001)
        if is_for_good:
            engine.failure = CommError("it burns")
            one.hear(Failed)
        else:
            engine.on_step = lambda: one.host.lost_world("it burns")
            while not any(beat.state == "reforming" for beat in one.said if isinstance(beat, Beat)):
                one.hear(Beat, len([m for m in one.said if isinstance(m, Beat)]) + 1)
        told: list[tuple[StepOutput, ...] | None] = []  # None: that it is lost
        for message in one.said:
            if isinstance(message, Outputs):
                told.append(message.outputs)
            elif isinstance(message, Failed) or getattr(message, "state", "") == "reforming":
                told.append(None)
        assert told.index(None) == 2
        gathered = told[1]
        assert gathered is not None
        assert len(gathered[0].token_ids) >= 19
    finally:
        engine.failure = None
        one.end()
