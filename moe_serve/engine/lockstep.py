"""The engine of one rank of several: its steps begin together, and every rank takes part in each.

A rank schedules its own requests. What a rank owes the others is its part in every MoE layer of
every step, also without a token, and also after its own step has failed.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from moe_serve.comm.auto import Auto
from moe_serve.engine.engine import Engine
from moe_serve.engine.model_runner import ModelRunner
from moe_serve.engine.mover import Mover
from moe_serve.engine.rank_parts import Progress, RankParts
from moe_serve.engine.ranks import check_placement
from moe_serve.engine.sequence import SamplerOutput, ScheduledStep
from moe_serve.errors import STEP_FAULTS, CommError, ConfigError
from moe_serve.experts.placement.base import Array, Placement
from moe_serve.experts.rank_experts import RankExperts
from moe_serve.types import ForwardBatch, StepOutput


class LockstepRunner(ModelRunner):
    """Runs steps whose MoE layers are shared with other ranks."""

    may_split = False  # they wait for one pass of each

    def run(self, step: ScheduledStep) -> SamplerOutput:
        """See `ModelRunner`. What fails here still takes its part in what others wait for."""
        try:
            return super().run(step)
        except CommError:
            raise
        except STEP_FAULTS:
            self.take_part(sum(step.query_lens))
            raise

    @torch.inference_mode()
    def take_part(self, num_tokens: int) -> None:
        """Go with `num_tokens` rows of no meaning through the MoE layers that are left of a step.

        Raises CommError where one of them was cut in two.
        """
        progress = self.model.dispatcher
        if not isinstance(progress, Progress):
            return
        if progress.is_open:
            raise CommError("this rank failed between sending tokens and getting them back")
        if progress.done == max(self.model.experts.layers):
            return
        with self.model.experts.step(_without_sequences(num_tokens)):
            self.model.take_part(num_tokens, progress.done)


class LockstepEngine(Engine):
    """The engine of one rank. `step` must be called on all ranks at once."""

    runner: LockstepRunner

    def __init__(self, rank: RankParts, *args: Any, **kwargs: Any) -> None:
        """args, kwargs: as for `Engine`."""
        super().__init__(*args, **kwargs)
        self.about_ranks = rank.about
        self.placement = None if rank.share is None else rank.share.placement
        self._header = rank.header
        self._world = rank.world
        self._num_here = rank.num_here
        self._mover: Mover | None = None
        self._num_shared = 0

    def step(self, move_bytes: int = 0) -> list[StepOutput]:
        """Take part in one step; return what this rank's own requests were given.

        move_bytes: of experts that may travel before it, where another placement is being taken
        over; on all ranks together, and the same on all. Raises CommError where ranks do not agree,
        or one is gone: no step may follow.
        """
        self._refuse_if_closed()
        self._take_grammars()
        step = self.scheduler.schedule()
        num_tokens = 0 if step is None else sum(step.query_lens)
        try:
            dispatcher = self.runner.model.dispatcher
            counts = self._header.share(self.epoch, num_tokens)
            self._advance(move_bytes)
            if dispatcher is not None and any(counts):
                dispatcher.begin_step(counts)
                self._num_shared += 1
                if step is None:
                    self.runner.take_part(0)
        except BaseException:
            if step is not None:
                self.scheduler.retract(step)
            raise
        if step is None:
            self.num_idle_steps += any(counts)
            if not any(counts):
                self._wait_for_grammars()
            return self._told([])
        return self._told(self._run(step))

    @property
    def is_moving(self) -> bool:
        """As `Engine.is_moving`."""
        return self._mover is not None

    @property
    def epoch(self) -> int:
        """As `Engine.epoch`."""
        dispatcher = self.runner.model.dispatcher
        return dispatcher.layout.epoch if isinstance(dispatcher, Progress) else 0

    @property
    def pairs_computed(self) -> int:
        """How many (token, expert) pairs this rank's experts were given; 0 of a dense model."""
        experts = self.runner.model.experts
        return experts.pairs_computed if isinstance(experts, RankExperts) else 0

    def steps_by_dispatcher(self) -> dict[str, int]:
        """Return in how many steps tokens travelled by each dispatcher; {} of a dense model."""
        dispatcher = self.runner.model.dispatcher
        if not isinstance(dispatcher, Progress):
            return {}
        if isinstance(dispatcher.inner, Auto):
            return dict(dispatcher.inner.num_steps)
        return {self.config.ranks.dispatcher: self._num_shared}

    def place(self, placement: Placement) -> None:
        """Begin to take another placement over, with the next steps; on all ranks at once.

        Raises ConfigError for a placement that is not of this model and these ranks, or while
        another one is being taken over.
        """
        dispatcher, old = self.runner.model.dispatcher, self.placement
        if old is None or not isinstance(dispatcher, Progress):
            raise ConfigError("the model is dense: there are no experts to place")
        if self._mover is not None:
            raise ConfigError("another placement is being taken over; wait until that is done")
        check_placement("the new placement", placement, old)
        experts = self.runner.model.experts
        assert isinstance(experts, RankExperts)
        self._mover = Mover(self._world, dispatcher.layout, experts, old, placement)

    def recent_routing(self) -> tuple[Array, Array]:
        """Return what tokens used since this was asked last; see `RecentRouting.take`."""
        experts = self.runner.model.experts
        if not isinstance(experts, RankExperts) or experts.recent is None:
            raise ConfigError("the latest routing is kept for --rebalance or --home affinity only")
        return experts.recent.take()

    def _available_bytes(self) -> int:
        is_on_host = self.runner.model.kernels.device.type == "cpu"
        return super()._available_bytes() // (self._num_here if is_on_host else 1)

    def _advance(self, move_bytes: int) -> None:
        if self._mover is not None:
            start_s = time.perf_counter()
            num_moved, num_bytes = self._mover.advance(move_bytes)
            self.num_moved += num_moved
            self.bytes_moved += num_bytes
            self.moving_s += time.perf_counter() - start_s
            if self._mover.is_done:
                self.placement, self._mover = self._mover.new, None


def _without_sequences(num_tokens: int) -> ForwardBatch:
    """Return a batch of tokens that belong to nobody."""
    none = torch.zeros(num_tokens, dtype=torch.int64)
    return ForwardBatch(
        token_ids=none,
        positions=none,
        sequence_ids=none - 1,
        query_lens=(),
        context_lens=(),
        prompt_lens=(),
        slot_mapping=(),
        block_tables=(),
        block_size=1,
        sample_rows=none[:0],
    )
