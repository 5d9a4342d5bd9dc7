"""What the kernels are given: the baseline model's shapes, and how many rows of each."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.peers.shape import SHAPES, Shape


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """Sizes of one run.

    cold_bytes: what inputs that must come from memory rotate through: several times any cache.
    matrix_size: of the square product that shows the machine's rate. max_memory_rows,
    max_memory_tokens: up to so many rows of a linear layer, or tokens of a MoE layer, reading the
    weights is the limit; above, multiplying is. decode_seqs run at each of decode_contexts.
    """

    shape: Shape = SHAPES["baseline"]
    cold_bytes: int = 200_000_000
    matrix_size: int = 2048
    linear_rows: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024)
    max_memory_rows: int = 16
    moe_tokens: tuple[int, ...] = (1, 2, 4, 8, 16, 64, 256, 2048)
    max_memory_tokens: int = 64
    row_counts: tuple[int, ...] = (1, 16, 512, 2048)
    decode_contexts: tuple[int, ...] = (128, 1024, 4096, 16384)
    decode_seqs: tuple[int, ...] = (1, 16, 64)
    prompts: tuple[int, ...] = (128, 512, 2048)
    sampled_rows: tuple[int, ...] = (1, 16, 64)
    step_requests: tuple[int, ...] = (1, 16, 64)
    step_prompt: int = 128
    max_steps: int = 240


WORKLOADS = {
    "baseline": Workload(),
    # runs everything in seconds; its figures say nothing
    "tiny": Workload(
        shape=SHAPES["tiny"],
        cold_bytes=1 << 16,
        matrix_size=64,
        linear_rows=(1, 32),
        moe_tokens=(1, 128),
        row_counts=(1, 5),
        decode_contexts=(20, 70),
        decode_seqs=(1, 3),
        prompts=(33,),
        sampled_rows=(1, 3),
        step_requests=(1, 3),
        step_prompt=20,
        max_steps=24,
    ),
}
