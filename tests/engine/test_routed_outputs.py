"""Of a step it is told which experts its tokens used: each once, and nothing of what has ended."""

from __future__ import annotations

import numpy as np

from moe_serve.engine.scheduler import Scheduler
from moe_serve.engine.sequence import SamplerOutput, ScheduledStep
from moe_serve.types import StepOutput
from tests.engine.test_scheduler import request, scheduler


def finish(engine: Scheduler, step: ScheduledStep) -> list[StepOutput]:
    """Finish a step whose tokens used the expert of their position."""
    output = SamplerOutput([7] * len(step.sampled))
    for index, (sequence, size) in enumerate(zip(step.sequences, step.query_lens, strict=True)):
        first = sequence.num_computed_tokens
        places = np.arange(first, first + size, dtype=np.int16)
        output.routed_experts[index] = places.reshape(-1, 1, 1)
    return engine.finish(step, output)


def told(outputs: list[StepOutput]) -> list[tuple[int, int, list[int]]]:
    """Return of each output its index, how many tokens it was given, and whose experts."""
    return [
        (
            output.index,
            len(output.token_ids),
            [] if output.routed_experts is None else output.routed_experts.array().ravel().tolist(),
        )
        for output in outputs
    ]


def asking(chunk: int, **options: int) -> Scheduler:
    engine = scheduler(chunk=chunk)
    engine.add(request("a", 5, return_routed_experts=True, **options))
    return engine


def scheduled(engine: Scheduler) -> ScheduledStep:
    step = engine.schedule()
    assert step is not None
    return step


def test_chunks_are_told_as_they_run_and_forks_tell_their_own() -> None:
    engine = asking(chunk=3, n=2)
    steps = [told(finish(engine, scheduled(engine))) for _ in range(3)]
    assert steps == [
        [(0, 0, [0, 1, 2])],
        [(0, 1, [3, 4]), (1, 1, [])],
        [(0, 1, [5]), (1, 1, [5])],
    ]


def test_a_step_that_is_retracted_tells_all_when_it_is_run_again() -> None:
    engine = asking(chunk=8)
    engine.retract(scheduled(engine))
    assert told(finish(engine, scheduled(engine))) == [(0, 1, [0, 1, 2, 3, 4])]


def test_nothing_is_told_of_what_was_aborted_while_the_step_ran() -> None:
    for chunk in (3, 8):
        engine = asking(chunk=chunk)
        step = scheduled(engine)
        engine.abort("a")
        assert finish(engine, step) == []
