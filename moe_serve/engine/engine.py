"""The engine: requests in, tokens out, one step at a time. It knows no text and no network."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

from moe_serve.config import EngineConfig
from moe_serve.engine.grammar import Grammars
from moe_serve.engine.memory import available_bytes
from moe_serve.engine.model_runner import ModelRunner
from moe_serve.engine.scheduler import Scheduler
from moe_serve.engine.sequence import ScheduledStep
from moe_serve.errors import CapacityError, CommError, ConfigError, MoeServeError, RequestError
from moe_serve.experts.offload import OffloadedExperts
from moe_serve.experts.rank_experts import RankExperts
from moe_serve.models.spec import ModelSpec
from moe_serve.types import Request, StepOutput

logger = logging.getLogger(__name__)

# how long a step waits for a grammar when there is nothing else to do
GRAMMAR_WAIT_S = 0.005


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineStats:
    """Counts since the engine was built; sizes in bytes. experts: {} where all are held.

    ranks: of each, where there are several; the other counts are then those of all. The first has
    what came of looking for better placements.
    """

    num_preemptions: int
    prefix_hit_tokens: int
    num_waiting: int
    num_running: int
    model_bytes: int
    kv_bytes: int
    experts: dict[str, Any] = field(default_factory=dict)
    ranks: list[dict[str, Any]] = field(default_factory=list)


class Engine:
    """Runs requests of one model, batched, each as if it ran alone.

    Made by `engine.build.build_engine`. Not for use by several threads at once.
    """

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
        has_grammar = request.sampling.structured_outputs is not None
        if has_grammar:
            self.grammars.check()
        self.scheduler.add(request, is_held=has_grammar)
        if has_grammar:
            self.grammars.begin(request)

    def step(self) -> list[StepOutput]:
        """Give every scheduled sequence its next token; [] when there is nothing to do.

        Where there is nothing but grammars to wait for, it waits GRAMMAR_WAIT_S at most.
        A step that cannot be run (out of memory, say) ends the outputs that took part in it with
        an error, and all others go on. An interrupt loses nothing: its step is run again.
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
        except (RuntimeError, MemoryError, ArithmeticError, MoeServeError) as error:
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
        return EngineStats(
            num_preemptions=self.scheduler.num_preemptions,
            prefix_hit_tokens=self.scheduler.prefix_hit_tokens,
            num_waiting=self.scheduler.num_waiting,
            num_running=self.scheduler.num_running,
            model_bytes=self._model_bytes,
            kv_bytes=self._kv_bytes,
            experts=self.runner.model.experts.report(),
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

    def _available_bytes(self) -> int:
        return available_bytes()

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
