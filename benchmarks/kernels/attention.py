"""Cases of paged attention: decodes against read bandwidth, prompts against oneDNN's rate."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels.limits import Limits, square_product
from benchmarks.kernels.timing import Case, Work, num_sets
from benchmarks.kernels.workload import Workload
from benchmarks.peers.shape import Shape
from moe_serve.kernels.suite import Kernels

DTYPE = torch.bfloat16
BLOCK_SIZE = 16


def kv_bytes(shape: Shape, num_tokens: int) -> int:
    """Return the bytes of one layer's keys and values."""
    return 2 * num_tokens * shape.num_kv_heads * shape.head_dim * DTYPE.itemsize


def causal_flop(shape: Shape, num_tokens: int) -> float:
    """Return the operations of a whole prompt: scores and sums of what each query sees."""
    pairs = num_tokens * (num_tokens + 1) / 2
    return 4.0 * shape.num_heads * shape.head_dim * pairs


class PagedCache:
    """One layer's cache of random keys and values, blocks handed out in a random order."""

    def __init__(self, shape: Shape, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        block = torch.randn(shape.num_kv_heads, 1, BLOCK_SIZE, shape.head_dim).to(DTYPE)
        shown = (-1, num_blocks + 1, -1, -1)
        self.key, self.value = (
            block.expand(shown).clone().view(shape.num_kv_heads, -1, shape.head_dim)
            for _ in range(2)
        )
        self._order = torch.randperm(num_blocks).int() + 1  # 0 is the null block

    def tables(self, num_seqs: int, num_tokens: int, most: int) -> list[Tensor]:
        """Return block tables, int32 [num_seqs, num_blocks], that share no block with each other.

        As many as the cache holds, at most `most`.
        """
        blocks = math.ceil(num_tokens / BLOCK_SIZE)
        count = min(most, self.num_blocks // (num_seqs * blocks))
        used = self._order[: count * num_seqs * blocks]
        return list(used.view(count, num_seqs, blocks))


def attention(kernels: Kernels, workload: Workload, limits: Limits) -> Iterator[Case]:
    """Yield decodes of several sequences of one length, then whole prompts of one sequence."""
    shape = workload.shape
    blocks = math.ceil(max(workload.decode_contexts) / BLOCK_SIZE) * max(workload.decode_seqs)
    cache = PagedCache(shape, max(blocks, math.ceil(max(workload.prompts) / BLOCK_SIZE)))
    scale = shape.head_dim**-0.5
    for num_tokens in workload.decode_contexts:
        for num_seqs in workload.decode_seqs:
            yield _decode(kernels, workload, limits, cache, num_seqs, num_tokens, scale)
    matrix = square_product(workload.matrix_size, DTYPE)
    for num_tokens in workload.prompts:
        yield _prompt(kernels, shape, matrix, cache, num_tokens, scale)


def _decode(
    kernels: Kernels,
    workload: Workload,
    limits: Limits,
    cache: PagedCache,
    num_seqs: int,
    num_tokens: int,
    scale: float,
) -> Case:
    """Return one query of each sequence; GB/s: of the keys and values."""
    shape = workload.shape
    num_bytes = kv_bytes(shape, num_seqs * num_tokens)
    tables = cache.tables(num_seqs, num_tokens, num_sets(num_bytes, workload.cold_bytes))
    plans = [
        kernels.plan_attention((1,) * num_seqs, (num_tokens,) * num_seqs, table, BLOCK_SIZE, None)
        for table in tables
    ]
    query = torch.randn(num_seqs, shape.num_heads, shape.head_dim).to(DTYPE)

    def run(turn: int) -> object:
        plan = plans[turn % len(plans)]
        return kernels.paged_attention(query, cache.key, cache.value, plan, scale)

    return Case(
        table="attention",
        name=f"decode, {num_seqs} x context {num_tokens}",
        num_rows=num_seqs,
        work=Work(run, num_bytes, 4.0 * shape.num_heads * shape.head_dim * num_seqs * num_tokens),
        unit="GB/s",
        limit=limits.read,
        limit_name="read",
    )


def _prompt(
    kernels: Kernels, shape: Shape, matrix: Work, cache: PagedCache, num_tokens: int, scale: float
) -> Case:
    """Return a prompt computed whole; torch: scaled_dot_product_attention, not paged."""
    table = cache.tables(1, num_tokens, 1)[0]
    plan = kernels.plan_attention((num_tokens,), (num_tokens,), table, BLOCK_SIZE, None)
    query = torch.randn(num_tokens, shape.num_heads, shape.head_dim).to(DTYPE)
    flat_query = query.transpose(0, 1)[None].contiguous()  # [1, num_heads, num_tokens, head_dim]
    key, value = (
        torch.randn(1, shape.num_kv_heads, num_tokens, shape.head_dim).to(DTYPE) for _ in range(2)
    )

    def run(_: int) -> object:
        return kernels.paged_attention(query, cache.key, cache.value, plan, scale)

    def by_torch(_: int) -> object:
        return F.scaled_dot_product_attention(
            flat_query, key, value, is_causal=True, scale=scale, enable_gqa=True
        )

    num_bytes, flop = kv_bytes(shape, num_tokens), causal_flop(shape, num_tokens)
    return Case(
        table="attention",
        name=f"prompt of {num_tokens}",
        num_rows=num_tokens,
        work=Work(run, num_bytes, flop),
        unit="GFLOP/s",
        limit=matrix,
        limit_name="torch.mm, square",
        torch=Work(by_torch, num_bytes, flop),
    )
