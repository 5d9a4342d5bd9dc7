"""Paged attention against float64 over plain keys, and the same bits in any batch."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from moe_serve.kernels.paged_attention import reference
from tests.kernels.row_independence import same_bits


@dataclass
class Cached:
    """Sequences with their keys and values, in order and in a shuffled paged cache."""

    keys: list[Tensor]
    values: list[Tensor]
    key_cache: Tensor
    value_cache: Tensor
    table: Tensor
    block_size: int


def _cached(
    lengths: list[int], block_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype, seed: int
) -> Cached:
    torch.manual_seed(seed)
    keys = [torch.randn(length, kv_heads, head_dim).to(dtype) for length in lengths]
    values = [torch.randn(length, kv_heads, head_dim).to(dtype) for length in lengths]
    width = -(-max(lengths) // block_size)
    num_blocks = sum(-(-length // block_size) for length in lengths)
    ids = (torch.randperm(num_blocks) + 1).tolist()
    shape = (num_blocks + 1, block_size, kv_heads, head_dim)
    # what other requests left: must never show
    key_cache, value_cache = (torch.full(shape, float("nan"), dtype=dtype) for _ in range(2))
    key_cache[0], value_cache[0] = 0, 0
    table = torch.zeros(len(lengths), width, dtype=torch.int32)
    for row, length in enumerate(lengths):
        for index in range(-(-length // block_size)):
            block = ids.pop()
            table[row, index] = block
            part = slice(index * block_size, min((index + 1) * block_size, length))
            key_cache[block, : part.stop - part.start] = keys[row][part]
            value_cache[block, : part.stop - part.start] = values[row][part]
    return Cached(
        keys,
        values,
        key_cache.flatten(0, 1).transpose(0, 1).contiguous(),
        value_cache.flatten(0, 1).transpose(0, 1).contiguous(),
        table,
        block_size,
    )


def _run(
    cached: Cached, queries: list[Tensor], contexts: list[int], rows: list[int],
    window: int | None, sinks: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    """Attend with the last queries of some sequences, each at its context length."""
    lens = tuple(len(query) for query in queries)
    tiles = reference.plan(lens, tuple(contexts), cached.table[rows], cached.block_size, window)
    scale = queries[0].shape[-1] ** -0.5
    out = reference.paged_attention(
        torch.cat(queries), cached.key_cache, cached.value_cache, tiles, scale, sinks
    )
    return list(torch.split(out, list(lens)))


def _by_hand(
    query: Tensor, keys: Tensor, values: Tensor, window: int | None, sinks: Tensor | None
) -> Tensor:
    """The same in float64 over plain keys; query: the last tokens of the context."""
    count, heads, head_dim = query.shape
    length, kv_heads, _ = keys.shape
    keys, values = (t.double().repeat_interleave(heads // kv_heads, dim=1) for t in (keys, values))
    scores = torch.einsum("qhd,khd->hqk", query.double(), keys) * head_dim**-0.5
    at = torch.arange(length - count, length)[:, None]
    seen = torch.arange(length)[None, :]
    hidden = seen > at if window is None else (seen > at) | (seen <= at - window)
    scores = scores.masked_fill(hidden, float("-inf"))
    if sinks is not None:
        sink = sinks.double()[:, None, None].expand(-1, count, -1)
        scores = torch.cat([scores, sink], -1)
    weights = torch.softmax(scores, -1)[..., :length]
    return torch.einsum("hqk,khd->qhd", weights, values)


@pytest.mark.parametrize("block_size", [1, 16, 37, 64])
@pytest.mark.parametrize("window", [None, 1, 50, 64, 200])
@pytest.mark.parametrize("has_sinks", [False, True], ids=["plain", "sinks"])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, 8), (6, 2, 32), (8, 1, 20)])
@pytest.mark.usefixtures("poisoned_empty")
def test_equals_float64(
    block_size: int, window: int | None, has_sinks: bool, heads: int, kv_heads: int, head_dim: int
) -> None:
    lengths = [1, 63, 64, 65, 300, 201]
    chunks = [1, 1, 30, 1, 300, 2]
    cached = _cached(lengths, block_size, kv_heads, head_dim, torch.float32, seed=0)
    queries = [torch.randn(chunk, heads, head_dim) for chunk in chunks]
    sinks = torch.randn(heads) if has_sinks else None
    got = _run(cached, queries, lengths, list(range(6)), window, sinks)
    for row in range(6):
        want = _by_hand(queries[row], cached.keys[row], cached.values[row], window, sinks)
        torch.testing.assert_close(got[row].double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(8, 2, 32), (5, 5, 8), (16, 4, 64), (6, 3, 10), (4, 1, 6)]
)
def test_a_query_does_not_see_the_batch(
    dtype: torch.dtype, window: int | None, heads: int, kv_heads: int, head_dim: int
) -> None:
    lengths = [1, 64, 90, 200, 333, 129, 65, 5]
    cached = _cached(lengths, 16, kv_heads, head_dim, dtype, seed=1)
    other = _cached(lengths, 7, kv_heads, head_dim, dtype, seed=1)  # the same, other blocks
    queries = [torch.randn(length, heads, head_dim).to(dtype) for length in lengths]
    assert same_bits(cached.keys[3], other.keys[3])
    whole = _run(cached, queries, lengths, list(range(8)), window)
    chance = random.Random(0)
    for _ in range(25):
        rows = chance.sample(range(8), chance.randint(1, 8))
        ends = [chance.randint(1, lengths[row]) for row in rows]
        starts = [max(0, end - chance.choice([1, 1, 7, 64, 400])) for end in ends]
        torch.set_num_threads(chance.randint(1, 2))
        part = _run(
            chance.choice([cached, other]),
            [queries[row][start:end] for row, start, end in zip(rows, starts, ends, strict=True)],
            ends,
            rows,
            window,
        )
        for got, row, start, end in zip(part, rows, starts, ends, strict=True):
            assert same_bits(got, whole[row][start:end]), (row, start, end)


def test_one_querys_nan_stays_with_it() -> None:
    cached = _cached([40, 40], 16, 2, 8, torch.float32, seed=2)
    queries = [torch.randn(1, 4, 8) for _ in range(2)]
    clean = _run(cached, queries, [40, 40], [0, 1], None)
    queries[0] = torch.full((1, 4, 8), float("nan"))
    spoilt = _run(cached, queries, [40, 40], [0, 1], None)
    assert bool(spoilt[0].isnan().all())
    assert same_bits(spoilt[1], clean[1])


def test_every_token_is_in_one_tile() -> None:
    query_lens, contexts = (1, 1, 400, 1, 5, 129), (1000, 3, 400, 64, 70, 1000)
    table = torch.zeros(6, 63, dtype=torch.int32)
    for window in (None, 100):
        tiles = reference.plan(query_lens, contexts, table, 16, window)
        rows = torch.cat([tile.rows for tile in tiles])
        assert sorted(rows.tolist()) == list(range(sum(query_lens)))
