"""The most that this machine could give: bytes over its bandwidth, operations over its speed.

A bound from below on the time of a job: prompts at the speed of one large matrix product, then one
step per output token that reads each weight it needs once. Attention and sampling count as free.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.peers.jobs import Job
from benchmarks.peers.shape import Shape

BYTES_PER_ELEMENT = 2
_READ_BYTES = 1 << 29  # many times any cache of a small machine
_GEMM_SIZE = 2048


@dataclass(frozen=True, slots=True)
class MachineSpeed:
    """What plain torch reaches: memory read, and bf16 matrix product."""

    read_bytes_per_s: float
    flop_per_s: float


def measure_speed(repeats: int = 5) -> MachineSpeed:
    """Time a sum over half a GiB and a 2048-cubed product; the best of `repeats`."""
    words = torch.ones(_READ_BYTES // 4, dtype=torch.int32)
    matrix = torch.randn(_GEMM_SIZE, _GEMM_SIZE, dtype=torch.bfloat16)
    read_s = _best(lambda: words.view(-1, 1 << 16).max(), repeats)
    gemm_s = _best(lambda: matrix @ matrix, repeats)
    return MachineSpeed(_READ_BYTES / read_s, 2 * _GEMM_SIZE**3 / gemm_s)


def _best(work: Callable[[], object], repeats: int) -> float:
    """Return the least seconds of `repeats` runs, after one that does not count."""
    best = float("inf")
    for index in range(repeats + 1):
        start = time.perf_counter()
        work()
        if index:
            best = min(best, time.perf_counter() - start)
    return best


def least_seconds(shape: Shape, job: Job, speed: MachineSpeed) -> float:
    """Return the time under which no bf16 engine on this machine can do the job.

    How many experts a step touches is taken as for random routing.
    """
    head = shape.hidden_size * shape.vocab_size
    active = shape.dense_elements + shape.num_layers * shape.top_k * shape.expert_elements
    prompt_flop = 2 * job.num_requests * (job.prompt_tokens * (active - head) + head)
    touched = 1 - (1 - shape.top_k / shape.num_experts) ** job.num_requests
    experts = shape.num_layers * shape.num_experts * touched * shape.expert_elements
    step_bytes = BYTES_PER_ELEMENT * (shape.dense_elements + experts)
    decode_flop = 2 * job.num_requests * active
    step_s = max(step_bytes / speed.read_bytes_per_s, decode_flop / speed.flop_per_s)
    return prompt_flop / speed.flop_per_s + (job.output_tokens - 1) * step_s
