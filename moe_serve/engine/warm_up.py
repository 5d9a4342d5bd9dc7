"""Steps of nobody's tokens, for what is compiled or captured when it runs for the first time."""

from __future__ import annotations

import torch

from moe_serve.engine.sequence import Sequence
from moe_serve.types import ForwardBatch, Request, SamplingParams

_FACTOR = 4
# what a step's sampling may be made of
_KINDS = (
    SamplingParams(temperature=0.0, logprobs=2),
    SamplingParams(temperature=0.8),
    SamplingParams(temperature=0.8, top_k=20, top_p=0.9, min_p=0.05),
    SamplingParams(temperature=0.8, frequency_penalty=0.5, logit_bias={0: 1.0}),
)


def sizes_up_to(most: int) -> list[int]:
    """Return 1, 4, 16 and so on, and `most`."""
    found = [1]
    while found[-1] * _FACTOR < most:
        found.append(found[-1] * _FACTOR)
    return found if found[-1] == most else [*found, most]


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


def nobodys_sequences(count: int) -> list[Sequence]:
    """Return sequences that sample in all ways, in turns."""
    return [
        Sequence(
            Request(
                request_id="warm-up",
                prompt_ids=(0,),
                sampling=_KINDS[index % len(_KINDS)],
                seed=index,
            )
        )
        for index in range(count)
    ]
