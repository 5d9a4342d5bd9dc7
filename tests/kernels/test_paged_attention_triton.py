"""The GPU's paged attention: what programs may share out, what a graph may replay, what is read.

Interpreted where there is no GPU: few cases, each of several edges.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_serve.kernels.gpu import attention_plan
from moe_serve.kernels.gpu.attention_plan import (
    PART_BYTES,
    SPLIT,
    Kind,
    Part,
    Shape,
    cut,
    decode_plan,
)
from moe_serve.kernels.suite import Kernels
from tests.kernels.implementations import TRITON, kernels
from tests.kernels.paged_cache import Cached, attend, by_hand, cached
from tests.kernels.row_independence import same_bits

attention = pytest.importorskip("moe_serve.kernels.paged_attention.triton")
EXACT = "triton-exact"
FP32, BF16 = torch.float32, torch.bfloat16

EACH_TRITON = pytest.mark.parametrize("name", TRITON)


@pytest.fixture
def multiprocessors(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Let kernels believe in a GPU of so many: 1 has programs do much, 132 splits little work."""

    def believe(count: int) -> None:
        monkeypatch.setattr(attention, "_num_multiprocessors", lambda _: count)

    return believe


def check(got: Tensor, query: Tensor, cache: Cached, row: int, window: int | None,
          sinks: Tensor | None) -> None:  # fmt: skip
    """Compare with float64; bfloat16: weights and the result are each rounded once."""
    context = (cache.keys[row], cache.values[row])
    want = by_hand(query, *context, window, sinks)
    bound = torch.full_like(want, 2e-6)
    if query.dtype == BF16:
        spread = by_hand(query, context[0], context[1].abs(), window, sinks)
        bound = 2**-8 * (want.abs() + spread) + 1e-6
    assert got.dtype == query.dtype
    assert bool(((got.double() - want).abs() <= bound).all()), (got.double() - want).abs().max()


@EACH_TRITON
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "dtype", "block_size", "window", "has_sinks", "num_sms"),
    [
        (4, 2, 8, FP32, 1, None, True, 1),
        (6, 2, 32, BF16, 16, 50, False, 132),
        (5, 1, 80, BF16, 37, None, False, 1),
        (5, 1, 80, BF16, 37, None, True, 132),
        (7, 1, 6, FP32, 7, 1, True, 132),
        (16, 1, 96, BF16, 64, 600, True, 1),
        (40, 1, 20, FP32, 16, 200, False, 132),
        (2, 1, 192, BF16, 128, 64, False, 1),
    ],
    ids=str,
)
@pytest.mark.usefixtures("poisoned_empty")
def test_equals_float64(
    multiprocessors: Callable[[int], None],
    name: str,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    block_size: int,
    window: int | None,
    has_sinks: bool,
    num_sms: int,
) -> None:
    multiprocessors(num_sms)
    lengths, chunks = [1, 576, 64, 65, 530], [1, 1, 19, 1, 2]
    cache = cached(lengths, block_size, kv_heads, head_dim, dtype, seed=0)
    queries = [torch.randn(chunk, heads, head_dim).to(dtype) for chunk in chunks]
    sinks = torch.randn(heads) if has_sinks else None
    got = attend(kernels(name), cache, queries, lengths, list(range(5)), window, sinks)
    for row, query in enumerate(queries):
        check(got[row], query, cache, row, window, sinks)


@EACH_TRITON
@pytest.mark.usefixtures("poisoned_empty")
def test_a_key_head_may_have_more_heads_than_a_tile_has_rows(name: str) -> None:
    cache = cached([530, 3], 16, 1, 16, BF16, seed=3)
    queries = [torch.randn(count, 130, 16).bfloat16() for count in (1, 2)]
    got = attend(kernels(name), cache, queries, [530, 3], [0, 1], None)
    for row, query in enumerate(queries):
        check(got[row], query, cache, row, None, None)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "dtype", "window"),
    [
        (6, 2, 32, BF16, None),
        (3, 1, 10, FP32, 600),
        (4, 1, 64, BF16, 70),
        *(
            pytest.param(*shape, marks=pytest.mark.gpu)
            for shape in [
                (32, 4, 128, BF16, None),
                (64, 8, 64, torch.float16, 128),
                (16, 2, 256, BF16, None),
                (16, 16, 80, BF16, None),
                (8, 8, 128, FP32, None),
            ]
        ),
    ],
    ids=str,
)
def test_a_query_does_not_see_the_batch(
    multiprocessors: Callable[[int], None],
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    window: int | None,
) -> None:
    lengths = [1, 90, 1030, 641]
    firsts = [0, 50, 1010, 560]  # queries before them never run
    cache = cached(lengths, 16, kv_heads, head_dim, dtype, seed=1)
    other = cached(lengths, 7, kv_heads, head_dim, dtype, seed=1)  # the same, other blocks
    queries = [
        torch.randn(length - first, heads, head_dim).to(dtype)
        for length, first in zip(lengths, firsts, strict=True)
    ]
    sinks = torch.randn(heads)
    rows = list(range(len(lengths)))
    whole = attend(kernels(EXACT), cache, queries, lengths, rows, window, sinks)
    chance = random.Random(0)
    for turn in range(5):
        multiprocessors([1, 132][turn % 2])
        rows = chance.sample(range(len(lengths)), chance.randint(1, len(lengths)))
        ends = [chance.randint(firsts[row] + 1, lengths[row]) for row in rows]
        starts = [
            max(firsts[row], end - chance.choice([1, 1, 7, 64]))
            for row, end in zip(rows, ends, strict=True)
        ]
        parts = [
            slice(start - firsts[row], end - firsts[row])
            for row, start, end in zip(rows, starts, ends, strict=True)
        ]
        got = attend(
            kernels(EXACT),
            chance.choice([cache, other]),
            [queries[row][part] for row, part in zip(rows, parts, strict=True)],
            ends,
            rows,
            window,
            sinks,
        )
        for out, row, part in zip(got, rows, parts, strict=True):
            assert same_bits(out, whole[row][part]), (turn, row, part)


@EACH_TRITON
def test_the_same_call_gives_the_same_bits(name: str) -> None:
    cache = cached([700, 30], 16, 1, 32, BF16, seed=2)
    queries = [torch.randn(count, 4, 32).bfloat16() for count in (1, 30)]
    runs = [attend(kernels(name), cache, queries, [700, 30], [0, 1], None) for _ in range(2)]
    assert all(same_bits(*pair) for pair in zip(*runs, strict=True))


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
@EACH_TRITON
def test_a_key_that_is_not_seen_may_be_nan(name: str) -> None:
    cache = cached([300], 16, 1, 16, BF16, seed=4)
    query = [torch.randn(1, 4, 16).bfloat16()]
    clean = attend(kernels(name), cache, query, [300], [0], 50)[0]
    for position in (0, 249, 250):
        slot = int(cache.table[0, position // 16]) * 16 + position % 16
        cache.key_cache[:, slot] = cache.value_cache[:, slot] = float("nan")
        spoilt = attend(kernels(name), cache, query, [300], [0], 50)[0]
        if position < 250:
            assert same_bits(spoilt, clean)
        else:
            assert bool(spoilt.isnan().all())


class Decodes:
    """Decodes of a cache whose lengths and blocks change in place, as a CUDA graph has them."""

    def __init__(
        self, implementation: Kernels, cache: Cached, num_seqs: int, max_context: int,
        window: int | None,
    ) -> None:  # fmt: skip
        self._implementation = implementation
        self._cache = cache
        device = implementation.device
        self._caches = [part.to(device) for part in (cache.key_cache, cache.value_cache)]
        self._contexts = torch.zeros(num_seqs, dtype=torch.int32, device=device)
        width = -(-max_context // cache.block_size)
        self._table = torch.zeros(num_seqs, width, dtype=torch.int32, device=device)
        self._plan = decode_plan(self._contexts, self._table, cache.block_size, window, max_context)

    def fill(self, rows: list[int], contexts: list[int]) -> None:
        """Have sequences `rows`, of these lengths, and padding after them.

        Where a table has nothing to say it names a block of NaN.
        """
        poison = self._caches[0].shape[1] // self._cache.block_size - 1
        self._contexts.zero_()
        self._contexts[: len(rows)] = torch.tensor(contexts, dtype=torch.int32)
        self._table.fill_(poison)
        for at, (row, context) in enumerate(zip(rows, contexts, strict=True)):
            used = -(-context // self._cache.block_size)
            self._table[at, :used] = self._cache.table[row, :used]

    def __call__(self, query: Tensor) -> Tensor:
        return self._implementation.paged_attention(
            query, *self._caches, self._plan, query.shape[-1] ** -0.5
        )


def _with_poison(cache: Cached) -> Cached:
    """Add a block of NaN at the end of the caches."""
    nan = torch.full_like(cache.key_cache[:, : cache.block_size], float("nan"))
    return replace(
        cache,
        key_cache=torch.cat([cache.key_cache, nan], 1),
        value_cache=torch.cat([cache.value_cache, nan], 1),
    )


@EACH_TRITON
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("num_multiprocessors", [1, 132])
@pytest.mark.usefixtures("poisoned_empty")
def test_lengths_and_blocks_may_change_under_a_plan(
    multiprocessors: Callable[[int], None], name: str, num_multiprocessors: int, window: int | None
) -> None:
    multiprocessors(num_multiprocessors)
    lengths = [600, 1, 64, 129]
    cache = _with_poison(cached(lengths, 16, 1, 16, BF16, seed=6))
    decodes = Decodes(kernels(name), cache, 5, 1024, window)
    query = torch.randn(5, 3, 16).bfloat16()
    for rows in ([0, 1, 2, 3], [3, 2], []):
        contexts = [lengths[row] for row in rows]
        decodes.fill(rows, contexts)
        got = decodes(query.to(kernels(name).device)).cpu()
        assert not got[len(rows) :].any()
        if not rows:
            continue
        queries = list(torch.split(query[: len(rows)], 1))
        for at, row in enumerate(rows):
            check(got[at : at + 1], queries[at], cache, row, window, None)
        if name == EXACT:
            want = attend(kernels(name), cache, queries, contexts, rows, window)
            assert same_bits(got[: len(rows)], torch.cat(want))


@pytest.mark.gpu
@EACH_TRITON
def test_a_graph_is_replayed_with_other_lengths(name: str) -> None:
    lengths = [3000, 1, 64, 129, 2000]
    cache = _with_poison(cached(lengths, 16, 4, 128, BF16, seed=7))
    decodes = Decodes(kernels(name), cache, 8, 4096, None)
    query = torch.randn(8, 32, 128).bfloat16().cuda()
    decodes.fill([0], [3000])
    decodes(query)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = decodes(query)
    for rows in ([0, 1, 2, 3, 4], [4, 2], [1]):
        decodes.fill(rows, [lengths[row] for row in rows])
        graph.replay()
        assert same_bits(captured.cpu(), decodes(query).cpu())


@EACH_TRITON
def test_nothing_waits_for_the_device(name: str) -> None:
    # imports Triton, which kernels must do first: they say whether it interprets
    from tests.kernels.no_waiting import no_waiting

    implementation = kernels(name)
    device = implementation.device
    cache = cached([600, 5], 16, 1, 16, BF16, seed=8)
    table = cache.table.to(device)
    caches = (cache.key_cache.to(device), cache.value_cache.to(device))
    contexts = torch.tensor([600, 5], dtype=torch.int32, device=device)
    plan = implementation.plan_attention((1, 3), (600, 5), table, 16, None)
    sinks = torch.zeros(2, device=device)
    query = torch.randn(4, 2, 16, device=device).bfloat16()
    decodes = decode_plan(contexts, table, 16, None, 600)
    with no_waiting():
        implementation.paged_attention(query, *caches, plan, 1.0, sinks)
        implementation.paged_attention(query[:2], *caches, decodes, 1.0)


def _part(kind: Kind, lens: list[int], contexts: list[int]) -> Part:
    table = torch.zeros(len(lens), max(contexts), dtype=torch.int32)
    (part,) = attention_plan.plan(tuple(lens), tuple(contexts), table, 1, None).parts
    assert part.kind == kind
    return part


@pytest.mark.parametrize("numerics", ["exact", "fast"])
@pytest.mark.parametrize("window", [None, 1, 100, 513])
@pytest.mark.parametrize("kind", ["decode", "chunk"])
def test_there_is_room_for_all_units(kind: Kind, window: int | None, numerics: Any) -> None:
    chance = random.Random(0)
    for _ in range(200):
        count = chance.randint(1, 9)
        lens = [1 if kind == "decode" else chance.randint(2, 300) for _ in range(count)]
        contexts = [length + chance.choice([0, 1, 700, 5000]) for length in lens]
        shape = Shape(chance.choice([1, 5, 40]), 1, chance.choice([64, 256]), 2)
        part = _part(kind, lens, contexts)
        how = cut(part, shape, window, numerics, chance.choice([1, 132]))
        queries = how.rows // how.heads
        tiles = [-(-length // queries) for length in lens]
        assert sum(tiles) <= how.num_tiles
        units = 0
        for num_tiles, length, context in zip(tiles, lens, contexts, strict=True):
            first = 0 if window is None else max(0, context - length - window + 1)
            splits = (context - 1) // how.split - first // how.split + 1
            assert splits <= how.num_splits
            units += num_tiles * (1 if how.is_whole else splits)
        assert units <= how.num_units


@pytest.mark.parametrize("numerics", ["exact", "fast"])
@pytest.mark.parametrize("kind", ["decode", "chunk"])
def test_parts_take_no_more_than_they_may(kind: Kind, numerics: Any) -> None:
    length, found = 1 if kind == "decode" else 4, []
    for shape in (Shape(32, 4, 128, 2), Shape(16, 16, 128, 2), Shape(128, 8, 256, 2)):
        for count in (1, 8, 60):
            part = _part(kind, [length] * count, [2**16] * count)
            how = cut(part, shape, None, numerics, 132)
            found.append(how.part_bytes(shape.head_dim))
            if numerics == "exact":
                assert how.merged == (SPLIT // 64 if how.is_whole else 0)
    assert max(found) <= PART_BYTES
    assert 0 in found, "some are not cut"
    # of a decode's tile one query: 128 units of 32 heads
    if (kind, numerics) == ("decode", "exact"):
        assert found[0] == 128 * 32 * (128 + 2) * 4


def test_exact_bits_hang_on_the_shape_alone() -> None:
    shape = Shape(32, 4, 128, 2)
    for lens, contexts in (([1], [9000]), ([1] * 300, [700] * 300), ([8000], [8000]), ([9], [9])):
        part = _part("decode" if lens[0] == 1 else "chunk", lens, contexts)
        how = cut(part, shape, None, "exact", 132)
        assert how.split == SPLIT
        assert how.rows % 64 == 0
        assert how.is_whole == (how.num_splits == 1 or sum(lens) >= 300)
        assert (how.merged > 0) == (how.is_whole and how.num_splits > 1)


@pytest.mark.parametrize("numerics", ["exact", "fast"])
@pytest.mark.parametrize(("num_seqs", "context"), [(1, 8192), (8, 2048), (32, 4096), (256, 1024)])
def test_decodes_have_work_for_every_multiprocessor(
    num_seqs: int, context: int, numerics: Any
) -> None:
    part = _part("decode", [1] * num_seqs, [context] * num_seqs)
    how = cut(part, Shape(32, 4, 128, 2), None, numerics, 132)
    assert how.num_units * how.head_tiles >= (64 if num_seqs == 1 else 120)
    assert how.is_whole == (num_seqs == 256)


def test_each_key_is_read_once_where_rows_may_be_chosen() -> None:
    for group in (1, 4, 12, 17, 40):
        how = cut(_part("decode", [1], [5000]), Shape(2 * group, 2, 64, 2), None, "fast", 132)
        assert (how.head_tiles, how.heads) == (2, group)
        assert how.rows == max(16, 1 << (group - 1).bit_length())
