"""One rank at work: carries out what the coordinator says, with its engine."""

from __future__ import annotations

import contextlib
import logging
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import ClassVar

import torch

from moe_serve.channel import Channel, Closed
from moe_serve.comm._world import World
from moe_serve.engine.engine import Engine
from moe_serve.engine.memory import peak_rss_bytes
from moe_serve.errors import CommError, MoeServeError
from moe_serve.experts.placement_file import as_json, placement_from
from moe_serve.launch.gathering import Gathering
from moe_serve.launch.messages import (
    Abort,
    Add,
    Beat,
    Call,
    Close,
    Failure,
    Place,
    RankStats,
    Ready,
    Release,
    Reply,
    Resize,
    Stats,
    Step,
    Stop,
    TakeRouting,
    TokensUsed,
)
from moe_serve.types import Request, StepOutput

logger = logging.getLogger(__name__)

BEAT_S = 1.0


class RankWorker:
    """An engine, of one rank of several or alone, and what it is told to do.

    world: None where it is alone.
    """

    def __init__(self, engine: Engine, world: World | None = None, about: str = "") -> None:
        self.engine = engine
        self._world = world
        self._about = about
        self._num_steps = self._num_tokens = 0
        self._new: set[str] = set()  # requests that have no token yet

    def ready(self) -> Ready:
        engine = self.engine
        placement = None if engine.placement is None else as_json(engine.placement)
        about = (engine.max_model_len, engine.numerics_id, self._about)
        return Ready(*about, placement, self._stats())

    def close(self) -> None:
        """Give back what only ranks have."""
        if self._world is not None:
            self._world.close()

    def do(self, call: Call, is_called: Callable[[], bool] = lambda: False) -> Reply:
        """Carry out one call. What is wrong with it alone comes back as the reply's failure.

        is_called: whether there is another call, for which several steps are not to go on. Raises
        CommError where the ranks are no longer of one mind.
        """
        engine = self.engine
        try:
            match call:
                case Add(request=request):
                    self._add(request)
                case Abort(request_id=request_id):
                    self._new.discard(request_id)
                    return self._reply(is_true=engine.abort(request_id))
                case Stop(request_id=request_id, index=index):
                    return self._reply(is_true=engine.stop(request_id, index))
                case Step():
                    return self._steps(call, is_called)
                case Place(placement=placement):
                    engine.place(placement_from(placement))
                case TakeRouting():
                    return self._reply(used=TokensUsed.of(*engine.recent_routing()))
                case Resize(slots_per_layer=slots_per_layer):
                    engine.resize_expert_cache(slots_per_layer)
                case Stats():
                    return self._reply(stats=self._stats())
                case Close():
                    engine.close()
                case Release():
                    pass
        except CommError:
            raise
        except MoeServeError as error:
            return self._reply(failure=Failure.of(error))
        return self._reply()

    def _add(self, request: Request) -> None:
        """Admit a request. A fault in that is this request's alone: nothing of it was run."""
        try:
            self.engine.add(request)
            self._new.add(request.request_id)
        except MoeServeError:
            raise
        except Exception as error:
            logger.exception("a request could not be taken")
            why = f"the request could not be taken: {type(error).__name__}: {error}"
            raise MoeServeError(why) from error

    def _step(self, move_bytes: int) -> list[StepOutput]:
        """Take part in a step. Whatever fails here fails all: others are waiting for this rank."""
        try:
            outputs = self.engine.step(move_bytes)
        except CommError:
            raise
        except MoeServeError as error:
            raise CommError(f"{type(error).__name__}: {error}") from error
        self._num_steps += 1
        self._num_tokens += sum(len(output.token_ids) for output in outputs)
        return outputs

    def _steps(self, call: Step, is_called: Callable[[], bool]) -> Reply:
        """Make one step, or steps for some time; see `Step`. The reply has each output once."""
        gathering, num_steps = Gathering(call.for_s), 0
        end_s = time.perf_counter() + call.for_s
        is_free = call.for_s > 0  # others do not count on its steps
        while not (is_free and (is_called() or not self.engine.has_unfinished)):
            begun_s = time.perf_counter()
            gathering.add(self._step(call.move_bytes), self._new)
            num_steps += 1
            now_s = time.perf_counter()
            # a step more would last as long as this one
            is_late = now_s + (now_s - begun_s) > end_s
            if gathering.is_urgent or is_late or not self.engine.has_unfinished:
                break
        outputs = gathering.take_all(time.monotonic())
        self._new.difference_update(output.request_id for output in outputs)
        return self._reply(outputs, num_steps=num_steps)

    def _reply(
        self,
        outputs: tuple[StepOutput, ...] = (),
        num_steps: int = 0,
        is_true: bool = False,
        stats: RankStats | None = None,
        used: TokensUsed | None = None,
        failure: Failure | None = None,
    ) -> Reply:
        engine = self.engine
        return Reply(
            outputs,
            num_steps,
            is_true,
            engine.has_unfinished,
            engine.is_moving,
            engine.bytes_moved,
            engine.moving_s,
            engine.pairs_computed,
            stats,
            used,
            failure,
        )

    def _stats(self) -> RankStats:
        return RankStats(
            stats=self.engine.stats(),
            num_threads=torch.get_num_threads(),
            peak_rss_bytes=peak_rss_bytes(),
            num_steps=self._num_steps,
            num_idle_steps=self.engine.num_idle_steps,
            num_tokens=self._num_tokens,
            pairs_computed=self.engine.pairs_computed,
            pairs_sent=0 if self._world is None else self._world.pairs_sent,
            num_collectives=0 if self._world is None else self._world.num_collectives,
            bytes_sent=0 if self._world is None else self._world.bytes_sent,
            exchange_s=0.0 if self._world is None else self._world.exchange_s,
            num_waits=0 if self._world is None else self._world.num_waits,
            epoch=self.engine.epoch,
            experts_moved=self.engine.num_moved,
            bytes_moved=self.engine.bytes_moved,
            steps_by_dispatcher=self.engine.steps_by_dispatcher(),
        )


class Heart:
    """Sends a sign of life every second, from a thread of its own."""

    def __init__(self, channel: Channel[Call]) -> None:
        self._channel = channel
        self._is_over = threading.Event()
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def stop(self) -> None:
        self._is_over.set()

    def _beat(self) -> None:
        while not self._is_over.wait(BEAT_S):
            try:
                self._channel.send(Beat())
            except CommError:
                return


class Follower:
    """The end of a rank that is told what to do by a coordinator in another process."""

    # of this process: a script may have several models, and any of them may be called at any time
    _open: ClassVar[list[Follower]] = []

    def __init__(self, worker: RankWorker, channel: Channel[Call], heart: Heart) -> None:
        self.worker = worker
        self._channel = channel
        self._heart = heart
        self._num_released = 0
        self._calls: deque[Call] = deque()  # received, and not done yet
        self._failure: CommError | None = None
        channel.send(worker.ready())
        self._open.append(self)

    @property
    def is_closed(self) -> bool:
        return self not in self._open

    def follow(self, until_close: bool = False) -> None:
        """Do what is said until a run has ended, or, `until_close`, until all has.

        What the coordinators of this process' other models say is done meanwhile. Raises CommError
        where ranks fail each other, or the coordinator is gone.
        """
        while not self.is_closed:
            if self._num_released and not until_close:
                self._num_released -= 1
                return
            for follower in select.select(self._open, [], [])[0]:
                follower.take()
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    @classmethod
    def follow_all(cls) -> None:
        """Do what is said until every coordinator has closed: nobody is left to raise to."""
        followers = list(cls._open)
        while cls._open:
            for follower in select.select(cls._open, [], [])[0]:
                follower.take()
        for follower in followers:
            if follower._failure is not None:
                logger.error("%s", follower._failure)

    def fileno(self) -> int:
        return self._channel.fileno()

    def take(self) -> None:
        """Do what was said. What cannot go on is closed, and raised by `follow`."""
        try:
            self._calls.append(self._channel.receive())
            while self._calls:
                self._do(self._calls.popleft())
        except Closed:
            self.worker.engine.close()
            self._failure = CommError("rank 0, or what started the ranks, is gone")
            self._end()
        except BaseException as error:
            tell_failure(self._channel, error)
            self._end()
            if not isinstance(error, CommError):
                raise
            self._failure = error

    def _do(self, call: Call) -> None:
        if isinstance(call, Release):
            self._num_released += 1
            return
        self._channel.send(self.worker.do(call, self._is_called))
        if isinstance(call, Close):
            self._end()

    def _is_called(self) -> bool:
        """Return whether another call than a step has come."""
        while self._channel.has_message:
            self._calls.append(self._channel.receive())
        return any(not isinstance(call, Step) for call in self._calls)

    def _end(self) -> None:
        self._calls.clear()
        self._open.remove(self)
        self._heart.stop()
        self._channel.close()
        self.worker.close()


def tell_failure(channel: Channel[Call], error: BaseException) -> None:
    """Let the coordinator know why this rank ends, if it still listens."""
    with contextlib.suppress(CommError):
        channel.send(Reply(failure=Failure.of(error)))
