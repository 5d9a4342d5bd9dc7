"""Sequences in a shuffled paged cache, and attention over them, by a kernel and by hand."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_serve.kernels.suite import Kernels


@dataclass
class Cached:
    """Sequences with their keys and values, in order and in a shuffled paged cache."""

    keys: list[Tensor]
    values: list[Tensor]
    key_cache: Tensor
    value_cache: Tensor
    table: Tensor
    block_size: int


def cached(
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


def attend(
    implementation: Kernels, cache: Cached, queries: list[Tensor], contexts: list[int],
    rows: list[int], window: int | None, sinks: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    """Attend with the last queries of some sequences, each at its context length."""
    device = implementation.device
    lens = tuple(len(query) for query in queries)
    table = cache.table[rows].to(device)
    plan = implementation.plan_attention(lens, tuple(contexts), table, cache.block_size, window)
    out = implementation.paged_attention(
        torch.cat(queries).to(device),
        cache.key_cache.to(device),
        cache.value_cache.to(device),
        plan,
        queries[0].shape[-1] ** -0.5,
        None if sinks is None else sinks.to(device),
    )
    return list(torch.split(out.cpu(), list(lens)))


def by_hand(
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
