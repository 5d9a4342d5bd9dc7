"""An engine without a model: it says the prompt's tokens again, or what a test gives it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from moe_serve.config import EngineConfig
from moe_serve.errors import CapacityError
from moe_serve.layers.rope import RopeSpec
from moe_serve.models.spec import AttentionSpec, LayerSpec, ModelSpec
from moe_serve.types import FinishReason, Request, StepOutput, TokenLogprobs

Reply = Callable[[Request, int], Sequence[int]]


def echo(request: Request, index: int) -> Sequence[int]:
    """Say the prompt from its token `index` on, and over again."""
    ids = request.prompt_ids
    limit = request.sampling.max_tokens or 64
    return [ids[(index + place) % len(ids)] for place in range(limit)]


@dataclass(frozen=True)
class FakeStats:
    num_preemptions: int = 0
    prefix_hit_tokens: int = 0
    model_bytes: int = 2**20
    kv_bytes: int = 2**21
    experts: dict[str, object] = field(default_factory=dict)
    ranks: tuple[dict[str, object], ...] = ()


@dataclass
class _Output:
    request: Request
    index: int
    reply: Sequence[int]
    num_done: int = 0


class FakeEngine:
    """Gives every running output one token of its reply a step.

    An end token ends it with "stop", the end of its reply with "length"; a prompt that begins with
    `error_id` with "error". A request of more than `capacity` prompt tokens is refused.
    """

    numerics_id = "fake"

    def __init__(
        self,
        config: EngineConfig | None = None,
        *,
        vocab_size: int = 6144,
        max_model_len: int = 256,
        reply: Reply = echo,
        error_id: int | None = None,
        capacity: int = 10**9,
        step_s: float = 0.0,
    ) -> None:
        self.config = config or EngineConfig()
        self.max_model_len = max_model_len
        self.spec = ModelSpec(
            model_type="fake",
            vocab_size=vocab_size,
            hidden_size=1,
            max_position_embeddings=max_model_len,
            norm_eps=1e-6,
            attention=AttentionSpec(
                num_heads=1, num_kv_heads=1, head_dim=1, rope=RopeSpec(theta=1e4)
            ),
            layers=(LayerSpec(),),
            is_embedding_tied=True,
            weights=(),
        )
        self.added: list[Request] = []
        self.aborted: list[str] = []
        self.stopped: list[tuple[str, int]] = []
        self.most_at_once = 0
        self.is_closed = False
        self._reply = reply
        self._error_id = error_id
        self._capacity = capacity
        self._step_s = step_s
        self._outputs: list[_Output] = []

    @property
    def has_unfinished(self) -> bool:
        return bool(self._outputs)

    def add(self, request: Request) -> None:
        if len(request.prompt_ids) > self._capacity:
            raise CapacityError(f"{len(request.prompt_ids)} tokens; at most {self._capacity}")
        assert not self.is_closed
        self.added.append(request)
        for index in range(request.sampling.n):
            self._outputs.append(_Output(request, index, self._reply(request, index)))
        self.most_at_once = max(self.most_at_once, len(self._outputs))

    def step(self) -> list[StepOutput]:
        time.sleep(self._step_s)
        running = self._outputs[: self.config.scheduler.max_num_seqs]
        results = [self._advance(output) for output in running]
        ended = {id(o) for o, result in zip(running, results, strict=True) if result.finish_reason}
        self._outputs = [output for output in self._outputs if id(output) not in ended]
        return results

    def _advance(self, output: _Output) -> StepOutput:
        request = output.request
        if request.prompt_ids[0] == self._error_id:
            error = "a NaN in its logits"
            return StepOutput(
                request.request_id, output.index, (), finish_reason="error", error=error
            )
        token = output.reply[output.num_done]
        output.num_done += 1
        reason: FinishReason | None = None
        if token in request.eos_token_ids and not request.sampling.ignore_eos:
            reason = "stop"
        elif output.num_done == len(output.reply):
            reason = "length"
        wants = request.sampling.logprobs is not None
        logprobs = (TokenLogprobs(token, -0.5, 1, ((token, -0.5),)),) if wants else ()
        return StepOutput(request.request_id, output.index, (token,), logprobs, reason)

    def abort(self, request_id: str) -> bool:
        self.aborted.append(request_id)
        before = len(self._outputs)
        self._outputs = [o for o in self._outputs if o.request.request_id != request_id]
        return len(self._outputs) < before

    def stop(self, request_id: str, index: int) -> bool:
        self.stopped.append((request_id, index))
        before = len(self._outputs)
        self._outputs = [
            o for o in self._outputs if (o.request.request_id, o.index) != (request_id, index)
        ]
        return len(self._outputs) < before

    def close(self) -> None:
        self.is_closed = True

    def stats(self) -> FakeStats:
        return FakeStats()
