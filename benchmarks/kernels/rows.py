"""Cases of the kernels that go over rows once: bytes moved, against those that a copy moves.

Inputs rotate through memory from some hundred rows on; below, a call is what is measured. In a
model such rows were just written and are often still in a cache: a ratio says what memory would
allow, not what the engine waits for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels.limits import Limits
from benchmarks.kernels.products import router_scores
from benchmarks.kernels.timing import Case, Work, num_sets
from benchmarks.kernels.workload import Workload
from moe_serve.kernels.rope.base import Heads
from moe_serve.kernels.suite import Kernels
from moe_serve.layers.rope import RopeSpec, rope_table
from moe_serve.types import RouterRecipe

DTYPE = torch.bfloat16
EPS = 1e-6

Cases = Callable[[Kernels, Workload, Limits], Iterator[Case]]
# given a number of rows: the kernel's work, and torch's where it has the like in one or two calls
Make = Callable[[int], tuple[Work, Work | None]]


def _cases(table: str, name: str, make: Make, workload: Workload, limits: Limits) -> Iterator[Case]:
    for num_rows in workload.row_counts:
        work, by_torch = make(num_rows)
        yield Case(
            table=table,
            name=f"{name}, {num_rows} rows",
            num_rows=num_rows,
            work=work,
            unit="GB/s",
            limit=limits.copy,
            limit_name="copy",
            torch=by_torch,
        )


def _sets(count: int, *shape: int, dtype: torch.dtype = DTYPE) -> list[Tensor]:
    """Return `count` tensors of the same random values."""
    one = torch.randn(shape).to(dtype)
    return list(one.expand(count, *shape).clone())


def rms_norm(kernels: Kernels, workload: Workload, limits: Limits) -> Iterator[Case]:
    """Yield the norm with a residual: two inputs, two results."""
    size = workload.shape.hidden_size
    weight = torch.ones(size, dtype=DTYPE)

    def make(num_rows: int) -> tuple[Work, Work]:
        array_bytes = num_rows * size * DTYPE.itemsize
        count = num_sets(2 * array_bytes, workload.cold_bytes)
        rows, residual = _sets(count, num_rows, size), _sets(count, num_rows, size)

        def run(turn: int) -> object:
            at = turn % count
            return kernels.add_rms_norm(rows[at], residual[at], weight, EPS)

        def by_torch(turn: int) -> object:
            at = turn % count
            return F.rms_norm(rows[at] + residual[at], (size,), weight, EPS)

        return Work(run, 4 * array_bytes), Work(by_torch, 4 * array_bytes)

    return _cases("rms_norm", "with residual", make, workload, limits)


def rope(kernels: Kernels, workload: Workload, limits: Limits) -> Iterator[Case]:
    """Yield the norm of each head, rotation and cache write: reads qkv, writes as much."""
    shape = workload.shape
    cos, sin = rope_table(RopeSpec(theta=1e6), shape.head_dim, shape.max_position_embeddings)
    norm = torch.ones(shape.head_dim, dtype=DTYPE)
    heads = Heads(
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        cos=cos,
        sin=sin,
        query_norm=norm,
        key_norm=norm,
        norm_eps=EPS,
    )

    def make(num_rows: int) -> tuple[Work, None]:
        # values are read and written, queries too; so are keys
        num_bytes = 2 * num_rows * heads.qkv_width * DTYPE.itemsize
        count = num_sets(num_bytes, workload.cold_bytes)
        qkv = _sets(count, num_rows, heads.qkv_width)
        cache_shape = (heads.num_kv_heads, count * num_rows, heads.head_dim)
        keys, values = (torch.zeros(cache_shape, dtype=DTYPE) for _ in range(2))
        positions = torch.arange(num_rows) % shape.max_position_embeddings
        slots = torch.randperm(count * num_rows).view(count, num_rows).unbind()

        def run(turn: int) -> object:
            at = turn % count
            return kernels.rope_write_kv(qkv[at], heads, positions, slots[at], keys, values)

        return Work(run, num_bytes), None

    return _cases("rope", "with KV write", make, workload, limits)


def router(kernels: Kernels, workload: Workload, limits: Limits) -> Iterator[Case]:
    """Yield the product that scores experts, then the choice of the best by itself."""
    shape = workload.shape
    recipe = RouterRecipe(num_experts=shape.num_experts, top_k=shape.top_k, renormalise=True)

    def make(num_rows: int) -> tuple[Work, Work]:
        # logits float32; expert ids int64 and weights float32
        num_bytes = num_rows * (4 * shape.num_experts + 12 * shape.top_k)
        count = num_sets(num_bytes, workload.cold_bytes)
        logits = _sets(count, num_rows, shape.num_experts, dtype=torch.float32)

        def by_torch(turn: int) -> object:
            return torch.softmax(logits[turn % count], -1).topk(shape.top_k)

        run = Work(lambda turn: kernels.route(logits[turn % count], recipe), num_bytes)
        return run, Work(by_torch, num_bytes)

    yield from router_scores(kernels, workload, limits)
    yield from _cases("router", "top-k", make, workload, limits)


def silu(kernels: Kernels, workload: Workload, limits: Limits) -> Iterator[Case]:
    """Yield the activation of a dense MLP as wide as an expert."""
    size = workload.shape.moe_intermediate_size

    def make(num_rows: int) -> tuple[Work, Work]:
        num_bytes = 3 * num_rows * size * DTYPE.itemsize
        count = num_sets(num_bytes, workload.cold_bytes)
        gate_up = _sets(count, num_rows, 2 * size)

        def by_torch(turn: int) -> object:
            gate, up = gate_up[turn % count].chunk(2, dim=-1)
            return F.silu(gate) * up

        run = Work(lambda turn: kernels.silu_and_mul(gate_up[turn % count]), num_bytes)
        return run, Work(by_torch, num_bytes)

    return _cases("silu", "and multiply", make, workload, limits)


def combine(kernels: Kernels, workload: Workload, limits: Limits) -> Iterator[Case]:
    """Yield the weighted sum of every token's experts: top_k rows in, one out."""
    size, top_k = workload.shape.hidden_size, workload.shape.top_k

    def make(num_rows: int) -> tuple[Work, None]:
        num_bytes = num_rows * ((top_k + 1) * size * DTYPE.itemsize + 12 * top_k)
        count = num_sets(num_bytes, workload.cold_bytes)
        rows = _sets(count, num_rows * top_k, size)
        pair_of_choice = torch.randperm(num_rows * top_k).view(num_rows, top_k)
        weights = torch.rand(num_rows, top_k)

        def run(turn: int) -> object:
            return kernels.combine(rows[turn % count], pair_of_choice, weights)

        return Work(run, num_bytes), None

    return _cases("combine", f"of {top_k}", make, workload, limits)
