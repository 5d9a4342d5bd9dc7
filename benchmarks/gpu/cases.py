"""Every kernel at the shapes of a model: its work, and what that must move and compute.

Inputs are random, outputs are new each time. Of a kernel that multiplies with weights the weights
are read once; of one that goes over rows each row is read and written once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.clock import Work, always
from benchmarks.peers.shape import Shape
from moe_serve.kernels.moe.base import HEADER_BYTES, ExpertTable, plain_weights
from moe_serve.kernels.rope.base import Heads
from moe_serve.kernels.suite import Kernels
from moe_serve.layers.rope import RopeSpec, rope_table
from moe_serve.types import RouterRecipe

DTYPE = torch.bfloat16
BLOCK_SIZE = 16
_ALIGNMENT = 4096
_EPS = 1e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One line. writes: as much is written as is read, so that a copy is the limit, not reading.

    num_bytes, flop: of a call. torch: the same by torch, where it has it in one call.
    """

    kernel: str
    name: str
    num_rows: int
    work: Work
    num_bytes: float
    flop: float = 0.0
    writes: bool = False
    torch: Work | None = None


@dataclass(frozen=True, slots=True)
class Bench:
    """A model's shape, the kernels, and where their tensors are."""

    shape: Shape
    kernels: Kernels

    @property
    def device(self) -> torch.device:
        return self.kernels.device

    def random(self, *sizes: int, dtype: torch.dtype = DTYPE) -> Tensor:
        """Return normal numbers."""
        return torch.randn(sizes, device=self.device).to(dtype)

    def recipe(self) -> RouterRecipe:
        """Return how the model's routers choose."""
        return RouterRecipe(
            num_experts=self.shape.num_experts, top_k=self.shape.top_k, renormalise=True
        )

    def some_experts(self, num_tokens: int) -> Tensor:
        """Return top_k different experts for each token, at random."""
        chance = torch.rand(num_tokens, self.shape.num_experts, device=self.device)
        return chance.topk(self.shape.top_k, dim=-1).indices


def linear(
    bench: Bench,
    row_counts: tuple[int, ...],
    names: tuple[str, ...] = ("qkv", "output", "head", "router"),
) -> Iterator[Case]:
    """Yield linear layers of the model."""
    shape = bench.shape
    heads = shape.num_heads + 2 * shape.num_kv_heads
    sizes = {
        "qkv": (heads * shape.head_dim, shape.hidden_size),
        "output": (shape.hidden_size, shape.num_heads * shape.head_dim),
        "head": (shape.vocab_size, shape.hidden_size),
        "router": (shape.num_experts, shape.hidden_size),
    }
    for name in names:
        size_out, size_in = sizes[name]
        dtype = torch.float32 if name == "router" else DTYPE
        weight = (torch.randn(size_out, size_in, device=bench.device) * size_in**-0.5).to(dtype)
        packed = bench.kernels.pack(weight)
        for num_rows in row_counts:
            rows = bench.random(num_rows, size_in)
            result_bytes = num_rows * size_out * dtype.itemsize
            yield Case(
                kernel="linear",
                name=f"{name} {size_out}x{size_in}",
                num_rows=num_rows,
                work=always(bench.kernels.linear, rows, packed),
                num_bytes=weight.nbytes + rows.nbytes + result_bytes,
                flop=2.0 * num_rows * weight.numel(),
                torch=always(F.linear, rows.to(dtype), weight),
            )


def expert_table(bench: Bench) -> ExpertTable:
    """Return one layer's experts, all resident."""
    shape, kernels = bench.shape, bench.kernels
    sizes = (shape.hidden_size, shape.moe_intermediate_size)
    record_bytes = -(-kernels.record_bytes(*sizes, DTYPE) // _ALIGNMENT) * _ALIGNMENT
    assert record_bytes > HEADER_BYTES, record_bytes
    records = torch.zeros(shape.num_experts, record_bytes, dtype=torch.uint8, device=bench.device)
    for weights in plain_weights(records, *sizes, DTYPE):
        weights.copy_(
            torch.randn(weights.shape[1:], device=bench.device) * weights.shape[2] ** -0.5
        )
    kernels.pack_records_(records, *sizes, DTYPE)
    return ExpertTable(
        records,
        torch.arange(shape.num_experts, dtype=torch.int32, device=bench.device),
        torch.zeros(shape.num_experts, dtype=torch.int64, device=bench.device),
        *sizes,
        DTYPE,
    )


def moe(bench: Bench, row_counts: tuple[int, ...]) -> Iterator[Case]:
    """Yield a layer's experts, for tokens that chose at random: the grouped products."""
    shape, kernels = bench.shape, bench.kernels
    table = expert_table(bench)
    for num_tokens in row_counts:
        ids = bench.some_experts(num_tokens)
        counts, row_of_pair, _ = kernels.sort_pairs(ids, shape.num_experts)
        hidden = bench.random(num_tokens, shape.hidden_size)
        touched = int(counts.count_nonzero())
        num_pairs = num_tokens * shape.top_k
        inner_bytes = 2 * num_pairs * shape.moe_intermediate_size * DTYPE.itemsize
        row_bytes = num_pairs * shape.hidden_size * DTYPE.itemsize
        yield Case(
            kernel="moe",
            name=f"experts, {touched} of {shape.num_experts} touched",
            num_rows=num_tokens,
            work=always(kernels.moe, hidden, row_of_pair, counts, table),
            num_bytes=touched * shape.expert_elements * DTYPE.itemsize
            + hidden.nbytes + inner_bytes + row_bytes,
            flop=2.0 * num_pairs * shape.expert_elements,
        )  # fmt: skip


def attention(bench: Bench, batches: tuple[tuple[int, int, int], ...]) -> Iterator[Case]:
    """Yield paged attention; batches: how many sequences, of how many new tokens, of what context.

    New tokens of a sequence are the last of its context.
    """
    shape, kernels = bench.shape, bench.kernels
    scale = shape.head_dim**-0.5
    for num_seqs, num_new, context in batches:
        blocks = -(-context // BLOCK_SIZE)
        num_slots = (num_seqs * blocks + 1) * BLOCK_SIZE
        caches = [bench.random(shape.num_kv_heads, num_slots, shape.head_dim) for _ in range(2)]
        order = torch.randperm(num_seqs * blocks, device=bench.device).int() + 1
        plan = kernels.plan_attention(
            (num_new,) * num_seqs, (context,) * num_seqs, order.view(num_seqs, blocks),
            BLOCK_SIZE, None,
        )  # fmt: skip
        query = bench.random(num_seqs * num_new, shape.num_heads, shape.head_dim)
        pairs = num_seqs * sum(range(context - num_new + 1, context + 1))
        kv_elements = 2 * num_seqs * context * shape.num_kv_heads * shape.head_dim
        yield Case(
            kernel="attention",
            name=f"{num_seqs} x {num_new} new of context {context}",
            num_rows=num_seqs * num_new,
            work=always(kernels.paged_attention, query, *caches, plan, scale),
            num_bytes=(kv_elements + 2 * query.numel()) * DTYPE.itemsize,
            flop=4.0 * shape.num_heads * shape.head_dim * pairs,
        )


def of_rows(
    bench: Bench, make: Callable[[Bench, int], Case], row_counts: tuple[int, ...]
) -> Iterator[Case]:
    """Yield one of ROW_KERNELS, which go over rows: bound by a copy of as many bytes."""
    for num_rows in row_counts:
        yield make(bench, num_rows)


def sampling(bench: Bench, row_counts: tuple[int, ...]) -> Iterator[Case]:
    """Yield greedy choice and sampling: logits are read once at least."""
    size, kernels = bench.shape.vocab_size, bench.kernels.sampling
    hashes = kernels.token_hashes(size, bench.device)
    for num_rows in row_counts:
        logits = bench.random(num_rows, size, dtype=torch.float32)
        ones = torch.ones(num_rows, device=bench.device)
        keys = kernels.row_keys(range(num_rows), range(num_rows)).to(bench.device)
        given = (
            logits, 0.8 * ones, 0 * ones, torch.full_like(ones, 50, dtype=torch.int64),
            0.95 * ones.double(), keys, hashes,
        )  # fmt: skip
        for name, work in (
            ("greedy", always(kernels.greedy_checked, logits)),
            ("top-k 50, top-p 0.95", always(kernels.sample, *given)),
        ):
            yield Case(
                kernel="sampling", name=f"{name}, {size}", num_rows=num_rows,
                work=work, num_bytes=logits.nbytes,
            )  # fmt: skip


def rms_norm(bench: Bench, num_rows: int) -> Case:
    """Return the norm with a residual: two inputs, two results."""
    size = bench.shape.hidden_size
    rows, residual = bench.random(num_rows, size), bench.random(num_rows, size)
    weight = torch.ones(size, dtype=DTYPE, device=bench.device)
    work = bench.kernels.add_rms_norm
    return _row_case(
        "rms_norm", "with residual", num_rows, lambda _: work(rows, residual, weight, _EPS),
        4 * rows.nbytes,
    )  # fmt: skip


def rope(bench: Bench, num_rows: int) -> Case:
    """Return the norms of heads, the rotation, and the writing of keys and values."""
    shape, device = bench.shape, bench.device
    table = rope_table(RopeSpec(theta=1e6), shape.head_dim, shape.max_position_embeddings)
    norm = torch.ones(shape.head_dim, dtype=DTYPE, device=device)
    heads = Heads(
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        cos=table[0].to(device),
        sin=table[1].to(device),
        query_norm=norm,
        key_norm=norm,
        norm_eps=_EPS,
    )
    qkv = bench.random(num_rows, heads.qkv_width)
    caches = [bench.random(shape.num_kv_heads, num_rows, shape.head_dim) for _ in range(2)]
    positions = torch.arange(num_rows, device=device) % shape.max_position_embeddings
    slots = torch.randperm(num_rows, device=device)
    work = bench.kernels.rope_write_kv
    return _row_case(
        "rope", "with norms and KV write", num_rows,
        lambda _: work(qkv, heads, positions, slots, *caches), 2 * qkv.nbytes,
    )  # fmt: skip


def router(bench: Bench, num_rows: int) -> Case:
    """Return the choice of experts."""
    shape, recipe = bench.shape, bench.recipe()
    logits = bench.random(num_rows, shape.num_experts, dtype=torch.float32)
    num_bytes = logits.nbytes + 12 * num_rows * shape.top_k
    work = bench.kernels.route
    return _row_case("router", "top-k", num_rows, lambda _: work(logits, recipe), num_bytes)


def sort_pairs(bench: Bench, num_rows: int) -> Case:
    """Return the sorting of pairs of a token and an expert."""
    ids = bench.some_experts(num_rows)
    work, num_experts = bench.kernels.sort_pairs, bench.shape.num_experts
    return _row_case(
        "sort_pairs", "by expert", num_rows, lambda _: work(ids, num_experts), 3 * ids.nbytes
    )


def combine(bench: Bench, num_rows: int) -> Case:
    """Return the weighted sum of every token's experts."""
    size, top_k = bench.shape.hidden_size, bench.shape.top_k
    rows = bench.random(num_rows * top_k, size)
    order = torch.randperm(num_rows * top_k, device=bench.device).view(num_rows, top_k)
    weights = torch.rand(num_rows, top_k, device=bench.device)
    num_bytes = rows.nbytes * (top_k + 1) / top_k + 12 * num_rows * top_k
    work = bench.kernels.combine
    return _row_case(
        "combine", f"of {top_k}", num_rows, lambda _: work(rows, order, weights), num_bytes
    )


def silu_and_mul(bench: Bench, num_rows: int) -> Case:
    """Return the activation of a dense MLP as wide as an expert."""
    gate_up = bench.random(num_rows, 2 * bench.shape.moe_intermediate_size)
    work: Callable[[Tensor], Tensor] = bench.kernels.silu_and_mul
    return _row_case(
        "silu_and_mul", "activation", num_rows, lambda _: work(gate_up), 1.5 * gate_up.nbytes
    )


def _row_case(kernel: str, name: str, num_rows: int, work: Work, num_bytes: float) -> Case:
    return Case(
        kernel=kernel, name=name, num_rows=num_rows, work=work, num_bytes=num_bytes, writes=True
    )


ROW_KERNELS = (rms_norm, rope, router, sort_pairs, combine, silu_and_mul)
