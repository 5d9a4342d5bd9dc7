"""The engine: requests in, tokens out, one step at a time. It knows no text and no network."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

from moe_serve.config import EngineConfig
from moe_serve.engine.admission import check_priority
from moe_serve.engine.device_memory import usable_bytes
from moe_serve.engine.grammar import Grammars
from moe_serve.engine.model_runner import ModelRunner
from moe_serve.engine.scheduler import Scheduler
from moe_serve.engine.sequence import ScheduledStep
from moe_serve.errors import STEP_FAULTS, CapacityError, CommError, ConfigError, RequestError
from moe_serve.experts.offload import OffloadedExperts
from moe_serve.experts.placement.base import Array, Placement
from moe_serve.experts.rank_experts import RankExperts
from moe_serve.models.spec import ModelSpec
from moe_serve.types import FinishReason, Request, StepOutput

logger = logging.getLogger(__name__)

# how long a step waits for a grammar when there is nothing else to do
GRAMMAR_WAIT_S = 0.005


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineStats:
    """Counts since the engine was built, but for what is so now; sizes in bytes.

    num_steps, step_tokens, num_prompt_tokens, num_generation_tokens, num_finished: see `Counts`.
    prefix_query_tokens, prefix_hit_tokens: looked for, and found, in the prefix cache. num_waiting,
    num_running: sequences now, of the latter max_num_seqs at most. num_kv_blocks: of each cache
    group, and of these, now: num_free_kv_blocks hold nothing, num_cached_kv_blocks are held by
    nobody and kept for their prefix, the others are held by sequences.

    expert_layers: the model's numbers of its MoE layers. expert_uses: for each of these, how many
    rows each expert was given, [num_experts]; on ranks each row counts once, where it was computed.
    resident: likewise 1 for those that are in memory now, on any rank, and 0; [] where all are.
    experts: {} where all are held. ranks: of each, where there are several; the other counts are
    then those of all. The first has what came of looking for better placements. rank_imbalance: of
    the last 1,000 steps or so, the rows that the busiest rank's experts were given, over the mean.
    """

    num_steps: int
    step_tokens: int
    num_prompt_tokens: int
    num_generation_tokens: int
    num_finished: dict[FinishReason, int]
    num_preemptions: int
    prefix_query_tokens: int
    prefix_hit_tokens: int
    num_waiting: int
    num_running: int
    max_num_seqs: int
    num_kv_blocks: list[int]
    num_free_kv_blocks: list[int]
    num_cached_kv_blocks: list[int]
    model_bytes: int
    kv_bytes: int
    expert_layers: list[int] = field(default_factory=list)
    expert_uses: list[list[int]] = field(default_factory=list)
    resident: list[list[int]] = field(default_factory=list)
    experts: dict[str, Any] = field(default_factory=dict)
    ranks: list[dict[str, Any]] = field(default_factory=list)
    rank_imbalance: float | None = None


class Engine:
    """Runs requests of one model, batched, each as if it ran alone.

    Made by `engine.build.build_engine`. Not for use by several threads at once. What only one rank
    of several has, `LockstepEngine` adds; alone, nothing is ever placed anew.
    """

    placement: Placement | None = None
    num_idle_steps = num_moved = bytes_moved = 0
    moving_s = 0.0

    def __init__(
        self,
        config: EngineConfig,
        spec: ModelSpec,
        scheduler: Scheduler,
        runner: ModelRunner,
        grammars: Grammars,
        *,
        max_model_len: int,
        numerics_id: str,
        model_bytes: int,
        kv_bytes: int,
    ) -> None:
        self.config = config
        self.spec = spec
        self.scheduler = scheduler
        self.runner = runner
        self.grammars = grammars
        self.max_model_len = max_model_len
        self.numerics_id = numerics_id
        self._model_bytes = model_bytes
        self._is_closed = False
        self._kv_bytes = kv_bytes
        self._untold: list[StepOutput] = []

    def add(self, request: Request) -> None:
        """Admit a request, or refuse it at once: RequestError or CapacityError.

        One with structured_outputs runs when these are compiled, beside the steps; what is wrong
        with them ends its outputs with an error.
        """
        self._refuse_if_closed()
        check_ids(request, self.spec.vocab_size)
        check_routed_experts(request, self.config, self.spec)
        check_priority(request, self.scheduler.policy)
        has_grammar = request.sampling.structured_outputs is not None
        if has_grammar:
            self.grammars.check()
        is_new = not self.scheduler.has(request.request_id)
        try:
            self.scheduler.add(request, is_held=has_grammar)
            if has_grammar:
                self.grammars.begin(request)
        except BaseException:
            if is_new:
                self.abort(request.request_id)
            raise

    def step(self, move_bytes: int = 0) -> list[StepOutput]:
        """Give every scheduled sequence its next token; [] when there is nothing to do.

        move_bytes: see `LockstepEngine`; there is nothing to move here.
        Where there is nothing but grammars to wait for, it waits GRAMMAR_WAIT_S at most.
        A step that cannot be run (out of memory, say) ends the outputs that took part in it with
        an error, and all others go on. An interrupt while the model runs loses nothing: its step is
        run again. One that comes among the scheduler's books may: hold it back, as `LLM` does.
        """
        if self.scheduler.has_unfinished:
            self._refuse_if_closed()
        self._take_grammars()
        step = self.scheduler.schedule()
        if step is None:
            self._wait_for_grammars()
            return self._told([])
        return self._told(self._run(step))

    def _take_grammars(self) -> None:
        """Let requests run whose grammars are there, and end those whose grammars are wrong."""
        if not self.grammars.num_pending:
            return
        for compiled in self.grammars.take():
            if compiled.error is None:
                self.scheduler.release(compiled.request_id, compiled.matchers)
            else:
                self._untold += self.scheduler.refuse(
                    compiled.request_id, compiled.error, compiled.is_refused
                )

    def _wait_for_grammars(self) -> None:
        if self.grammars.num_pending and not self._untold:
            self.grammars.wait(GRAMMAR_WAIT_S)

    def _told(self, outputs: list[StepOutput]) -> list[StepOutput]:
        """Return the outputs of requests that were ended since the last step, and these."""
        if self._untold:
            outputs = self._untold + outputs
            self._untold = []
        return outputs

    def _run(self, step: ScheduledStep) -> list[StepOutput]:
        try:
            output = self.runner.run(step)
        except CommError:  # not this step alone: none can follow
            self.scheduler.retract(step)
            raise
        except STEP_FAULTS as error:
            logger.debug("step %d failed", step.step, exc_info=True)
            return self.scheduler.fail(step, f"the step failed: {type(error).__name__}: {error}")
        except BaseException:  # an interrupt, or a fault of ours
            self.scheduler.retract(step)
            raise
        return self.scheduler.finish(step, output)

    def abort(self, request_id: str) -> bool:
        """Drop a request and all it holds; return whether it was there."""
        self.grammars.cancel(request_id)
        if self._untold:
            self._untold = [out for out in self._untold if out.request_id != request_id]
        return self.scheduler.abort(request_id)

    def stop(self, request_id: str, index: int) -> bool:
        """End one output, as if it had stopped by itself; return whether it was running."""
        is_stopped = self.scheduler.stop(request_id, index)
        if not self.scheduler.has(request_id):
            self.grammars.cancel(request_id)
        return is_stopped

    @property
    def has_unfinished(self) -> bool:
        return self.scheduler.has_unfinished or bool(self._untold)

    def stats(self) -> EngineStats:
        scheduler, experts = self.scheduler, self.runner.model.experts
        counts, pools = scheduler.counts, scheduler.kv.pools
        layers = sorted(experts.layers)
        return EngineStats(
            num_steps=counts.num_steps,
            step_tokens=counts.step_tokens,
            num_prompt_tokens=counts.num_prompt_tokens,
            num_generation_tokens=counts.num_generation_tokens,
            num_finished=dict(counts.num_finished),
            num_preemptions=scheduler.num_preemptions,
            prefix_query_tokens=scheduler.prefix_query_tokens,
            prefix_hit_tokens=scheduler.prefix_hit_tokens,
            num_waiting=scheduler.num_waiting,
            num_running=scheduler.num_running,
            max_num_seqs=self.config.scheduler.max_num_seqs,
            num_kv_blocks=[pool.num_blocks for pool in pools],
            num_free_kv_blocks=[pool.num_free for pool in pools],
            num_cached_kv_blocks=[pool.num_kept for pool in pools],
            model_bytes=self._model_bytes,
            kv_bytes=self._kv_bytes,
            expert_layers=layers,
            expert_uses=[experts.layers[layer].uses.tolist() for layer in layers],
            resident=experts.resident(),
            experts=experts.report(),
        )

    def resize_expert_cache(self, slots_per_layer: int) -> None:
        """Hold another number of experts of each layer, from the next step on.

        Raises CapacityError for fewer than a token uses, or more than memory can hold; ConfigError
        where the engine was built to hold all experts.
        """
        self._refuse_if_closed()
        experts = self.runner.model.experts
        if isinstance(experts, RankExperts):
            experts = experts.inner
        if not isinstance(experts, OffloadedExperts):
            raise ConfigError(
                "all experts are held, so there is no cache to resize; build the engine with "
                "expert_cache_slots or expert_cache_gb"
            )
        shape = experts.cache.shape.with_slots(slots_per_layer)
        more = (shape.total_slots - experts.cache.shape.total_slots) * experts.slot_bytes
        if more > (available := self._available_bytes()):
            raise CapacityError(
                f"{slots_per_layer} expert slots a layer need {more} bytes more, but {available} "
                "are available; give fewer"
            )
        experts.resize(shape)
        self._model_bytes += more

    def place(self, placement: Placement) -> None:
        """Refuse, with ConfigError: one process holds all experts."""
        raise ConfigError("there is one process, which holds all experts: nothing can be placed")

    def recent_routing(self) -> tuple[Array, Array]:
        """Refuse, with ConfigError: nothing is kept of what tokens used."""
        raise ConfigError("the latest routing is kept on several ranks only")

    @property
    def is_moving(self) -> bool:
        """Whether experts are on their way to where another placement has them."""
        return False

    @property
    def epoch(self) -> int:
        """How often a layer of experts was placed anew."""
        return 0

    @property
    def pairs_computed(self) -> int:
        """How many (token, expert) pairs came to this rank's experts: 0, for nothing travels."""
        return 0

    def steps_by_dispatcher(self) -> dict[str, int]:
        """Return in how many steps tokens travelled by each dispatcher: {}, for they do not."""
        return {}

    def _available_bytes(self) -> int:
        device = self.runner.model.kernels.device
        return usable_bytes(device, self.config.runtime.gpu_memory_utilization)

    def close(self) -> None:
        """Stop what runs beside the steps, and write traces and profiles that were asked for.

        No step may follow. Raises TraceError for what cannot be written.
        """
        self._is_closed = True
        self.grammars.close()
        self.runner.model.experts.close()

    def _refuse_if_closed(self) -> None:
        if self._is_closed:
            raise ConfigError("the engine was closed; make another one")


def check_ids(request: Request, vocab_size: int) -> None:
    """Refuse token ids that the model does not have, wherever a request names them."""
    sampling = request.sampling
    named = (
        ("prompt", request.prompt_ids),
        ("allowed_token_ids", sampling.allowed_token_ids or ()),
        ("stop_token_ids", sampling.stop_token_ids),
        ("logit_bias", tuple(sampling.logit_bias or ())),
    )
    for name, ids in named:
        if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
            wrong = next(token for token in ids if not 0 <= token < vocab_size)
            raise RequestError(
                f"{name} holds token id {wrong}; the model has ids 0 to {vocab_size - 1}"
            )


def check_routed_experts(request: Request, config: EngineConfig, spec: ModelSpec) -> None:
    """Refuse a request for the experts of its tokens where there are none, or it is not enabled."""
    if not request.sampling.return_routed_experts:
        return
    if not any(layer.moe is not None for layer in spec.layers):
        raise RequestError("return_routed_experts: the model is dense, it routes nothing")
    if not config.experts.enable_return_routed_experts:
        raise RequestError(
            "return_routed_experts: this engine does not keep them; build it with "
            "enable_return_routed_experts"
        )
