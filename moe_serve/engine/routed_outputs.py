"""From a step's routing to what is told of it: each token's experts once, in the step it ran in.

So nothing is kept, and what a step tells is bounded by the tokens it may have.
"""

from __future__ import annotations

import msgspec

from moe_serve.engine.routing_log import RoutingLog
from moe_serve.engine.sequence import SamplerOutput, ScheduledStep
from moe_serve.types import RoutedExperts, StepOutput

Key = tuple[str, int]


def routed_of(step: ScheduledStep, output: SamplerOutput) -> dict[Key, RoutedExperts]:
    """Return what is new of the experts of a step's tokens, by request and index.

    Before its sequences are told that they were run. Output 0 tells those of the prompt for all:
    its forks begin behind them.
    """
    routed: dict[Key, RoutedExperts] = {}
    for index, ids in output.routed_experts.items():
        sequence = step.sequences[index]
        if sequence.routing is not None and sequence.row >= 0:
            new = sequence.routing.new(sequence.num_computed_tokens, ids)
            if new is not None:
                routed[sequence.request.request_id, sequence.index] = new
    for source, sequence in zip(step.sample_sources, step.sampled, strict=True):
        parent = step.sequences[source]
        if sequence is not parent and parent.routing is not None:
            sequence.routing = RoutingLog(parent.routing.num_tokens)
    return routed


def with_routed(outputs: list[StepOutput], routed: dict[Key, RoutedExperts]) -> list[StepOutput]:
    """Return the outputs of a step with what is told of its tokens, and at their end those of
    sequences whose prompt is not computed yet: without a token."""
    left = dict(routed)
    told = [
        output
        if (new := left.pop((output.request_id, output.index), None)) is None
        else msgspec.structs.replace(output, routed_experts=new)
        for output in outputs
    ]
    told += [
        StepOutput(request_id, index, (), routed_experts=new)
        for (request_id, index), new in left.items()
    ]
    return told
