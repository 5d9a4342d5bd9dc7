"""Whether kernels compute what they should on this device: a plain loop, which needs no pytest.

Random inputs, outputs poisoned before they are written, a reference in float64 from the same
inputs; every kernel is run twice, as an error that moves is a race.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.gpu.cases import BLOCK_SIZE, DTYPE, Bench, expert_table
from moe_serve.kernels.moe.base import plain_weights
from moe_serve.kernels.rms_norm import reference as norm_reference
from moe_serve.kernels.router import reference as router_reference

# of bfloat16 results, by the norm of the error over that of the result
TOLERANCE = 1e-2
_EPS = 1e-6


class CheckFailed(Exception):
    """A kernel gave something else than it should."""


@contextmanager
def poisoned() -> Iterator[None]:
    """Make what is allocated but not written yet NaN."""
    allocate = torch.empty

    def empty(*sizes: Any, **options: Any) -> Tensor:
        tensor = allocate(*sizes, **options)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    with mock.patch.object(torch, "empty", empty):
        yield


def near(found: Tensor, want: Tensor) -> None:
    """Raise CheckFailed unless `found` is `want`, float64, but for rounding."""
    error = ((found.double() - want).norm() / want.norm()).item()
    if not error <= TOLERANCE:  # a NaN is not
        raise CheckFailed(f"relative error {error:.3g}, above {TOLERANCE:g}")


def same(found: Tensor, want: Tensor, what: str) -> None:
    """Raise CheckFailed unless both have the same bits; NaN are none."""
    if not torch.equal(found, want):
        differing = int((found != want).sum())
        raise CheckFailed(f"{what}: {differing} of {want.numel()} numbers differ")


def twice(run: Callable[[], Tensor]) -> Tensor:
    """Return what `run` does, poisoned memory before it, and does again."""
    with poisoned():
        first = run().clone()
        same(run(), first, "a second run")
    return first


def rows_alone(
    run: Callable[[Tensor], Tensor], num_rows: int, device: torch.device, counts: tuple[int, ...]
) -> None:
    """Raise CheckFailed unless some rows have the bits that they have among all.

    run: given int64 [count], the rows to run; returns a row for each.
    """
    every = torch.arange(num_rows, device=device)
    whole = run(every)
    for count in counts:
        chosen = torch.randperm(num_rows, device=device)[:count]
        same(run(chosen), whole[chosen], f"{count} of {num_rows} rows")


def linear(bench: Bench, num_rows: int, is_exact: bool) -> None:
    """Check the model's qkv projection, and its router."""
    shape, kernels = bench.shape, bench.kernels
    width = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
    for size_out, dtype in ((width, DTYPE), (shape.num_experts, torch.float32)):
        weight = torch.randn(size_out, shape.hidden_size, device=bench.device).to(dtype)
        rows = bench.random(num_rows, shape.hidden_size)
        packed = kernels.pack(weight)
        found = twice(lambda rows=rows, packed=packed: kernels.linear(rows, packed))  # type: ignore[misc]
        near(found, rows.double() @ weight.double().T)
        if is_exact:
            rows_alone(
                lambda at, rows=rows, packed=packed: kernels.linear(rows[at], packed),  # type: ignore[misc]
                num_rows, bench.device, (1, num_rows // 2),
            )  # fmt: skip


def moe(bench: Bench, num_rows: int, is_exact: bool) -> None:
    """Check a layer's experts, one of which has no token."""
    shape, kernels = bench.shape, bench.kernels
    table = expert_table(bench)
    ids = bench.some_experts(num_rows).clamp(max=shape.num_experts - 2)
    hidden = bench.random(num_rows, shape.hidden_size)

    def run(at: Tensor) -> Tensor:
        counts, row_of_pair, pair_of_choice = kernels.sort_pairs(ids[at], shape.num_experts)
        pairs = kernels.moe(hidden[at], row_of_pair, counts, table)
        return pairs[pair_of_choice]  # [rows, top_k, hidden_size]

    every = torch.arange(num_rows, device=bench.device)
    found = twice(lambda: run(every))
    sizes = (shape.hidden_size, shape.moe_intermediate_size)
    gate_up, down = plain_weights(table.records, *sizes, DTYPE)
    for row in range(min(num_rows, 8)):
        for choice, expert in enumerate(ids[row].tolist()):
            gate, up = (hidden[row].double() @ gate_up[expert].double().T).chunk(2)
            want = (torch.nn.functional.silu(gate) * up) @ down[expert].double().T
            near(found[row, choice], want)
    if is_exact:
        rows_alone(run, num_rows, bench.device, (1, num_rows // 2))


def attention(bench: Bench, num_rows: int, is_exact: bool) -> None:
    """Check decodes of unlike contexts, and a prompt, beside a plain softmax."""
    shape, kernels = bench.shape, bench.kernels
    contexts = [1 + 37 * number % (4 * num_rows) for number in range(num_rows)]
    blocks = -(-max(contexts) // BLOCK_SIZE)
    slots = (num_rows * blocks + 1) * BLOCK_SIZE
    caches = [bench.random(shape.num_kv_heads, slots, shape.head_dim) for _ in range(2)]
    order = torch.randperm(num_rows * blocks, device=bench.device).int() + 1
    table = order.view(num_rows, blocks)
    query = bench.random(num_rows, shape.num_heads, shape.head_dim)
    scale = shape.head_dim**-0.5

    def decode(at: Tensor) -> Tensor:
        lens = tuple(contexts[number] for number in at.tolist())
        plan = kernels.plan_attention((1,) * len(lens), lens, table[at], BLOCK_SIZE, None)
        return kernels.paged_attention(query[at], *caches, plan, scale)

    every = torch.arange(num_rows, device=bench.device)
    found = twice(lambda: decode(every))
    for number in range(min(num_rows, 8)):
        want = _attended(query[number][None], caches, table[number], contexts[number], scale)
        near(found[number], want[0])
    if is_exact:
        rows_alone(decode, num_rows, bench.device, (1, num_rows // 2))
    length = min(num_rows, blocks * BLOCK_SIZE)
    plan = kernels.plan_attention((length,), (length,), table[:1], BLOCK_SIZE, None)
    prompt = query[:length]
    found = twice(lambda: kernels.paged_attention(prompt, *caches, plan, scale))
    near(found, _attended(prompt, caches, table[0], length, scale))


def _attended(
    query: Tensor, caches: list[Tensor], table: Tensor, context: int, scale: float
) -> Tensor:
    """Return attention of the last queries of a sequence, float64 [rows, heads, head_dim]."""
    at = torch.arange(context, device=query.device)
    slots = table.long()[at // BLOCK_SIZE] * BLOCK_SIZE + at % BLOCK_SIZE
    group = query.shape[1] // caches[0].shape[0]
    keys, values = (cache[:, slots].double().repeat_interleave(group, 0) for cache in caches)
    scores = torch.einsum("rhd,hkd->hrk", query.double(), keys) * scale
    position = torch.arange(context - query.shape[0], context, device=query.device)
    scores = scores.masked_fill(at[None, None] > position[None, :, None], -torch.inf)
    return torch.einsum("hrk,hkd->rhd", scores.softmax(-1), values)


def row_kernels(bench: Bench, num_rows: int, is_exact: bool) -> None:
    """Check norm, routing, sorting and combining beside the reference on the host."""
    shape, kernels = bench.shape, bench.kernels
    rows, residual = (bench.random(num_rows, shape.hidden_size) for _ in range(2))
    weight = bench.random(shape.hidden_size)
    found = twice(lambda: kernels.add_rms_norm(rows, residual, weight, _EPS)[0])
    given = (rows.cpu(), residual.cpu(), weight.cpu())
    near(found, norm_reference.add_rms_norm(*given, _EPS)[0].double().to(bench.device))
    logits = bench.random(num_rows, shape.num_experts, dtype=torch.float32)
    routing = kernels.route(logits, bench.recipe())
    want = router_reference.route(logits.cpu(), bench.recipe())
    same(routing.expert_ids.cpu(), want.expert_ids, "experts of tokens")
    near(routing.weights, want.weights.double().to(bench.device))
    sorted_pairs = kernels.sort_pairs(routing.expert_ids, shape.num_experts)
    wanted = router_reference.sort_pairs(want.expert_ids, shape.num_experts)
    for one, other in zip(sorted_pairs, wanted, strict=True):
        same(one.cpu(), other, "sorted pairs")
    pairs = bench.random(num_rows * shape.top_k, shape.hidden_size)
    combined = twice(lambda: kernels.combine(pairs, sorted_pairs[2], routing.weights))
    terms = pairs.double()[sorted_pairs[2]] * routing.weights.double()[..., None]
    near(combined, terms.sum(1))


def greedy(bench: Bench, num_rows: int, is_exact: bool) -> None:
    """Check that the best token is found."""
    logits = bench.random(num_rows, bench.shape.vocab_size, dtype=torch.float32)
    tokens, is_finite = bench.kernels.sampling.greedy_checked(logits)
    same(tokens, logits.argmax(-1), "best tokens")
    if not bool(is_finite.all()):
        raise CheckFailed("finite logits are said not to be")


Check = Callable[[Bench, int, bool], None]
CHECKS: dict[str, Check] = {
    "linear": linear,
    "moe": moe,
    "attention": attention,
    "rows": row_kernels,
    "greedy": greedy,
}
