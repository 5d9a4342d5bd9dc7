"""Drives an engine for a front end: steps while there are requests, messages in between.

One thread steps and reads; another gives signs of life, so that a long step is no silence. A front
end that is gone or frozen is given up with all that it had asked for; the engine goes on.
"""

from __future__ import annotations

import contextlib
import logging
import select
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from moe_serve.channel import Closed, Mailbox
from moe_serve.config import EngineConfig
from moe_serve.engine.engine import EngineStats
from moe_serve.errors import CapacityError, CommError, MoeServeError, RequestError
from moe_serve.launch.gathering import Gathering
from moe_serve.launch.lasting import LastingEngine
from moe_serve.launch.links import RemoteLink
from moe_serve.launch.messages import Failure
from moe_serve.server.messages import (
    BEAT_S,
    Beat,
    Cancel,
    CannotStart,
    Drain,
    Drained,
    EngineState,
    ErrorKind,
    Failed,
    FrontBeat,
    Join,
    Outputs,
    RankState,
    Refused,
    Start,
    StatsReport,
    StopOutput,
    ToFront,
    ToHost,
    Welcome,
)
from moe_serve.types import Request, StepOutput

logger = logging.getLogger(__name__)

_STATS_S = 1.0
# after the last step: who looks then shall not see what was
_LAST_STATS_S = 0.1
# a front end that is starting imports much, on a machine that may be loading a model
_STARTS_IN_S = 120.0
# beyond the time that requests have to end
_AFTER_DRAIN_S = 2.0


class ServedEngine(Protocol):
    """What a host asks of its engine: see `LastingEngine` and `RankedEngine`."""

    @property
    def config(self) -> EngineConfig: ...
    @property
    def max_model_len(self) -> int: ...
    @property
    def numerics_id(self) -> str: ...
    @property
    def about(self) -> str: ...
    @property
    def has_unfinished(self) -> bool: ...
    @property
    def remote_links(self) -> list[RemoteLink]: ...
    def add(self, request: Request) -> None: ...
    def start_step(self, for_s: float = 0.0) -> None: ...
    def finish_step(self) -> list[StepOutput]: ...
    def abort(self, request_id: str) -> bool: ...
    def stop(self, request_id: str, index: int) -> bool: ...
    def listen(self) -> None: ...
    def stats(self) -> EngineStats: ...
    def close(self) -> None: ...


class Front(Protocol):
    """Whoever a host works for. mailbox: None while there is nobody.

    silent_after_s: without a sign of life for so long, after its first, it is taken for frozen.
    """

    mailbox: Mailbox[ToHost] | None
    silent_after_s: float

    def lost(self, why: str) -> None:
        """Told that it is gone or frozen: start another one, if that is to be."""

    def check(self) -> str | None:
        """Return why it is to be given up; None: it is not."""


class Host:
    """Runs an engine for a front end until it is told to stop. `stop` may be a signal's handler.

    gap_s: how long tokens may wait for those of later steps; see `Gathering`. on_stats: given what
    the front end is told of counts; on_front: called when one has come.
    """

    def __init__(
        self, front: Front, shutdown_timeout_s: float = 30.0, gap_s: float | None = 0.0
    ) -> None:
        self._front = front
        self._shutdown_timeout_s = shutdown_timeout_s
        self._engine: ServedEngine | None = None
        self._state: EngineState = "loading"
        self._why = ""
        self._waiting: list[Start | Cancel | StopOutput] = []
        self._num_open: dict[str, int] = {}  # outputs of each request that go on
        self._lost: str | None = None
        self._new: set[str] = set()  # requests of which nothing was told
        self._unsaid = Gathering(gap_s)
        self._num_steps = 0
        self.num_stops = 0
        self._is_draining = self._is_drained = False
        self._drain_lock = threading.Lock()
        self._drain_end_s = float("inf")
        self._heard_s = time.monotonic()
        self._has_joined = False
        self._stats_s, self._counted_steps = 0.0, -1
        self._wake = socket.socketpair()
        self._is_over = threading.Event()
        self.on_stats: Callable[[StatsReport], None] = lambda report: None
        self.on_front: Callable[[], object] = lambda: None
        self._heart = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._heart.start()

    # -- what others tell it -----------------------------------------------------------------------

    def stop(self) -> None:
        """Take nothing new and end when all that runs has ended; a second time: end at once."""
        self.num_stops += 1
        with contextlib.suppress(OSError):
            self._wake[1].send(b"x")

    @property
    def is_loading(self) -> bool:
        """Whether there is no engine yet."""
        return self._engine is None

    def lost_world(self, why: str) -> None:
        """For `LastingEngine.on_loss`: the world is being formed anew."""
        self._tell(self._unsaid.take_all(time.monotonic()))  # it may take long
        self._set_state("reforming", why)

    def has_world(self) -> None:
        """For `LastingEngine.on_world`: the engine is there, or there again."""
        self._set_state("draining" if self._is_draining else "serving", "")

    # -- its work ----------------------------------------------------------------------------------

    def run(self, engine: ServedEngine) -> None:
        """Serve until `stop`, or the front end is gone for good. Raises what ended the engine."""
        self._engine = engine
        self.has_world()
        self._welcome()
        try:
            while not self._is_done():
                self._turn(engine)
        except MoeServeError as error:
            self._tell(self._unsaid.take_all(time.monotonic()))
            self._set_state("failed", str(error))
            self._say(Failed(str(error), type(error).__name__))
            self._linger()
            raise

    def close(self) -> None:
        """End the signs of life."""
        self._is_over.set()
        # else it may be the last to hold the engine, and free it while the interpreter ends: that
        # of tensors over Python's memory aborts the process
        self._heart.join()
        for end in self._wake:
            end.close()

    def _turn(self, engine: ServedEngine) -> None:
        """Make one step, or wait for something to do."""
        if engine.has_unfinished:
            # half of what they may wait: they reach the front end no later
            engine.start_step(self._unsaid.gap_for(len(self._num_open)) / 2)
            self._wait_for(engine)
            self._hear()
            self._unsaid.add(engine.finish_step(), self._new)
            self._num_steps += 1
        else:
            self._tell(self._unsaid.take_all(time.monotonic()))
            self._sleep(engine)
            self._hear()
            engine.listen()
        self._carry_out(engine)
        self._look_after(engine)

    def _is_done(self) -> bool:
        if self.num_stops == 0:
            return False
        self._begin_drain()
        return (
            self.num_stops > 1
            or self._is_drained
            or self._front.mailbox is None
            or time.monotonic() > self._drain_end_s
        )

    def _begin_drain(self) -> None:
        """Have the front end take nothing new, once."""
        with self._drain_lock:
            if self._is_draining:
                return
            self._is_draining = True
        logger.info(
            "shutting down: %d requests may take %g s; another signal ends them at once",
            len(self._num_open),
            self._shutdown_timeout_s,
        )
        self._drain_end_s = time.monotonic() + self._shutdown_timeout_s + _AFTER_DRAIN_S
        self._set_state("draining", "")
        self._say(Drain(self._shutdown_timeout_s))

    def _wait_for(self, engine: ServedEngine) -> None:
        """Tell of the steps before, and take in what is asked for, until the ranks speak."""
        while True:
            now_s, num_requests = time.monotonic(), len(self._num_open)
            self._tell(self._unsaid.take(now_s, num_requests))
            links: list[Any] = [*engine.remote_links]
            if not links or not isinstance(engine, LastingEngine):
                return  # a rank in this process would not go on meanwhile
            mailbox = self._front.mailbox
            if mailbox is not None and self._lost is None:
                links.append(mailbox)
            left_s = self._unsaid.left_s(now_s, num_requests)
            limit_s = BEAT_S / 2 if left_s is None else left_s
            there = select.select(links, [], [], limit_s)[0]
            if mailbox in there:
                self._hear()
                if self._waiting:  # ranks stop for it, and the replies to their steps are read
                    self._carry_out(engine)
                    return
            if left_s is None or any(link in there for link in engine.remote_links):
                return

    def _tell(self, outputs: tuple[StepOutput, ...]) -> None:
        if outputs:
            for output in outputs:
                self._new.discard(output.request_id)
                if output.finish_reason is not None:
                    self._has_ended(output.request_id)
            self._say(Outputs(outputs))

    def _sleep(self, engine: ServedEngine) -> None:
        """Wait for messages, signs of life, signals, or a second."""
        mailbox = self._front.mailbox
        readers: list[Any] = [self._wake[0], *engine.remote_links]
        writers: list[Any] = []
        if mailbox is not None:
            readers.append(mailbox)
            writers += [mailbox] if mailbox.has_unsent else []
        if self._waiting:
            return
        is_told = self._counted_steps == self._num_steps
        limit_s = BEAT_S / 2 if is_told else _LAST_STATS_S
        there, _, _ = select.select(readers, writers, [], limit_s)
        if self._wake[0] in there:
            self._wake[0].recv(64)

    def _hear(self) -> None:
        """Read what the front end says; what it asks for is done between two steps."""
        mailbox = self._front.mailbox
        if mailbox is None:
            return
        messages: list[ToHost] = []
        try:
            messages = mailbox.receive()
            mailbox.flush()
        except CommError as error:
            self._lost = str(error)  # a step may be under way: see `_look_after`
        if messages:
            self._heard_s = time.monotonic()
        for message in messages:
            match message:
                case Start() | Cancel() | StopOutput():
                    self._waiting.append(message)
                case Drained():
                    self._is_drained = True
                case Join():
                    self._has_joined = True
                    self.on_front()
                case CannotStart(kind=kind, message=why):
                    raise Failure(kind, why).error()
                case FrontBeat():
                    pass

    def _carry_out(self, engine: ServedEngine) -> None:
        waiting, self._waiting = self._waiting, []
        for message in waiting:
            match message:
                case Start(request=request):
                    self._start(engine, request)
                case Cancel(request_id=request_id):
                    if self._num_open.pop(request_id, 0):
                        engine.abort(request_id)
                        self._forget(request_id)
                case StopOutput(request_id=request_id, index=index):
                    if engine.stop(request_id, index):
                        self._has_ended(request_id)

    def _start(self, engine: ServedEngine, request: Request) -> None:
        try:
            engine.add(request)
        except CommError:
            raise
        except MoeServeError as error:
            self._say(Refused(request.request_id, _kind_of(error), str(error)))
        else:
            self._num_open[request.request_id] = request.sampling.n
            self._new.add(request.request_id)

    def _forget(self, request_id: str) -> None:
        self._new.discard(request_id)
        self._unsaid.drop(request_id)

    def _has_ended(self, request_id: str) -> None:
        """Take note that one output of a request has ended."""
        num_open = self._num_open.pop(request_id, 1) - 1
        if num_open:
            self._num_open[request_id] = num_open

    def _look_after(self, engine: ServedEngine) -> None:
        """See to the front end, and tell it now and then what was counted."""
        now_s = time.monotonic()
        if self._front.mailbox is not None:
            why = self._lost or self._front.check()
            limit_s = self._front.silent_after_s if self._has_joined else _STARTS_IN_S
            if why is None and now_s - self._heard_s > limit_s:
                self._hear()  # this process may be the one that was frozen
                limit_s = self._front.silent_after_s if self._has_joined else _STARTS_IN_S
                if time.monotonic() - self._heard_s > limit_s:
                    why = f"it has given no sign of life for {limit_s:.0f} s"
            if why is not None:
                self._give_up(why)
        interval_s = _STATS_S if engine.has_unfinished else _LAST_STATS_S
        if now_s - self._stats_s > interval_s and self._counted_steps != self._num_steps:
            self._stats_s, self._counted_steps = now_s, self._num_steps
            lasting = engine if isinstance(engine, LastingEngine) else None
            report = StatsReport(
                stats=engine.stats(),
                num_resubmitted=0 if lasting is None else lasting.num_resubmitted,
                num_worlds_lost=0 if lasting is None else lasting.generation,
            )
            self._say(report)
            self.on_stats(report)

    def _give_up(self, why: str) -> None:
        """Drop a front end and all that it had asked for, and welcome the next one, if any."""
        engine = self._engine
        assert engine is not None
        self._lost = None
        self._front.lost(why)
        self._waiting.clear()
        self._unsaid.clear()
        for request_id in self._num_open:
            engine.abort(request_id)
        self._num_open.clear()
        self._new.clear()
        self._heard_s = time.monotonic()
        self._has_joined = False
        self._counted_steps = -1
        self._welcome()

    def _welcome(self) -> None:
        engine = self._engine
        if engine is not None:
            self._say(Welcome(engine.max_model_len, engine.numerics_id, engine.about))
            self._say(self._beat_now())
            if self._is_draining:  # the one before it was told, and this one was not
                left_s = self._drain_end_s - _AFTER_DRAIN_S - time.monotonic()
                self._say(Drain(max(0.0, left_s)))

    # -- words -------------------------------------------------------------------------------------

    def _say(self, message: ToFront) -> None:
        mailbox = self._front.mailbox
        if mailbox is not None:
            with contextlib.suppress(Closed):  # `_hear` finds out
                mailbox.send(message)

    def _set_state(self, state: EngineState, why: str) -> None:
        self._state, self._why = state, why
        self._say(self._beat_now())

    def _beat(self) -> None:
        while not self._is_over.wait(BEAT_S):
            if self.num_stops and self._engine is not None:
                self._begin_drain()  # the other thread may be forming a world
            self._say(self._beat_now())

    def _beat_now(self) -> Beat:
        engine = self._engine
        ranks: tuple[RankState, ...] = ()
        generation = 0
        if engine is not None:
            ranks = tuple(RankState(e.rank, True, e.silent_s) for e in engine.remote_links)
        if isinstance(engine, LastingEngine):
            generation = engine.generation
        return Beat(self._state, generation, self._num_steps, ranks, self._why)

    def _linger(self) -> None:
        """Give the front end time to tell everybody that it is over."""
        end_s = time.monotonic() + _AFTER_DRAIN_S
        mailbox = self._front.mailbox
        while mailbox is not None and time.monotonic() < end_s:
            try:
                mailbox.flush()
                if any(isinstance(message, Drained) for message in mailbox.receive()):
                    return
            except CommError:
                return
            select.select([mailbox], [], [], 0.05)


def _kind_of(error: MoeServeError) -> ErrorKind:
    if isinstance(error, CapacityError):
        return "capacity"
    return "request" if isinstance(error, RequestError) else "engine"
