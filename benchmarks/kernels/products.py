"""Cases of the kernels that multiply with weights: linear layers and experts.

Few rows: the weights' bytes against read bandwidth, the weights rotating through memory. Many rows:
operations against torch's product of the same sizes, with one set of weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels.limits import Limits, product
from benchmarks.kernels.timing import Case, Work, num_sets
from benchmarks.kernels.workload import Workload
from moe_serve.experts.records import ExpertArena
from moe_serve.kernels.moe.base import ExpertTable
from moe_serve.kernels.suite import Kernels

DTYPE = torch.bfloat16


def linear(kernels: Kernels, workload: Workload, limits: Limits) -> Iterator[Case]:
    """Yield every number of rows of the model's linear layers."""
    shape = workload.shape
    heads = shape.num_heads + 2 * shape.num_kv_heads
    shapes = {
        "qkv": (heads * shape.head_dim, shape.hidden_size),
        "output": (shape.hidden_size, shape.num_heads * shape.head_dim),
        "head": (shape.vocab_size, shape.hidden_size),
        "expert": (2 * shape.moe_intermediate_size, shape.hidden_size),
    }
    for name, sizes in shapes.items():
        yield from _linear_cases(
            "linear", name, sizes, DTYPE, workload.linear_rows, kernels, workload, limits
        )


def router_scores(kernels: Kernels, workload: Workload, limits: Limits) -> Iterator[Case]:
    """Yield the router's product, whose weight is float32."""
    shape = workload.shape
    sizes = (shape.num_experts, shape.hidden_size)
    rows = workload.row_counts
    yield from _linear_cases(
        "router", "scores", sizes, torch.float32, rows, kernels, workload, limits
    )


def _linear_cases(
    table: str,
    name: str,
    sizes: tuple[int, int],
    dtype: torch.dtype,
    row_counts: Sequence[int],
    kernels: Kernels,
    workload: Workload,
    limits: Limits,
) -> Iterator[Case]:
    """Yield one layer's cases; dtype: of the weight, its rows are bfloat16."""
    out_features, in_features = sizes
    weight = (torch.randn(sizes) * in_features**-0.5).to(dtype)
    count = num_sets(weight.nbytes, workload.cold_bytes)
    plain = [weight.clone() for _ in range(count)]
    packed = [kernels.pack(weight) for _ in range(count)]

    def multiply(rows: Tensor, used: int) -> Callable[[int], object]:
        return lambda turn: kernels.linear(rows, packed[turn % used])

    def by_torch(rows: Tensor, used: int) -> Callable[[int], object]:
        return lambda turn: F.linear(rows.to(dtype), plain[turn % used])

    for num_rows in row_counts:
        is_few = num_rows <= workload.max_memory_rows
        used = count if is_few else 1
        rows = torch.randn(num_rows, in_features).to(DTYPE)
        num_bytes, flop = weight.nbytes, 2.0 * num_rows * weight.numel()
        yield Case(
            table=table,
            name=f"{name} {out_features}x{in_features}, {num_rows} rows",
            num_rows=num_rows,
            work=Work(multiply(rows, used), num_bytes, flop),
            unit="GB/s" if is_few else "GFLOP/s",
            limit=limits.read if is_few else product(num_rows, out_features, in_features, dtype),
            limit_name="read" if is_few else "torch.mm",
            torch=Work(by_torch(rows, used), num_bytes, flop),
            empty=Work(multiply(rows[:0], used)),
        )


@dataclass(frozen=True, slots=True)
class Routed:
    """Tokens of one layer, sorted by expert: see `Kernels.moe`."""

    layer: int
    row_of_pair: Tensor
    counts: Tensor

    @property
    def num_touched(self) -> int:
        return int(self.counts.count_nonzero())


def routed(kernels: Kernels, layer: int, num_tokens: int, num_experts: int, top_k: int) -> Routed:
    """Choose top_k different experts at random for each token."""
    ids = torch.rand(num_tokens, num_experts).topk(top_k, dim=-1).indices
    counts, row_of_pair, _ = kernels.sort_pairs(ids, num_experts)
    return Routed(layer, row_of_pair, counts)


def expert_product(rows: int, hidden_size: int, intermediate_size: int) -> Work:
    """Return torch's two products of one expert with `rows` rows, without what is between."""
    gate_up = product(rows, 2 * intermediate_size, hidden_size, DTYPE)
    down = product(rows, hidden_size, intermediate_size, DTYPE)

    def both(turn: int) -> None:
        gate_up.run(turn)
        down.run(turn)

    return Work(both, gate_up.num_bytes + down.num_bytes, gate_up.flop + down.flop)


def moe(kernels: Kernels, workload: Workload, limits: Limits) -> Iterator[Case]:
    """Yield every number of tokens of the model's MoE layer, routed at random.

    GB/s: of the weights of the experts that were touched, in the mean of the routings.
    """
    shape = workload.shape
    layers, plain = _expert_layers(kernels, workload)
    expert_bytes = shape.expert_elements * DTYPE.itemsize

    def run(hidden: Tensor, routings: list[Routed]) -> Callable[[int], object]:
        def call(turn: int) -> Tensor:
            routing = routings[turn % len(routings)]
            table = layers[routing.layer]
            return kernels.moe(hidden, routing.row_of_pair, routing.counts, table)

        return call

    def by_torch(hidden: Tensor, routings: list[Routed]) -> Callable[[int], object]:
        def call(turn: int) -> Tensor:
            routing = routings[turn % len(routings)]
            return _experts_of_torch(hidden, routing, *plain[routing.layer])

        return call

    for num_tokens in workload.moe_tokens:
        is_few = num_tokens <= workload.max_memory_tokens
        used = len(layers) if is_few else 1
        routings = [
            routed(kernels, index % used, num_tokens, shape.num_experts, shape.top_k)
            for index in range(8 * used)
        ]
        none = [Routed(0, routings[0].row_of_pair[:0], torch.zeros_like(routings[0].counts))]
        touched = sum(routing.num_touched for routing in routings) / len(routings)
        hidden = torch.randn(num_tokens, shape.hidden_size).to(DTYPE)
        num_bytes = touched * expert_bytes
        flop = 2.0 * num_tokens * shape.top_k * shape.expert_elements
        per_expert = math.ceil(num_tokens * shape.top_k / shape.num_experts)
        limit = (
            limits.read
            if is_few
            else expert_product(per_expert, shape.hidden_size, shape.moe_intermediate_size)
        )
        yield Case(
            table="moe",
            name=f"{num_tokens} tokens, {touched:.1f} of {shape.num_experts} experts",
            num_rows=num_tokens,
            work=Work(run(hidden, routings), num_bytes, flop),
            unit="GB/s" if is_few else "GFLOP/s",
            limit=limit,
            limit_name="read" if is_few else f"torch.mm, {per_expert} rows",
            torch=Work(by_torch(hidden, routings), num_bytes, flop),
            empty=Work(run(hidden[:0], none)),
        )


def _expert_layers(
    kernels: Kernels, workload: Workload
) -> tuple[list[ExpertTable], list[tuple[Tensor, Tensor]]]:
    """Return layers of experts, packed, and their plain gate_up and down for torch.

    So many that they hold twice the cold bytes: a routing touches experts at random, and should not
    find those that the last call left in a cache.
    """
    shape = workload.shape
    hidden_size, size = shape.hidden_size, shape.moe_intermediate_size
    layer_bytes = shape.num_experts * shape.expert_elements * DTYPE.itemsize
    count = num_sets(layer_bytes, 2 * workload.cold_bytes)
    arena = ExpertArena(
        range(count),
        shape.num_experts,
        hidden_size,
        size,
        DTYPE,
        kernels.record_bytes(hidden_size, size, DTYPE),
    )
    plain = []
    gate_up = (torch.randn(2 * size, hidden_size) * hidden_size**-0.5).to(DTYPE)
    down = (torch.randn(hidden_size, size) * size**-0.5).to(DTYPE)
    for layer in range(count):
        views = arena.plain_weights(layer)
        for view, one in zip(views, (gate_up, down), strict=True):
            view.copy_(one)
        plain.append((views[0].clone(), views[1].clone()))
    arena.pack(kernels.pack_records_, kernels.record_layout)
    return [arena.table(layer) for layer in range(count)], plain


def _experts_of_torch(hidden: Tensor, routing: Routed, gate_up: Tensor, down: Tensor) -> Tensor:
    """Return what `Kernels.moe` does, by a loop over the experts that were touched."""
    out = hidden.new_empty(routing.row_of_pair.shape[0], hidden.shape[1])
    start = 0
    for expert, count in enumerate(routing.counts.tolist()):
        if count:
            rows = hidden[routing.row_of_pair[start : start + count]]
            gate, up = F.linear(rows, gate_up[expert]).chunk(2, dim=-1)
            out[start : start + count] = F.linear(F.silu(gate) * up, down[expert])
            start += count
    return out
