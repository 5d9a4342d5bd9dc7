"""From projection to cache on a GPU, in one kernel; rounding points as in reference.py.

A program has some heads of one token, whether they are queries, keys or values; where a norm goes
over all heads at once it has all queries, all keys or all values.
"""

from __future__ import annotations

# first, as it says whether Triton interprets, before Triton is imported
from moe_serve.kernels.gpu.triton import aligned, rounded, widened

# isort: split
from dataclasses import replace

import triton
import triton.language as tl
from torch import Tensor

from moe_serve.kernels.gpu.row_tiles import ROPE, Tiles, power_of_two, whole_rows
from moe_serve.kernels.rope.base import Heads

# a norm over all heads
_MAX_WARPS = 16
_ELEMENTS_OF_WARP = 256


@triton.jit
def _bounded(values, limit):
    """Bound float32 values; a NaN stays one."""
    return tl.where(values > limit, limit, tl.where(values < -limit, -limit, values))


@triton.jit
def _scaled(values, root, weight, dtype: tl.constexpr):
    normed = widened(rounded(values * root, dtype))
    return widened(rounded(normed * weight, dtype))


@triton.jit
def _norm_weight(query_norm, key_norm, at, is_query, is_key):
    of_query = tl.load(query_norm + at, mask=is_query, other=0.0)
    of_key = tl.load(key_norm + at, mask=is_key, other=0.0)
    return widened(tl.where(is_query, of_query, of_key))


@triton.jit
def _store_head(query, key, value, left, right, is_query, is_key, is_value, HALF: tl.constexpr):
    tl.store(query, left, mask=is_query)
    tl.store(query + HALF, right, mask=is_query)
    tl.store(key, left, mask=is_key)
    tl.store(key + HALF, right, mask=is_key)
    tl.store(value, left, mask=is_value)
    tl.store(value + HALF, right, mask=is_value)


@triton.jit
def _rope_write_kv(
    qkv, query_norm, key_norm, cos, sin, positions, slots, key_cache, value_cache,
    key_head_stride, key_slot_stride, value_head_stride, value_slot_stride, eps,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    IS_NORM_FULL: tl.constexpr, CLIP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Do the token and the heads of a program. In qkv queries are followed by keys and values."""
    dtype: tl.constexpr = qkv.dtype.element_ty
    HALF: tl.constexpr = HEAD_DIM // 2
    FIRST_VALUE: tl.constexpr = NUM_HEADS + NUM_KV_HEADS
    ALL_HEADS: tl.constexpr = FIRST_VALUE + NUM_KV_HEADS
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    if IS_NORM_FULL:
        first = tl.where(part == 0, 0, NUM_HEADS + (part - 1) * NUM_KV_HEADS)
        count = tl.where(part == 0, NUM_HEADS, NUM_KV_HEADS)
    else:
        first = part * ROWS
        count = tl.minimum(ALL_HEADS - first, ROWS)

    index = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    head = first + index
    is_there = (index < count) & (column < HALF)
    is_query = is_there & (head < NUM_HEADS)
    is_key = is_there & (head >= NUM_HEADS) & (head < FIRST_VALUE)
    is_value = is_there & (head >= FIRST_VALUE)

    row = qkv + token * (ALL_HEADS * HEAD_DIM) + head * HEAD_DIM + column
    left = widened(tl.load(row, mask=is_there, other=0.0))
    right = widened(tl.load(row + HALF, mask=is_there, other=0.0))
    slot = tl.load(slots + token)
    angle = tl.load(positions + token) * HALF + column
    is_angle = column < HALF
    cosine = tl.load(cos + angle, mask=is_angle, other=0.0)
    sine = tl.load(sin + angle, mask=is_angle, other=0.0)

    if CLIP is not None:
        limit = widened(rounded(tl.full([1, 1], CLIP, tl.float32), dtype))
    if CLIP is not None and not IS_NORM_FULL:
        left = _bounded(left, limit)
        right = _bounded(right, limit)
    value_left = left
    value_right = right
    if query_norm is not None:
        squares = tl.sum(left * left + right * right, 1)
        if IS_NORM_FULL:
            root = tl.rsqrt(tl.sum(squares, 0) / (count * HEAD_DIM) + eps)
            at = index * HEAD_DIM + column
        else:
            root = tl.rsqrt(squares / HEAD_DIM + eps)[:, None]
            at = index * 0 + column
        left_weight = _norm_weight(query_norm, key_norm, at, is_query, is_key)
        right_weight = _norm_weight(query_norm, key_norm, at + HALF, is_query, is_key)
        left = _scaled(left, root, left_weight, dtype)
        right = _scaled(right, root, right_weight, dtype)
    if CLIP is not None and IS_NORM_FULL:
        left = _bounded(left, limit)
        right = _bounded(right, limit)
        value_left = _bounded(value_left, limit)
        value_right = _bounded(value_right, limit)

    turned_left = left * cosine - right * sine
    turned_right = right * cosine + left * sine
    is_kept = head >= FIRST_VALUE
    new_left = rounded(tl.where(is_kept, value_left, turned_left), dtype)
    new_right = rounded(tl.where(is_kept, value_right, turned_right), dtype)
    wide_head = head.to(tl.int64)
    key = key_cache + (wide_head - NUM_HEADS) * key_head_stride + slot * key_slot_stride
    value = value_cache + (wide_head - FIRST_VALUE) * value_head_stride + slot * value_slot_stride
    is_written = slot >= 0
    _store_head(
        row, key + column, value + column, new_left, new_right,
        is_query, is_key & is_written, is_value & is_written, HALF,
    )  # fmt: skip


def rope_write_kv(
    qkv: Tensor,
    heads: Heads,
    positions: Tensor,
    slots: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
) -> Tensor:
    """Do what reference.py's `rope_write_kv` does, in one kernel; queries are a view of qkv.

    A negative slot is for a row that pads a captured graph: its key and value go nowhere. No other
    slot may be there twice.
    """
    num_tokens, width = qkv.shape
    assert width == heads.qkv_width, (width, heads.qkv_width)
    assert (heads.query_norm is None) == (heads.key_norm is None), "both are normed, or none"
    assert key_cache.stride(2) == value_cache.stride(2) == 1, "a head's vector lies in one piece"
    qkv = aligned(qkv)
    is_norm_full = heads.is_norm_full and heads.query_norm is not None
    tiles = _tiles(heads, is_norm_full)
    num_parts = 3 if is_norm_full else triton.cdiv(width // heads.head_dim, tiles.rows)
    if num_tokens:
        _rope_write_kv[(num_tokens, num_parts)](
            qkv,
            None if heads.query_norm is None else aligned(heads.query_norm),
            None if heads.key_norm is None else aligned(heads.key_norm),
            heads.cos, heads.sin, positions.contiguous(), slots.contiguous(),
            key_cache, value_cache,
            key_cache.stride(0), key_cache.stride(1), value_cache.stride(0), value_cache.stride(1),
            heads.norm_eps,
            NUM_HEADS=heads.num_heads, NUM_KV_HEADS=heads.num_kv_heads, HEAD_DIM=heads.head_dim,
            IS_NORM_FULL=is_norm_full, CLIP=heads.clip,
            ROWS=tiles.rows, COLUMNS=tiles.columns, num_warps=tiles.warps,
        )  # fmt: skip
    query = qkv[:, : heads.num_heads * heads.head_dim]
    return query.view(num_tokens, heads.num_heads, heads.head_dim)


def _tiles(heads: Heads, is_norm_full: bool) -> Tiles:
    tiles = whole_rows(ROPE, heads.head_dim // 2)
    if not is_norm_full:
        return tiles
    rows = power_of_two(max(heads.num_heads, heads.num_kv_heads))
    warps = 2 * rows * tiles.columns // _ELEMENTS_OF_WARP
    return replace(tiles, rows=rows, warps=min(_MAX_WARPS, max(tiles.warps, warps)))
