"""Attention over paged keys and values on a GPU: `reference.py`'s functions, in Triton.

A program holds some queries of a sequence times the heads that share a key head as the rows of a
tile, and goes through the sequence's keys in pieces of 64 that begin at absolute positions 0, 64,
128 ..., in order, with a running maximum (FlashAttention-2: Dao 2023, arXiv 2307.08691). Scores,
softmax and sums are float32; the weights exp(s - m) are rounded to the cache's dtype for their
product with the values, their sum is of what they were before; the result is rounded once.

Keys are also cut into splits, at absolute positions too. A split begins anew, so that different
programs can do the splits of one tile; `_merged` then joins them, in order (flash decoding: Dao et
al. 2023). exact: a split has `SPLIT` keys, whoever does it, and a program that does several merges
them as the second kernel would: one order of operations, so the same bits for a decode and for the
same query in a chunk. What a query does not see is an exact no-op. fast: splits as the batch needs
them, and none for prompt chunks.

Rows of a tile share its keys: where a value that one query sees is not finite, the queries before
it in its chunk may become NaN too. Keys that no query of the tile sees are never read.
"""

from __future__ import annotations

# first, as it says whether Triton interprets, before Triton is imported
from moe_serve.kernels.gpu import triton as gpu

# isort: split
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_serve.kernels.gpu.attention_plan import (
    PIECE,
    Cut,
    Part,
    Plan,
    Shape,
    cut,
    decode_plan,
    plan,
)
from moe_serve.kernels.gpu.numerics import Numerics
from moe_serve.kernels.gpu.triton import product, rounded

__all__ = ["build", "decode_plan", "plan"]

# rows of a tile that a program of the second kernel merges
_JOINED_ROWS = 32
# sequences that the kernels are compiled for at least, so that few numbers of them make a variant
_LEAST_ITEMS = 256
# arguments that differ from step to step: their values and alignments make no variants either
_LOOSE = [
    "items", "contexts", "block_table", "sinks",
    "item_stride", "num_items", "window", "split_keys", "table_stride",
]  # fmt: skip
_PIECE: tl.constexpr = tl.constexpr(PIECE)
# the maximum of no scores: exp2(it - m) is 0, and not NaN
_UNSEEN: tl.constexpr = tl.constexpr(-1e30)
# how far ahead the second kernel reads parts
_AHEAD: tl.constexpr = tl.constexpr(5)


@triton.jit
def _owner(counts, at, index):
    """Return the item that has unit `index`, and which of its units that is.

    counts: int32 [n], the units of each item; at: 0 .. n - 1.
    """
    ends = tl.cumsum(counts, 0)
    item = tl.sum((ends <= index).to(tl.int32), 0)
    before = tl.sum(tl.where(at < item, counts, 0), 0)
    return item, index - before


@triton.jit
def _units(
    items, item_stride, contexts_ptr, num_items, window, split_keys,
    at, QUERIES: tl.constexpr, IN_ORDER: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """Return each item's number of tiles, its first split, and its number of splits: int32."""
    contexts = tl.load(contexts_ptr + at, mask=at < num_items, other=0)
    if IN_ORDER:
        lens = (at < num_items).to(tl.int32)
    else:
        lens = tl.load(items + 2 * item_stride + at, mask=at < num_items, other=0)
    first = tl.zeros_like(lens)
    if HAS_WINDOW:
        first = tl.maximum(contexts - lens - window + 1, 0) // split_keys
    last = tl.maximum(contexts - 1, 0) // split_keys
    return (lens + QUERIES - 1) // QUERIES, first, last - first + 1


@triton.jit
def _merged(highest, total, sums, next_highest, next_total, next_sums):
    """Add the next split's maximum, sum of weights [rows] and sums of values [rows, head_dim]."""
    top = tl.maximum(highest, next_highest)
    old, new = tl.exp2(highest - top), tl.exp2(next_highest - top)
    total = tl.fma(total, old, next_total * new)
    sums = tl.fma(sums, old[:, None], next_sums * new[:, None])
    return top, total, sums


@triton.jit
def _store_result(
    out, sinks, tokens, heads, columns, is_row, highest, total, sums,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HAS_SINKS: tl.constexpr,
):  # fmt: skip
    """Add the heads' sinks, divide, round, write; tokens, heads, is_row: [rows]."""
    if HAS_SINKS:
        sink = tl.load(sinks + heads, mask=is_row, other=0.0) * 1.4426950408889634
        top = tl.maximum(highest, sink)
        shrunk = tl.exp2(highest - top)
        total = tl.fma(total, shrunk, tl.exp2(sink - top))
        sums = sums * shrunk[:, None]
    total = tl.where(total == 0.0, 1.0, total)  # of a row without keys: padding
    result = rounded(sums / total[:, None], out.dtype.element_ty)
    places = (tokens.to(tl.int64) * NUM_HEADS + heads) * HEAD_DIM
    mask = is_row[:, None] & (columns < HEAD_DIM)[None, :]
    tl.store(out + places[:, None] + columns[None, :], result, mask=mask)


@triton.jit(do_not_specialize=_LOOSE, do_not_specialize_on_alignment=_LOOSE)
def _attend(
    out, part_sums, part_stats, query, key_cache, value_cache, sinks,
    items, item_stride, contexts, block_table,
    scale, num_items, window, split_keys, token_stride, head_stride, cache_stride, table_stride,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr, KEPT: tl.constexpr,
    ITEMS: tl.constexpr, IN_ORDER: tl.constexpr, BLOCK_SIZE: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_SINKS: tl.constexpr, IS_WHOLE: tl.constexpr, MERGED: tl.constexpr,
):  # fmt: skip
    """Attend with tiles of ROWS // HEADS queries x HEADS heads.

    IS_WHOLE: a unit of work is a tile, whose result is written; it goes through splits of MERGED
    pieces, or has but one (0). Else a unit is a tile and a split, whose part is written.
    """
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    QUERIES: tl.constexpr = ROWS // HEADS
    HEAD_TILES: tl.constexpr = NUM_KV_HEADS * ((GROUP + HEADS - 1) // HEADS)
    at = tl.arange(0, ITEMS)
    tiles, first_splits, splits = _units(
        items,
        item_stride,
        contexts,
        num_items,
        window,
        split_keys,
        at,
        QUERIES,
        IN_ORDER,
        HAS_WINDOW,
    )
    counts = tiles if IS_WHOLE else tiles * splits
    row = tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    is_column = columns < HEAD_DIM
    for unit in range(tl.program_id(0), tl.sum(counts, 0) * HEAD_TILES, tl.num_programs(0)):
        item, index = _owner(counts, at, unit // HEAD_TILES)
        context = tl.load(contexts + item)
        if IN_ORDER:
            sequence, start, length = item, item, 1
        else:
            sequence = tl.load(items + item)
            start = tl.load(items + item_stride + item)
            length = tl.load(items + 2 * item_stride + item)
        # later queries see more keys: they begin first
        num_tiles = (length + QUERIES - 1) // QUERIES
        num_splits = tl.sum(tl.where(at == item, splits, 0), 0)
        turn = index if IS_WHOLE else index // num_splits
        first_query = (num_tiles - 1 - turn) * QUERIES
        num_queries = tl.minimum(length - first_query, QUERIES)
        position = context - length + first_query
        end_key = position + num_queries
        begin_key = tl.maximum(position - window + 1, 0) if HAS_WINDOW else 0
        begin, end = begin_key // _PIECE, (end_key + _PIECE - 1) // _PIECE
        if not IS_WHOLE:
            split = tl.sum(tl.where(at == item, first_splits, 0), 0) + index % num_splits
            begin = tl.maximum(begin, split * split_keys // _PIECE)
            end = tl.minimum(end, (split + 1) * split_keys // _PIECE)

        head_tile = unit % HEAD_TILES
        kv_head = head_tile // (HEAD_TILES // NUM_KV_HEADS)
        in_group = head_tile % (HEAD_TILES // NUM_KV_HEADS) * HEADS + row % HEADS
        heads = kv_head * GROUP + in_group
        tokens = start + first_query + row // HEADS
        positions = position + row // HEADS
        is_row = (row // HEADS < num_queries) & (in_group < GROUP)
        rows = tl.load(
            query
            + (tokens.to(tl.int64) * token_stride + heads * head_stride)[:, None]
            + columns[None, :],
            mask=is_row[:, None] & is_column[None, :],
            other=0.0,
        )
        cache_offset = tl.cast(kv_head, tl.int64) * cache_stride
        keys_of_head = key_cache + cache_offset
        values_of_head = value_cache + cache_offset
        table = block_table + sequence.to(tl.int64) * table_stride

        highest = tl.full((ROWS,), _UNSEEN, tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        sums = tl.zeros((ROWS, COLUMNS), tl.float32)
        if MERGED:
            whole_highest, whole_total, whole_sums = highest, total, sums
        key = begin * _PIECE + tl.arange(0, _PIECE)
        blocks = tl.load(table + key // BLOCK_SIZE, mask=key < end_key, other=0)
        for piece in range(begin, end):
            key = piece * _PIECE + tl.arange(0, _PIECE)
            is_key = key < end_key
            if HAS_WINDOW:
                is_key = is_key & (key >= begin_key)
            slots = blocks.to(tl.int64) * BLOCK_SIZE + key % BLOCK_SIZE
            later = key + _PIECE
            blocks = tl.load(table + later // BLOCK_SIZE, mask=later < end_key, other=0)
            places = (slots * HEAD_DIM)[:, None] + columns[None, :]
            mask = is_key[:, None] & is_column[None, :]
            keys = tl.load(keys_of_head + places, mask=mask, other=0.0)
            values = tl.load(values_of_head + places, mask=mask, other=0.0)
            scores = product(rows, tl.trans(keys), tl.zeros((ROWS, _PIECE), tl.float32))
            is_edge = (piece + 1) * _PIECE > position + 1
            if HAS_WINDOW:
                is_edge = is_edge | (piece * _PIECE <= end_key - 1 - window)
            if is_edge:
                is_seen = key[None, :] <= positions[:, None]
                if HAS_WINDOW:
                    is_seen = is_seen & (key[None, :] > positions[:, None] - window)
                scores = tl.where(is_seen, scores, float("-inf"))
            if MERGED:
                is_new_split = piece % MERGED == 0
                if is_new_split:
                    whole_highest, whole_total, whole_sums = _merged(
                        whole_highest, whole_total, whole_sums, highest, total, sums
                    )
                    highest = tl.full((ROWS,), _UNSEEN, tl.float32)
                    total = tl.zeros((ROWS,), tl.float32)
                    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
            top = tl.maximum(highest, tl.max(scores, 1) * scale)
            weights = tl.exp2(tl.fma(scores, scale, -top[:, None]))
            shrunk = tl.exp2(highest - top)
            total = tl.fma(total, shrunk, tl.sum(weights, 1))
            sums = product(rounded(weights, values.dtype), values, sums * shrunk[:, None])
            highest = top
        if MERGED:
            highest, total, sums = _merged(
                whole_highest, whole_total, whole_sums, highest, total, sums
            )
        if IS_WHOLE:
            _store_result(
                out, sinks, tokens, heads, columns, is_row, highest, total, sums,
                NUM_HEADS, HEAD_DIM, HAS_SINKS,
            )  # fmt: skip
        else:
            part = tl.cast(unit, tl.int64) * KEPT
            is_kept = row < KEPT
            tl.store(part_stats + part * 2 + row, highest, mask=is_kept)
            tl.store(part_stats + part * 2 + KEPT + row, total, mask=is_kept)
            tl.store(
                part_sums + (part + row)[:, None] * HEAD_DIM + columns[None, :],
                sums,
                mask=is_kept[:, None] & is_column[None, :],
            )


@triton.jit(do_not_specialize=_LOOSE, do_not_specialize_on_alignment=_LOOSE)
def _join(
    out, part_sums, part_stats, sinks,
    items, item_stride, contexts, num_items, window, split_keys,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr, KEPT: tl.constexpr,
    ITEMS: tl.constexpr, IN_ORDER: tl.constexpr, JOINED: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):  # fmt: skip
    """Merge the parts of JOINED rows of a tile that `_attend` left, in order."""
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    QUERIES: tl.constexpr = ROWS // HEADS
    HEAD_TILES: tl.constexpr = NUM_KV_HEADS * ((GROUP + HEADS - 1) // HEADS)
    ROW_BLOCKS: tl.constexpr = (KEPT + JOINED - 1) // JOINED
    at = tl.arange(0, ITEMS)
    tiles, _, splits = _units(
        items,
        item_stride,
        contexts,
        num_items,
        window,
        split_keys,
        at,
        QUERIES,
        IN_ORDER,
        HAS_WINDOW,
    )
    tile = tl.program_id(0) // (HEAD_TILES * ROW_BLOCKS)
    if tile >= tl.sum(tiles, 0):
        return
    head_tile = tl.program_id(0) // ROW_BLOCKS % HEAD_TILES
    item, turn = _owner(tiles, at, tile)
    num_splits = tl.sum(tl.where(at == item, splits, 0), 0)
    first_unit = tl.sum(tl.where(at < item, tiles * splits, 0), 0) + turn * num_splits
    if IN_ORDER:
        start, length = item, 1
    else:
        start = tl.load(items + item_stride + item)
        length = tl.load(items + 2 * item_stride + item)
    first_query = ((length + QUERIES - 1) // QUERIES - 1 - turn) * QUERIES

    row = tl.program_id(0) % ROW_BLOCKS * JOINED + tl.arange(0, JOINED)
    columns = tl.arange(0, COLUMNS)
    in_group = head_tile % (HEAD_TILES // NUM_KV_HEADS) * HEADS + row % HEADS
    heads = head_tile // (HEAD_TILES // NUM_KV_HEADS) * GROUP + in_group
    tokens = start + first_query + row // HEADS
    is_row = (row < KEPT) & (first_query + row // HEADS < length) & (in_group < GROUP)
    highest = tl.full((JOINED,), _UNSEEN, tl.float32)
    total = tl.zeros((JOINED,), tl.float32)
    sums = tl.zeros((JOINED, COLUMNS), tl.float32)
    mask = is_row[:, None] & (columns < HEAD_DIM)[None, :]
    for split in tl.range(0, num_splits, num_stages=_AHEAD):
        unit = tl.cast(first_unit + split, tl.int64) * HEAD_TILES + head_tile
        stats = part_stats + unit * (2 * KEPT) + row
        places = (unit * KEPT + row)[:, None] * HEAD_DIM + columns[None, :]
        highest, total, sums = _merged(
            highest,
            total,
            sums,
            tl.load(stats, mask=is_row, other=_UNSEEN),
            tl.load(stats + KEPT, mask=is_row, other=0.0),
            tl.load(part_sums + places, mask=mask, other=0.0),
        )
    _store_result(
        out, sinks, tokens, heads, columns, is_row, highest, total, sums,
        NUM_HEADS, HEAD_DIM, HAS_SINKS,
    )  # fmt: skip


@functools.cache
def _num_multiprocessors(device: torch.device) -> int:
    if gpu.IS_INTERPRETED:
        return 132
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def build(numerics: Numerics) -> Callable[..., Tensor]:
    """Return `paged_attention` of these numerics."""

    def paged_attention(
        query: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        plan: Plan,
        scale: float,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """As `reference.paged_attention`; query may have gaps between tokens and heads."""
        assert query.dtype == key_cache.dtype == value_cache.dtype, (query.dtype, key_cache.dtype)
        assert scale > 0, scale
        _, num_heads, head_dim = query.shape
        if query.stride(2) != 1:
            query = query.contiguous()
        strides = (key_cache.stride(0), head_dim, 1)
        if {key_cache.stride(), value_cache.stride()} != {strides}:
            key_cache, value_cache = key_cache.contiguous(), value_cache.contiguous()
        if sinks is not None:
            sinks = sinks.to(torch.float32).contiguous()
        shape = Shape(num_heads, key_cache.shape[0], head_dim, query.dtype.itemsize)
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        for part in plan.parts:
            how = cut(part, shape, plan.window, numerics, _num_multiprocessors(query.device))
            _run(how, part, shape, plan, query, key_cache, value_cache, scale, sinks, out)
        return out

    return paged_attention


def _run(
    how: Cut, part: Part, shape: Shape, plan: Plan,
    query: Tensor, key_cache: Tensor, value_cache: Tensor, scale: float, sinks: Tensor | None,
    out: Tensor,
) -> None:  # fmt: skip
    """Write the results of a part's queries into `out`."""
    num_programs = how.num_units * how.head_tiles
    sums, stats = out, out  # of which neither is used
    if not how.is_whole:
        num_rows = num_programs * how.kept_rows
        sums = torch.empty(num_rows, shape.head_dim, dtype=torch.float32, device=out.device)
        stats = torch.empty(2, num_rows, dtype=torch.float32, device=out.device)
        # bounds may be far off: programs take one unit after another
        at_once = _num_multiprocessors(out.device) * how.tiles.programs
        num_programs = min(num_programs, at_once)
    common: dict[str, Any] = {
        "sinks": out if sinks is None else sinks,
        "items": part.contexts if part.items is None else part.items,
        "item_stride": 0 if part.items is None else part.items.stride(0),
        "contexts": part.contexts,
        "num_items": len(part.contexts),
        "window": plan.window or 0,
        "split_keys": how.split,
        "NUM_HEADS": shape.num_heads,
        "NUM_KV_HEADS": shape.num_kv_heads,
        "HEAD_DIM": shape.head_dim,
        "COLUMNS": how.columns,
        "ROWS": how.rows,
        "HEADS": how.heads,
        "KEPT": how.kept_rows,
        "ITEMS": max(_LEAST_ITEMS, triton.next_power_of_2(len(part.contexts))),
        "IN_ORDER": part.items is None,
        "HAS_WINDOW": plan.window is not None,
        "HAS_SINKS": sinks is not None,
        # what is fused is written down: what a compiler chose to could differ between kernels
        "enable_fp_fusion": False,
    }
    _attend[(num_programs,)](
        out,
        sums,
        stats,
        query,
        key_cache,
        value_cache,
        block_table=plan.block_table,
        scale=scale * math.log2(math.e),
        token_stride=query.stride(0),
        head_stride=query.stride(1),
        cache_stride=key_cache.stride(0),
        table_stride=plan.block_table.stride(0),
        BLOCK_SIZE=plan.block_size,
        IS_WHOLE=how.is_whole,
        MERGED=how.merged,
        num_warps=how.tiles.warps,
        num_stages=how.tiles.stages,
        **common,
    )
    if not how.is_whole:
        joined = min(_JOINED_ROWS, triton.next_power_of_2(how.kept_rows))
        num_joins = how.num_tiles * how.head_tiles * -(-how.kept_rows // joined)
        _join[(num_joins,)](out, sums, stats, JOINED=joined, num_warps=4, **common)
