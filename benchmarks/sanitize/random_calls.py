"""Every kernel with random shapes, until the time is up; results must be finite.

Run as a module, with the library, seconds and a seed, in the environment of `build.environment`,
where memory that was never written is NaN.
"""

from __future__ import annotations

import collections
import random
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.sanitize.random_models import forward
from benchmarks.sanitize.random_shapes import count_of, dtype_of, size_of
from moe_serve.experts import records
from moe_serve.kernels import suite
from moe_serve.kernels.exchange.base import Replicas, RowPlan, row_bytes
from moe_serve.kernels.forward import cpu as forward_cpu
from moe_serve.kernels.linear import cpu as linear_cpu
from moe_serve.kernels.moe.base import ExpertTable, plain_weights
from moe_serve.kernels.native import loader
from moe_serve.kernels.rope.base import Heads
from moe_serve.kernels.suite import Kernels
from moe_serve.types import RouterRecipe, RouterScore

SCORES: tuple[RouterScore, ...] = ("softmax", "sigmoid", "softmax_after_top_k", "sqrt_softplus")
MAX_THREADS = 4

Call = Callable[[Kernels, random.Random], Iterable[Tensor]]


def linear(kernels: Kernels, chance: random.Random) -> Iterable[Tensor]:
    dtype = dtype_of(chance)
    num_rows, in_features, out_features = (
        count_of(chance, 300),
        size_of(chance, 300),
        size_of(chance, 200),
    )
    weight = kernels.pack(torch.randn(out_features, in_features).to(dtype))
    bias = torch.randn(out_features).to(dtype) if chance.random() < 0.5 else None
    rows = torch.randn(num_rows, in_features).to(chance.choice([dtype, torch.bfloat16]))
    yield kernels.linear(rows, weight, bias)
    yield kernels.gather(weight, torch.randint(out_features, (count_of(chance, 40),)))


def norms(kernels: Kernels, chance: random.Random) -> Iterable[Tensor]:
    dtype, size = dtype_of(chance), size_of(chance, 300)
    shape = (count_of(chance, 60), size)
    rows, residual = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    weight = torch.randn(size).to(dtype)
    yield kernels.rms_norm(rows, weight, 1e-6)
    yield from kernels.add_rms_norm(rows, residual, weight, 1e-6)


def rope_write_kv(kernels: Kernels, chance: random.Random) -> Iterable[Tensor]:
    dtype, head_dim = dtype_of(chance), 2 * size_of(chance, 70)
    kv_heads = chance.randint(1, 4)
    heads = kv_heads * chance.randint(1, 5)
    max_len, num_tokens = chance.randint(1, 50), count_of(chance, 50)
    num_slots = num_tokens + chance.randint(1, 20)
    is_full, has_norm = chance.random() < 0.3, chance.random() < 0.6
    angles = torch.randn(max_len, head_dim // 2)

    def norm(count: int) -> Tensor | None:
        return torch.randn(head_dim * (count if is_full else 1)).to(dtype) if has_norm else None

    how = Heads(
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        cos=angles.cos(),
        sin=angles.sin(),
        query_norm=norm(heads),
        key_norm=norm(kv_heads),
        is_norm_full=is_full,
        norm_eps=1e-6,
        clip=chance.choice([None, 0.5]),
    )
    caches = [torch.zeros(kv_heads, num_slots, head_dim, dtype=dtype) for _ in range(2)]
    yield kernels.rope_write_kv(
        torch.randn(num_tokens, how.qkv_width).to(dtype),
        how,
        torch.randint(max_len, (num_tokens,)),
        torch.randperm(num_slots)[:num_tokens].clone(),
        *caches,
    )
    yield from caches


def route(kernels: Kernels, chance: random.Random) -> Iterable[Tensor]:
    groups = chance.choice([1, 1, 2, 4, 8])
    in_group = chance.randint(2, max(2, 260 // groups))
    kept = chance.randint(1, groups)
    num_tokens, hidden_size = count_of(chance, 80), size_of(chance, 200)
    has_bias = chance.random() < 0.3
    recipe = RouterRecipe(
        num_experts=groups * in_group,
        top_k=chance.randint(1, min(kept * in_group, 40)),
        score=chance.choice(SCORES),
        has_selection_bias=has_bias,
        num_groups=groups,
        top_k_groups=kept,
        group_score_top=chance.randint(1, 2),
        renormalise=chance.random() < 0.5,
        renormalise_eps=1e-20,
        scale=chance.choice([1.0, 2.5]),
    )
    bias = torch.randn(recipe.num_experts) if has_bias else None
    routing = kernels.route(torch.randn(num_tokens, recipe.num_experts), recipe, bias)
    yield routing.weights
    yield from kernels.sort_pairs(routing.expert_ids, recipe.num_experts)
    hidden = torch.randn(num_tokens, hidden_size).to(dtype_of(chance))
    yield kernels.shared_weights(hidden, torch.randn(hidden_size))


def moe(kernels: Kernels, chance: random.Random) -> Iterable[Tensor]:
    dtype, hidden_size, inner_size = dtype_of(chance), size_of(chance, 150), size_of(chance, 100)
    num_experts, num_tokens = chance.randint(1, 20), count_of(chance, 100)
    top_k = chance.randint(1, num_experts)
    num_used = chance.randint(top_k, num_experts)
    record_bytes = kernels.record_bytes(hidden_size, inner_size, dtype)
    num_slots = num_used + chance.randint(0, 3)
    records = torch.zeros(num_slots, record_bytes, dtype=torch.uint8)
    for weights in plain_weights(records, hidden_size, inner_size, dtype):
        weights.copy_(torch.randn(weights.shape) / weights.shape[-1] ** 0.5)
    kernels.pack_records_(records, hidden_size, inner_size, dtype)
    resident = torch.randperm(num_experts)[:num_used]
    slot_of_expert = torch.full((num_experts,), -1, dtype=torch.int32)
    slot_of_expert[resident] = torch.randperm(num_slots)[:num_used].int()
    uses = torch.zeros(num_experts, dtype=torch.int64)
    table = ExpertTable(records, slot_of_expert, uses, hidden_size, inner_size, dtype)
    if chance.random() < 0.2:  # all rows to the same experts
        ids = resident[:top_k].expand(num_tokens, top_k).contiguous()
    else:
        order = torch.rand(num_tokens, num_used).argsort(-1)
        ids = resident[order[:, :top_k]]  # [num_tokens, top_k]
    counts, row_of_pair, pair_of_choice = kernels.sort_pairs(ids, num_experts)
    hidden = torch.randn(num_tokens, hidden_size).to(dtype)
    rows = kernels.moe(hidden, row_of_pair, counts, table)
    yield rows
    shared = hidden if chance.random() < 0.5 else None
    has_weights = shared is not None and chance.random() < 0.5
    yield kernels.combine(
        rows,
        pair_of_choice,
        torch.rand(num_tokens, top_k),
        shared,
        torch.rand(num_tokens) if has_weights else None,
    )
    yield kernels.silu_and_mul(torch.randn(num_tokens, 2 * inner_size).to(dtype))


def exchange(kernels: Kernels, chance: random.Random) -> Iterable[Tensor]:
    dtype, size, num_tokens = dtype_of(chance), size_of(chance, 150), count_of(chance, 60)
    num_ranks, num_experts = chance.randint(1, 8), chance.randint(1, 40)
    top_k, most = chance.randint(1, min(8, num_experts)), chance.randint(1, num_ranks)
    replicas = Replicas(
        torch.rand(num_experts, num_ranks).argsort(1)[:, :most].contiguous(),
        torch.randint(1, most + 1, (num_experts,)),
    )
    ids = torch.rand(num_tokens, num_experts).argsort(1)[:, :top_k].contiguous()
    capacity = chance.choice([None, num_tokens, 1 + num_tokens // 3])
    rounds = -(-num_tokens // capacity) if capacity else 1
    width = chance.choice([None, top_k])
    plan = RowPlan(num_ranks, capacity, rounds, width)
    num_rows = plan.num_rows(num_tokens, top_k)
    out = torch.zeros(num_rows, row_bytes(size, dtype, top_k), dtype=torch.uint8)
    packed = kernels.pack_rows(torch.randn(num_tokens, size).to(dtype), ids, replicas, plan, out)
    yield from packed
    # what goes to all ranks, as if it came from all
    came = out[: int(packed.rows_of_rank.sum())]
    room = torch.empty(came.shape[0], size, dtype=dtype)
    got = kernels.unpack_rows(came, packed.rows_of_rank, num_experts, top_k, plan, room)
    yield from got
    num_results = num_tokens * top_k if width is None else came.shape[0] * width
    results = torch.zeros(num_results, size, dtype=dtype)
    kernels.scatter_rows(got.rows[got.row_of_pair], got.place_of_pair, results)
    yield results


def paged_attention(kernels: Kernels, chance: random.Random) -> Iterable[Tensor]:
    dtype, head_dim, block_size = dtype_of(chance), 2 * size_of(chance, 70), chance.randint(1, 64)
    kv_heads = chance.randint(1, 4)
    heads = kv_heads * chance.randint(1, 5)
    most = chance.choice([70, 300, 2200])
    contexts = tuple(size_of(chance, most) for _ in range(chance.randint(1, 6)))
    is_decode = chance.random() < 0.4
    queries = tuple(
        1 if is_decode or chance.random() < 0.3 else min(size_of(chance, 150), context)
        for context in contexts
    )
    blocks = [-(-context // block_size) for context in contexts]
    table = torch.zeros(len(contexts), max(blocks), dtype=torch.int32)
    free = iter((torch.randperm(sum(blocks)) + 1).tolist())
    shape = (kv_heads, (sum(blocks) + 1) * block_size, head_dim)
    # what no sequence holds is NaN, and must not show
    caches = [torch.full(shape, float("nan"), dtype=dtype) for _ in range(2)]
    for cache in caches:
        cache[:, :block_size] = 0
    for sequence, context in enumerate(contexts):
        for index in range(blocks[sequence]):
            block = next(free)
            table[sequence, index] = block
            filled = min(block_size, context - index * block_size)
            part = slice(block * block_size, block * block_size + filled)
            for cache in caches:
                cache[:, part] = torch.randn(kv_heads, filled, head_dim)
    window = chance.choice([None, None, 1, 64, chance.randint(1, 200)])
    plan = kernels.plan_attention(queries, contexts, table, block_size, window)
    sinks = torch.randn(heads) if chance.random() < 0.3 else None
    query = torch.randn(sum(queries), heads, head_dim).to(dtype)
    yield kernels.paged_attention(query, *caches, plan, head_dim**-0.5, sinks)


def sampling(kernels: Kernels, chance: random.Random) -> Iterable[Tensor]:
    num_rows, vocab_size = count_of(chance, 20), size_of(chance, 3000)
    functions: Any = kernels.sampling
    logits = torch.randn(num_rows, vocab_size) * chance.choice([0.0, 1.0, 10.0])
    if chance.random() < 0.3:  # most tokens forbidden
        logits[:, 1:][torch.rand(num_rows, vocab_size - 1) < 0.9] = -torch.inf
    greedy, _ = functions.greedy_checked(logits)
    yield greedy
    seeds = [chance.randrange(-(2**63), 2**63) for _ in range(num_rows)]
    keys = functions.row_keys(seeds, [chance.randrange(5000) for _ in range(num_rows)])
    chosen = functions.sample(
        logits,
        torch.tensor([chance.choice([1e-5, 0.7, 1.0, 100.0]) for _ in range(num_rows)]),
        torch.tensor([chance.choice([0.0, 0.1, 1.0]) for _ in range(num_rows)]),
        torch.tensor([chance.randint(1, vocab_size) for _ in range(num_rows)], dtype=torch.int64),
        torch.tensor(
            [chance.choice([1e-9, 0.5, 0.9, 1.0]) for _ in range(num_rows)], dtype=torch.float64
        ),
        keys,
        functions.token_hashes(vocab_size, logits.device),
    )
    assert ((chosen >= 0) & (chosen < vocab_size)).all(), chosen
    top = chance.randint(0, min(20, vocab_size))
    found = functions.chosen_logprobs(logits, chosen, top)
    yield found[0]
    assert not found[3].isnan().any(), found


CALLS: tuple[Call, ...] = (
    forward,
    linear,
    norms,
    rope_write_kv,
    route,
    moe,
    exchange,
    paged_attention,
    sampling,
)


def check(call: Call, kernels: Kernels, chance: random.Random) -> None:
    """Make one call with a random number of threads. Raises ValueError for what is not finite."""
    torch.set_num_threads(chance.randint(1, MAX_THREADS))
    for index, result in enumerate(call(kernels, chance)):
        if not result.isfinite().all():
            raise ValueError(f"{call.__name__}, {kernels.numerics_id}: result {index} not finite")


def _exact(num_bytes: int) -> torch.Tensor:
    """Allocate zeros of which the sanitizer knows the end."""
    return torch.zeros(num_bytes, dtype=torch.uint8)


def main() -> None:
    path, seconds, seed = Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
    chance = random.Random(seed)
    torch.manual_seed(seed)
    # one byte more than the work space must be past it
    mock.patch.object(forward_cpu, "_WORKSPACE_STEP", 1).start()
    # and past a packed weight or an arena, which otherwise lie in pages of their own
    for module in (linear_cpu, records):
        mock.patch.object(module, "allocate", _exact).start()
    with mock.patch.object(loader, "built_path", return_value=path):
        isas = loader.supported_isas(loader.open_library())
        sets = [suite.load("cpu", isa) for isa in isas]
    made: collections.Counter[str] = collections.Counter()
    deadline_s = time.monotonic() + seconds
    while time.monotonic() < deadline_s:
        kernels, call = chance.choice(sets), CALLS[made.total() % len(CALLS)]
        made[call.__name__] += 1
        check(call, kernels, chance)
    print(f"no report in {seconds:g} s; {', '.join(isas)}; calls: {dict(made)}")


if __name__ == "__main__":
    main()
