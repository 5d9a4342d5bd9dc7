"""Steps of nobody's tokens, for what is compiled or captured when it runs for the first time."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from moe_serve.engine.sequence import Sequence
from moe_serve.types import ForwardBatch, Request, SamplingParams

_FACTOR = 4
# what tiles are chosen for, between the powers of it, where numerics are fast
_BETWEEN = (24, 128)
# what a step's sampling may be made of: a filter that nobody asks for is another kernel
_KINDS = (
    SamplingParams(temperature=0.0, logprobs=2),
    SamplingParams(temperature=0.8, frequency_penalty=0.5, logit_bias={0: 1.0}),
    *(
        SamplingParams(temperature=0.8, top_k=top_k, top_p=top_p, min_p=min_p)
        for top_k in (0, 20)
        for top_p in (1.0, 0.9)
        for min_p in (0.0, 0.05)
    ),
)


def compiles_late(device: torch.device) -> bool:
    """Whether the kernels of a device are compiled when they run for the first time."""
    return device.type == "cuda"


def sizes_up_to(most: int) -> list[int]:
    """Return 1, 4, 16 and so on, `most`, and what else kernels are made for, rising."""
    found = {size for size in _BETWEEN if size < most} | {most}
    size = 1
    while size < most:
        found.add(size)
        size *= _FACTOR
    return sorted(found)


def nobodys_prompts(
    num_tokens: int, context: int, block_size: int, num_groups: int
) -> ForwardBatch:
    """Return prompts of `context` tokens, the last one shorter, that leave nothing in the cache.

    Their slots are negative, which is not written, and their blocks the null block.
    """
    lens = [context] * (num_tokens // context)
    if num_tokens % context:
        lens.append(num_tokens % context)
    nowhere = torch.full((num_tokens,), -1, dtype=torch.int64)
    table = torch.zeros(len(lens), -(-context // block_size), dtype=torch.int32)
    return ForwardBatch(
        token_ids=torch.zeros(num_tokens, dtype=torch.int64),
        positions=torch.arange(num_tokens) % context,
        sequence_ids=nowhere,
        query_lens=tuple(lens),
        context_lens=tuple(lens),
        prompt_lens=tuple(lens),
        slot_mapping=(nowhere,) * num_groups,
        block_tables=(table,) * num_groups,
        block_size=block_size,
        sample_rows=nowhere[:0],
    )


def nobodys_sequences(count: int) -> Iterator[list[Sequence]]:
    """Yield so many sequences that sample in the same way, for all ways."""
    for sampling in _KINDS:
        request = Request(request_id="warm-up", prompt_ids=(0,), sampling=sampling, seed=0)
        yield [Sequence(request) for _ in range(count)]
