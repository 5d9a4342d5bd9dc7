"""Paged attention against float64 over plain keys, and the same bits in any batch."""

from __future__ import annotations

import random

import pytest
import torch

from moe_serve.kernels.paged_attention import cpu, reference
from moe_serve.kernels.suite import Kernels
from tests.kernels.implementations import IMPLEMENTATIONS, NATIVE, TRITON, kernels
from tests.kernels.paged_cache import attend, by_hand, cached
from tests.kernels.row_independence import same_bits

# what is interpreted has fewer cases, in test_paged_attention_triton.py
COMPILED = [name for name in IMPLEMENTATIONS if name not in TRITON]
# relative: the result's one rounding, and what float32 adds
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-8}


@pytest.fixture(params=COMPILED)
def implementation(request: pytest.FixtureRequest) -> Kernels:
    return kernels(request.param)


@pytest.fixture(params=IMPLEMENTATIONS)
def each(request: pytest.FixtureRequest) -> Kernels:
    return kernels(request.param)


@pytest.fixture(params=NATIVE)
def native(request: pytest.FixtureRequest) -> Kernels:
    """A native implementation, whose scratch memory is full of NaN."""
    chosen = kernels(request.param)
    nan = torch.full((1, 64, 8, 128), float("nan"))
    table = torch.zeros(1, 1, dtype=torch.int32)
    caches = [torch.full((1, 64, 128), float("nan")) for _ in range(2)]
    for count in (1, 64):
        plan = chosen.plan_attention((count,), (64,), table, 64, None)
        assert chosen.paged_attention(nan[0, :count], *caches, plan, 1.0).isnan().all()
    return chosen


@pytest.mark.parametrize("block_size", [1, 16, 37, 64])
@pytest.mark.parametrize("window", [None, 1, 50, 64, 200])
@pytest.mark.parametrize("has_sinks", [False, True], ids=["plain", "sinks"])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, 8), (6, 2, 32), (8, 1, 20)])
@pytest.mark.usefixtures("poisoned_empty")
def test_equals_float64(
    implementation: Kernels,
    block_size: int,
    window: int | None,
    has_sinks: bool,
    heads: int,
    kv_heads: int,
    head_dim: int,
) -> None:
    lengths = [1, 63, 64, 65, 300, 201]
    chunks = [1, 1, 30, 1, 300, 2]
    cache = cached(lengths, block_size, kv_heads, head_dim, torch.float32, seed=0)
    queries = [torch.randn(chunk, heads, head_dim) for chunk in chunks]
    sinks = torch.randn(heads) if has_sinks else None
    got = attend(implementation, cache, queries, lengths, list(range(6)), window, sinks)
    for row in range(6):
        want = by_hand(queries[row], cache.keys[row], cache.values[row], window, sinks)
        torch.testing.assert_close(got[row].double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("group", "head_dim"),
    [(1, 8), (2, 20), (3, 6), (4, 64), (4, 128), (5, 80), (6, 20), (7, 64), (8, 64), (8, 80)],
)
@pytest.mark.usefixtures("poisoned_empty")
def test_native_equals_float64_in_every_shape(
    native: Kernels, dtype: torch.dtype, group: int, head_dim: int
) -> None:
    lengths, chunks = [1, 2100, 1100, 130, 40], [1, 1, 100, 3, 40]
    cache = cached(lengths, 16, 2, head_dim, dtype, seed=group)
    queries = [torch.randn(chunk, 2 * group, head_dim).to(dtype) for chunk in chunks]
    sinks = torch.randn(2 * group)
    for window in (None, 1050):
        got = attend(native, cache, queries, lengths, list(range(5)), window, sinks)
        for row in range(5):
            want = by_hand(queries[row], cache.keys[row], cache.values[row], window, sinks)
            assert got[row].dtype == dtype
            torch.testing.assert_close(got[row].double(), want, rtol=TOLERANCE[dtype], atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(8, 2, 32), (5, 5, 8), (16, 4, 64), (6, 3, 10), (4, 1, 6)]
)
def test_a_query_does_not_see_the_batch(
    implementation: Kernels,
    dtype: torch.dtype,
    window: int | None,
    heads: int,
    kv_heads: int,
    head_dim: int,
) -> None:
    lengths = [1, 64, 90, 200, 333, 129, 65, 5]
    if implementation.isa is not None:
        lengths += [1100, 2150]
    firsts = [
        max(0, length - (350 if length < 1000 else 100)) for length in lengths
    ]  # queries before them never run
    cache = cached(lengths, 16, kv_heads, head_dim, dtype, seed=1)
    other = cached(lengths, 7, kv_heads, head_dim, dtype, seed=1)  # the same, other blocks
    queries = [
        torch.randn(length - first, heads, head_dim).to(dtype)
        for length, first in zip(lengths, firsts, strict=True)
    ]
    sinks = torch.randn(heads)
    num_rows = len(lengths)
    assert same_bits(cache.keys[3], other.keys[3])
    whole = attend(implementation, cache, queries, lengths, list(range(num_rows)), window, sinks)
    chance = random.Random(0)
    for _ in range(25):
        rows = chance.sample(range(num_rows), chance.randint(1, num_rows))
        ends = [chance.randint(firsts[row] + 1, lengths[row]) for row in rows]
        starts = [
            max(firsts[row], end - chance.choice([1, 1, 7, 64, 400]))
            for row, end in zip(rows, ends, strict=True)
        ]
        parts = [
            slice(start - firsts[row], end - firsts[row])
            for row, start, end in zip(rows, starts, ends, strict=True)
        ]
        torch.set_num_threads(chance.choice([1, 2, 4]))
        got = attend(
            implementation,
            chance.choice([cache, other]),
            [queries[row][part] for row, part in zip(rows, parts, strict=True)],
            ends,
            rows,
            window,
            sinks,
        )
        for out, row, part in zip(got, rows, parts, strict=True):
            assert same_bits(out, whole[row][part]), (row, part)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("window", [None, 1500])
def test_who_works_out_the_spans_changes_no_bit(
    native: Kernels, dtype: torch.dtype, window: int | None
) -> None:
    # alone, each span of 1024 keys is an item; beside 64 others all spans of a tile are one
    lengths = [3300, *([2] * 64)]
    cache = cached(lengths, 16, 1, 32, dtype, seed=3)
    queries = [torch.randn(200 if length > 2 else 1, 4, 32).to(dtype) for length in lengths]
    torch.set_num_threads(2)
    alone = attend(native, cache, queries[:1], lengths[:1], [0], window)[0]
    among = attend(native, cache, queries, lengths, list(range(65)), window)[0]
    assert same_bits(alone, among)


# Triton's interpreter warns of what is no error on a GPU
@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
def test_one_querys_nan_stays_with_it(each: Kernels) -> None:
    cache = cached([40, 40], 16, 2, 8, torch.float32, seed=2)
    queries = [torch.randn(1, 4, 8) for _ in range(2)]
    clean = attend(each, cache, queries, [40, 40], [0, 1], None)
    queries[0] = torch.full((1, 4, 8), float("nan"))
    spoilt = attend(each, cache, queries, [40, 40], [0, 1], None)
    assert bool(spoilt[0].isnan().all())
    assert same_bits(spoilt[1], clean[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("group", [1, 4])
def test_a_key_that_is_not_seen_may_be_nan(
    native: Kernels, dtype: torch.dtype, bad: float, group: int
) -> None:
    cache = cached([200], 16, 1, 16, dtype, seed=4)
    queries = [torch.randn(200, group, 16).to(dtype)]
    clean = attend(native, cache, queries, [200], [0], 50)[0]
    slot = int(cache.table[0, 100 // 16]) * 16 + 100 % 16
    cache.key_cache[:, slot] = bad
    cache.value_cache[:, slot] = bad
    spoilt = attend(native, cache, queries, [200], [0], 50)[0]
    assert same_bits(spoilt[:100], clean[:100])
    assert bool(spoilt[100:150].isnan().all(-1).any(-1).all())
    assert same_bits(spoilt[150:], clean[150:])


def test_every_token_is_in_one_tile() -> None:
    query_lens, contexts = (1, 1, 400, 1, 5, 129), (1000, 3, 400, 64, 70, 1000)
    table = torch.zeros(6, 63, dtype=torch.int32)
    for window in (None, 100):
        tiles = reference.plan(query_lens, contexts, table, 16, window)
        rows = torch.cat([tile.rows for tile in tiles])
        assert sorted(rows.tolist()) == list(range(sum(query_lens)))


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize(
    ("query_lens", "contexts"),
    [((1, 1, 400, 1, 5, 129), (1000, 3, 400, 64, 70, 1000)), ((1, 1, 1), (5, 1000, 40)), ((), ())],
    ids=["mixed", "decode", "none"],
)
def test_a_native_plan_has_every_token_at_its_position(
    query_lens: tuple[int, ...], contexts: tuple[int, ...], window: int | None
) -> None:
    table = torch.zeros(len(contexts), 63, dtype=torch.int32)
    plan = cpu.plan(query_lens, contexts, table, 16, window)
    got = sorted(
        (row + at, sequence, position + at)
        for sequence, row, position, count in plan.tiles.tolist()
        for at in range(count)
    )
    places = [
        (seq, position)
        for seq, (length, context) in enumerate(zip(query_lens, contexts, strict=True))
        for position in range(context - length, context)
    ]
    assert got == [(row, *place) for row, place in enumerate(places)]


def test_no_tokens(each: Kernels) -> None:
    device = each.device
    table = torch.zeros(0, 1, dtype=torch.int32, device=device)
    caches = [torch.zeros(2, 32, 16, device=device) for _ in range(2)]
    plan = each.plan_attention((), (), table, 16, None)
    out = each.paged_attention(torch.zeros(0, 4, 16, device=device), *caches, plan, 1.0)
    assert out.shape == (0, 4, 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_tensors_may_have_gaps(each: Kernels, dtype: torch.dtype) -> None:
    cache = cached([70, 90], 16, 2, 20, dtype, seed=5)
    fused = torch.randn(31, 8, 20).to(each.device, dtype)
    plan = each.plan_attention((1, 30), (70, 90), cache.table.to(each.device), 16, None)
    caches = (cache.key_cache.to(each.device), cache.value_cache.to(each.device))
    want = each.paged_attention(fused[:, :4].clone(), *caches, plan, 0.3)
    assert same_bits(each.paged_attention(fused[:, :4], *caches, plan, 0.3), want)
    apart = fused[:, ::2].clone().transpose(0, 1).contiguous().transpose(0, 1)
    want_apart = each.paged_attention(apart.contiguous(), *caches, plan, 0.3)
    assert same_bits(each.paged_attention(apart, *caches, plan, 0.3), want_apart)
    both = torch.stack(caches, 1)  # [num_kv_heads, 2, num_slots, head_dim]
    assert same_bits(each.paged_attention(fused[:, :4], both[:, 0], both[:, 1], plan, 0.3), want)
    wide = torch.cat(caches, 2)  # a key and its value side by side
    assert same_bits(
        each.paged_attention(fused[:, :4], wide[..., :20], wide[..., 20:], plan, 0.3), want
    )
