"""Requests to ranks and their outputs back: what several engines look like as one.

Each request has a home, the rank that schedules it and keeps its keys and values. All ranks step
together. See `moe_serve.llm.TokenEngine`.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from moe_serve.channel import encoded
from moe_serve.config import EngineConfig
from moe_serve.engine.engine import EngineStats, check_ids
from moe_serve.engine.ranks import file_of_rank
from moe_serve.errors import CommError, ConfigError, MoeServeError, RequestError
from moe_serve.experts.placement.base import Placement
from moe_serve.experts.placement_file import as_json, placement_from
from moe_serve.experts.trace import join_traces
from moe_serve.launch.homes import Homes
from moe_serve.launch.links import Link, RemoteLink, finish_all
from moe_serve.launch.messages import (
    Abort,
    Add,
    Call,
    Close,
    Place,
    RankStats,
    Release,
    Reply,
    Resize,
    Stats,
    Step,
    Stop,
    TakeRouting,
)
from moe_serve.launch.move_budget import MoveBudget
from moe_serve.launch.pairs_window import PairsWindow
from moe_serve.launch.rank_sums import together
from moe_serve.launch.rebalancer import Rebalancer
from moe_serve.models.spec import ModelSpec
from moe_serve.text.interrupts import HeldInterrupt
from moe_serve.types import Request, StepOutput

logger = logging.getLogger(__name__)

# steps between two looks at what tokens used, for homes by affinity
_LEARN_EVERY = 16
# Where steps are this short, ranks are told of the next one while they are at one: they need not
# wait for the coordinator. A new request then joins a step later than it might.
_SHORT_STEP_S = 0.01


@dataclass(slots=True)
class _Live:
    """A request at its home. num_tokens: what it may come to; open: its outputs that go on."""

    home: int
    num_tokens: int
    open: set[int]


class RankedEngine:
    """The ranks of one model, as one engine.

    links: one for each rank, by rank. on_end: called when no rank is to be told anything any more
    (again, if an interrupt cut it short); it is given what went wrong, or None.
    """

    def __init__(
        self,
        config: EngineConfig,
        spec: ModelSpec,
        links: Sequence[Link],
        on_end: Callable[[BaseException | None], None],
    ) -> None:
        self.config = config
        self.spec = spec
        self._links = links
        self._on_end = on_end
        self._live: dict[str, _Live] = {}
        self._is_unfinished = [False] * len(links)
        self._num_begun = 0  # steps that the ranks were told of, and whose replies were not read
        self._early: deque[list[Reply]] = deque()  # replies to steps, read before `finish_step`
        self._is_short = False
        self._are_remote = all(isinstance(link, RemoteLink) for link in links)
        self.is_moving = False
        self._bytes_moved, self._moving_s = 0, 0.0
        self._budget = MoveBudget()
        self._step_start_s = self._longest_s = 0.0
        self._failure: str | None = None
        self._is_closed = self._has_ended = False
        first = links[0].ready
        self.max_model_len = min(link.ready.max_model_len for link in links)
        self.numerics_id = first.numerics_id
        self.about = first.about
        placement = None if first.placement is None else placement_from(first.placement)
        options = config.ranks
        self._rebalancer: Rebalancer | None = None
        if placement is not None and options.rebalance is not None:
            self._rebalancer = Rebalancer(options, placement)
        by_affinity = options.home == "affinity"
        self._homes = Homes(len(links), spec.vocab_size, placement if by_affinity else None)
        self._is_learning = placement is not None and by_affinity
        self._num_steps = 0
        self._pairs = PairsWindow(len(links))
        self._stats = self._together([link.ready.stats for link in links])

    @property
    def has_unfinished(self) -> bool:
        return bool(self._early) or any(self._is_unfinished)

    def add(self, request: Request) -> None:
        """Give a request its home (see `Homes`), one for all its outputs; as `Engine.add`."""
        check_ids(request, self.spec.vocab_size)
        if request.request_id in self._live:
            raise RequestError(
                f"request_id {request.request_id!r} is in use by an unfinished request; "
                "give another, or abort that one"
            )
        sampling = request.sampling
        longest = max(0, self.max_model_len - len(request.prompt_ids))
        new = min(longest, sampling.max_tokens or longest)
        num_tokens = len(request.prompt_ids) + sampling.n * new
        home = self._homes.choose(request.prompt_ids, num_tokens)
        try:
            self._call(home, Add(request))
        except MoeServeError:
            self._homes.release(home, num_tokens)
            raise
        open_ = set(range(sampling.n))
        if request.output_ids:
            open_ = {index for index in open_ if request.output_ids[index] is not None}
        self._live[request.request_id] = _Live(home, num_tokens, open_)

    def step(self) -> list[StepOutput]:
        """Let every rank take part in one step; return what all gave. Raises CommError."""
        self.start_step()
        return self.finish_step()

    def start_step(self, for_s: float = 0.0) -> None:
        """Begin a step, unless it has begun: `finish_step` must follow. Raises CommError.

        for_s: how long the outputs of steps may wait for those of later ones. A rank that is alone
        then makes several, and can be given requests meanwhile.
        """
        if not self._num_begun:
            self._step_start_s = time.perf_counter()
        is_alone = self._are_remote and len(self._links) == 1
        while self._num_begun + len(self._early) < self._most_begun:
            move_bytes = self._budget.next_bytes() if self.is_moving else 0
            step = Step(move_bytes, for_s if is_alone and not self.is_moving else 0.0)
            self._start(range(len(self._links)), step)
            self._num_begun += 1

    def finish_step(self) -> list[StepOutput]:
        """Wait for the step that was begun; return what all ranks gave. Raises CommError."""
        assert self._early or self._num_begun, "no step was begun"
        replies = self._early.popleft() if self._early else self._read_step()
        if not any(self._is_unfinished):
            self._read_steps()  # those ahead had nothing to do
        self._pairs.told([reply.pairs_computed for reply in replies])
        outputs = [output for reply in replies for output in reply.outputs]
        for output in outputs:
            if output.finish_reason is not None:
                self._forget(output.request_id, output.index)
        self._after_step(replies[0].num_steps)
        return outputs

    def abort(self, request_id: str) -> bool:
        """As `Engine.abort`."""
        live = self._live.get(request_id)
        if live is None or self._is_over:
            return False
        is_true = self._call(live.home, Abort(request_id)).is_true
        for index in tuple(live.open):
            self._forget(request_id, index)
            is_true |= self._drop_early(request_id, index)
        return is_true

    def stop(self, request_id: str, index: int) -> bool:
        """As `Engine.stop`."""
        live = self._live.get(request_id)
        if live is None or self._is_over:
            return False
        is_true = self._call(live.home, Stop(request_id, index)).is_true
        is_true |= self._drop_early(request_id, index)
        if is_true:
            self._forget(request_id, index)
        return is_true

    def place(self, placement: Placement, bytes_per_step: int | None = None) -> None:
        """Begin to move experts to where `placement` has them, while the engine serves.

        They travel before the next steps, whole records, so many that steps take a tenth longer at
        most on average; bytes_per_step: or at most so many bytes on all ranks, but one record at
        least. `is_moving` says whether some are yet to arrive; no token depends on any of it.
        Raises ConfigError for a placement of another model or other ranks, or while one is under
        way.
        """
        if bytes_per_step is not None and bytes_per_step < 1:
            raise ConfigError(f"bytes_per_step is {bytes_per_step}; it must be 1 or more")
        for reply in self._call_all(Place(as_json(placement))):
            if reply.failure is not None:
                raise reply.failure.error()
        self._budget = MoveBudget(bytes_per_step)
        self._homes.place(placement)
        if self._rebalancer is not None:
            self._rebalancer.present = placement

    def resize_expert_cache(self, slots_per_layer: int) -> None:
        """As `Engine.resize_expert_cache`, on every rank."""
        for reply in self._call_all(Resize(slots_per_layer)):
            if reply.failure is not None:
                raise reply.failure.error()

    def stats(self) -> EngineStats:
        """Return counts of all ranks together, and of each; the last known once it has ended."""
        if not self._is_over:
            self._stats = self._gathered()
        return self._stats

    def listen(self) -> None:
        """Hear the ranks while they have nothing to do: often, or signs of life pile up.

        Raises CommError where one is gone or frozen: then all are ended.
        """
        try:
            for link in self.remote_links:
                link.listen()
        except CommError as error:
            self._end(error)
            raise

    @property
    def remote_links(self) -> list[RemoteLink]:
        """The links to ranks in other processes: for `select`, and to see when they last spoke."""
        return (
            [] if self._is_over else [link for link in self._links if isinstance(link, RemoteLink)]
        )

    def release(self) -> None:
        """Let scripts that run on every rank go on: a run of rank 0 has ended."""
        if not self._is_over:
            data = encoded(Release())
            with contextlib.suppress(CommError):  # who calls next will hear of it
                for link in self._links:
                    link.start(Release(), data)

    def abandon(self) -> None:
        """End all ranks at once; nothing is written."""
        if not self._is_over:
            self._end(CommError("they were stopped"))

    def close(self) -> None:
        """End all ranks; each writes what it was asked to. Raises what one of them could not."""
        if self._is_over:
            if not self._has_ended:  # an interrupt cut the end short
                self._end(CommError(self._failure or "closed"))
            return
        self._stats = self._gathered()
        replies = self._call_all(Close())
        self._end(None)
        for rank, reply in enumerate(replies):
            if reply.failure is not None:
                raise reply.failure.error(f"rank {rank}: ")
        self._join_traces()

    def _join_traces(self) -> None:
        """Make one trace of those of the ranks, where all of them are on this machine."""
        path = self.config.experts.record_trace
        if path is None or len(self._links) == 1:
            return
        parts = [file_of_rank(Path(path), rank) for rank in range(len(self._links))]
        if all(part.is_file() for part in parts):
            join_traces(parts, Path(path))
        else:
            names = ", ".join(part.name for part in parts)
            logger.warning("%s: each rank has written its own, on its machine: %s", path, names)

    # -- calls -------------------------------------------------------------------------------------

    @property
    def _is_over(self) -> bool:
        return self._is_closed or self._failure is not None

    def _call(self, rank: int, call: Call) -> Reply:
        """Call one rank. Raises what it could not do."""
        reply = self._guarded([rank], call)[0]
        if reply.failure is not None:
            raise reply.failure.error()
        return reply

    def _call_all(self, call: Call) -> list[Reply]:
        return self._guarded(range(len(self._links)), call)

    def _guarded(self, ranks: Sequence[int], call: Call) -> list[Reply]:
        """Call ranks at once. Raises CommError when one of them is gone: then all are ended."""
        self._start(ranks, call)
        self._read_steps()
        return self._finish(ranks)

    def _start(self, ranks: Sequence[int], call: Call) -> None:
        if self._failure is not None:
            raise CommError(f"the ranks have ended: {self._failure}")
        if self._is_closed:
            raise CommError("the ranks were closed; make another engine")
        data = encoded(call)  # what cannot be said harms nobody
        try:
            for rank in ranks:
                self._links[rank].start(call, data)
        except CommError as error:
            cause = self._cause(error) if self._num_begun else error
            self._end(cause)
            raise cause from None
        except BaseException as error:
            self._end(error)
            raise

    def _cause(self, error: CommError) -> CommError:
        """Return what a rank that is gone, or another one, has said of a step that was begun."""
        try:
            finish_all(self._links, self._longest_s)
        except CommError as cause:
            return cause
        return error

    def _finish(self, ranks: Sequence[int]) -> list[Reply]:
        try:
            replies = finish_all([self._links[rank] for rank in ranks], self._longest_s)
        except BaseException as error:  # an interrupt, too: replies would be mixed up
            self._end(error)
            raise
        for rank, reply in zip(ranks, replies, strict=True):
            self._is_unfinished[rank] = reply.has_unfinished
            self.is_moving = reply.is_moving
            self._bytes_moved = reply.bytes_moved
        self._moving_s = max([self._moving_s, *(reply.moving_s for reply in replies)])
        return replies

    # -- steps ahead -------------------------------------------------------------------------------

    @property
    def _most_begun(self) -> int:
        """How many steps ranks may be told of at a time."""
        learns = self._rebalancer is not None or self._is_learning
        is_ahead = self._is_short and self._are_remote and not (learns or self.is_moving)
        return 2 if is_ahead else 1

    def _read_step(self) -> list[Reply]:
        """Wait for the replies to the earliest step that was begun."""
        before = self._bytes_moved, self._moving_s
        begun_s = time.perf_counter()
        replies = self._finish(range(len(self._links)))
        self._num_begun -= 1
        now_s = time.perf_counter()
        taken_s, self._step_start_s = now_s - self._step_start_s, now_s
        step_s = taken_s / max(1, replies[0].num_steps)
        # who steps may come back after hours, of which the ranks know nothing
        self._longest_s = max(self._longest_s, now_s - begun_s)
        self._is_short = step_s < _SHORT_STEP_S
        self._budget.told(taken_s, self._bytes_moved - before[0], self._moving_s - before[1])
        return replies

    def _read_steps(self) -> None:
        """Wait for every step that was begun: ranks reply in the order in which they are told."""
        while self._num_begun:
            replies = self._read_step()
            if any(reply.outputs or reply.has_unfinished for reply in replies):
                self._early.append(replies)
            else:
                self._num_steps += replies[0].num_steps  # though nothing was to do

    def _drop_early(self, request_id: str, index: int) -> bool:
        """Drop what early replies have of an output that was ended; return whether they had."""
        ended, had = (request_id, index), False
        for replies in self._early:
            for place, reply in enumerate(replies):
                kept = tuple(out for out in reply.outputs if (out.request_id, out.index) != ended)
                if len(kept) < len(reply.outputs):
                    had = True
                    replies[place] = msgspec.structs.replace(reply, outputs=kept)
        return had

    def _end(self, error: BaseException | None) -> None:
        self._is_closed = True
        self._is_unfinished = [False] * len(self._links)
        self._num_begun = 0
        self._early.clear()
        if error is not None:
            self._failure = str(error) or type(error).__name__
        with HeldInterrupt():
            for link in self._links:
                link.close()
            if self._rebalancer is not None:
                self._rebalancer.close()
            self._on_end(error)
            self._has_ended = True

    # -- books -------------------------------------------------------------------------------------

    def _forget(self, request_id: str, index: int) -> None:
        live = self._live.get(request_id)
        if live is None:
            return
        live.open.discard(index)
        if not live.open:
            self._homes.release(live.home, live.num_tokens)
            del self._live[request_id]

    def _after_step(self, num_steps: int) -> None:
        """Learn from what tokens used, and let experts move, where that was asked for."""
        self._num_steps += num_steps
        rebalancer = self._rebalancer
        is_due = rebalancer is not None and rebalancer.is_due() and not self.is_moving
        if is_due or (self._is_learning and self._num_steps % _LEARN_EVERY == 0):
            used = [reply.used.arrays() for reply in self._call_all(TakeRouting()) if reply.used]
            if self._is_learning:
                for token_ids, experts in used:
                    self._homes.learn(token_ids, experts)
            if rebalancer is not None:
                rebalancer.learn([experts for _, experts in used])
        if rebalancer is None or self.is_moving:
            return
        if is_due:
            rebalancer.consider()
        placement = rebalancer.found()
        if placement is not None:
            try:
                self.place(placement)
            except ConfigError as error:  # a strategy that gives what is none
                rebalancer.refused(error)

    def _gathered(self) -> EngineStats:
        found: list[RankStats] = []
        for reply in self._call_all(Stats()):
            if reply.stats is None:
                raise CommError("a rank gave no statistics")
            found.append(reply.stats)
        return self._together(found)

    def _together(self, found: Sequence[RankStats]) -> EngineStats:
        rebalance = None if self._rebalancer is None else self._rebalancer.report()
        return together(found, self._num_steps, self._pairs.imbalance(), rebalance)
