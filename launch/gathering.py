"""Outputs of short steps on their way to a front end: gathered, so that one message has many.

A message for each step would wake the front end and every stream's task and socket hundreds of
times a second, to the engine's cost where both share cores, and nobody reads that fast.
"""

from __future__ import annotations

from collections.abc import Container, Sequence

from moe_serve.types import StepOutput

# where no gap is given: a chunk of a stream costs server and client about 0.1 ms together
MS_PER_REQUEST, MOST_MS = 1.5, 50.0
Key = tuple[str, int]


class Gathering:
    """What was not told yet. A request's first token, and the end of an output, wait for nothing.

    gap_s: how long other tokens may wait for company; None: longer, the more requests there are.
    """

    def __init__(self, gap_s: float | None) -> None:
        self._gap_s = gap_s
        self._told_s = float("-inf")
        self._outputs: dict[Key, StepOutput] = {}
        self._urgent: list[Key] = []

    def add(self, outputs: Sequence[StepOutput], new: Container[str]) -> None:
        """Take in what a step gave. new: ids of requests of which nothing was told.

        What is urgent of it must be taken before the next step's comes.
        """
        gathered = self._outputs
        for output in outputs:
            key = output.request_id, output.index
            before = gathered.get(key)
            gathered[key] = output if before is None else joined(before, output)
            is_last = output.finish_reason is not None
            if is_last or output.routed_experts is not None or output.request_id in new:
                self._urgent.append(key)

    @property
    def is_urgent(self) -> bool:
        """Whether there is anything that waits for nothing."""
        return bool(self._urgent)

    def take(self, now_s: float, num_requests: int) -> tuple[StepOutput, ...]:
        """Return what is to be told now, each output once."""
        if now_s - self._told_s >= self.gap_for(num_requests):
            return self.take_all(now_s)
        found = tuple(self._outputs.pop(key) for key in dict.fromkeys(self._urgent))
        self._urgent.clear()
        return found

    def left_s(self, now_s: float, num_requests: int) -> float | None:
        """Return how long what there is may still wait; None: there is nothing."""
        if not self._outputs:
            return None
        return max(0.0, self._told_s + self.gap_for(num_requests) - now_s)

    def gap_for(self, num_requests: int) -> float:
        """Return how many seconds tokens may wait, with so many requests under way."""
        if self._gap_s is not None:
            return self._gap_s
        return 1e-3 * min(MOST_MS, MS_PER_REQUEST * num_requests)

    def take_all(self, now_s: float) -> tuple[StepOutput, ...]:
        """Return all there is."""
        found = tuple(self._outputs.values())
        if found:
            self._told_s = now_s
        self.clear()
        return found

    def drop(self, request_id: str) -> None:
        """Forget what there is of a request that nobody waits for."""
        for key in [key for key in self._outputs if key[0] == request_id]:
            del self._outputs[key]
        self._urgent = [key for key in self._urgent if key[0] != request_id]

    def clear(self) -> None:
        """Forget all there is."""
        self._outputs.clear()
        self._urgent.clear()


def joined(before: StepOutput, after: StepOutput) -> StepOutput:
    """Return what two steps gave to one output as if one had."""
    assert before.routed_experts is None, "routed experts are told of at once"
    return StepOutput(
        before.request_id,
        before.index,
        before.token_ids + after.token_ids,
        before.logprobs + after.logprobs,
        after.finish_reason,
        after.prompt_logprobs if before.prompt_logprobs is None else before.prompt_logprobs,
        after.error,
        max(before.num_cached_tokens, after.num_cached_tokens),
        after.routed_experts,
        after.is_refused,
    )
