"""A step in two, where it does not fit into memory as one: the same tokens, as rows are alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from moe_serve.engine.sequence import SamplerOutput, ScheduledStep
from moe_serve.types import TokenLogprobs


def halves(step: ScheduledStep) -> tuple[ScheduledStep, ScheduledStep]:
    """Cut a step of two tokens or more into two that run one after the other.

    Between sequences, near the middle of the tokens; one sequence alone between its tokens. Blocks
    that are to be copied are not in them: that is done once.
    """
    assert step.num_tokens > 1, "one token is not cut"
    copies: tuple[list[tuple[int, int]], ...] = tuple([] for _ in step.block_copies)
    if len(step.sequences) == 1:
        count = step.query_lens[0] // 2
        first = replace(
            step, query_lens=[count], sample_sources=[], sampled=[], block_copies=copies
        )
        last = replace(
            step,
            query_lens=[step.query_lens[0] - count],
            block_copies=copies,
            num_skipped=step.num_skipped + count,
        )
        return first, last
    ends = np.cumsum(step.query_lens)
    at = 1 + int(np.abs(ends[:-1] - ends[-1] / 2).argmin())
    num_sampled = sum(source < at for source in step.sample_sources)
    first = replace(
        step,
        sequences=step.sequences[:at],
        query_lens=step.query_lens[:at],
        sample_sources=step.sample_sources[:num_sampled],
        sampled=step.sampled[:num_sampled],
        block_copies=copies,
    )
    last = replace(
        step,
        sequences=step.sequences[at:],
        query_lens=step.query_lens[at:],
        sample_sources=[source - at for source in step.sample_sources[num_sampled:]],
        sampled=step.sampled[num_sampled:],
        block_copies=copies,
    )
    return first, last


def joined(first: SamplerOutput, last: SamplerOutput, num_before: int) -> SamplerOutput:
    """Return what a step gave from what its `halves` did.

    num_before: of the step's sequences, those before the last half's first: 0 where both have one.
    """
    num_sampled = len(first.token_ids)
    logprobs: list[TokenLogprobs | None] | None = None
    if first.logprobs is not None or last.logprobs is not None:
        logprobs = [*_entries(first), *_entries(last)]
    prompt_logprobs = dict(first.prompt_logprobs)
    for index, entries in last.prompt_logprobs.items():
        prompt_logprobs[index + num_before] = prompt_logprobs.get(index + num_before, []) + entries
    routed = dict(first.routed_experts)
    for index, rows in last.routed_experts.items():
        before = routed.get(index + num_before)
        routed[index + num_before] = rows if before is None else np.concatenate([before, rows])
    later = {index + num_before: error for index, error in last.sequence_errors.items()}
    return SamplerOutput(
        first.token_ids + last.token_ids,
        logprobs,
        first.errors | {row + num_sampled: error for row, error in last.errors.items()},
        first.refused | {row + num_sampled for row in last.refused},
        later | first.sequence_errors,
        prompt_logprobs,
        routed,
    )


def _entries(output: SamplerOutput) -> list[TokenLogprobs | None]:
    return [None] * len(output.token_ids) if output.logprobs is None else output.logprobs
