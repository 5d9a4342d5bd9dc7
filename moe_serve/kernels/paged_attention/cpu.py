"""Attention over paged keys and values on a CPU: `reference.py`'s functions, in native code.

As there, keys are taken in pieces of 64 that begin at absolute positions 0, 64, 128 ...; here 16
pieces, also aligned, are a span: a query goes through the pieces of a span in order with a running
maximum, then merges its spans in order, then its head's sink. Spans can be shared out to threads,
so that one long context does not wait for one thread; it changes no bit.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe_serve.kernels.native.loader import Native
from moe_serve.kernels.native.pointers import dtype_code, empty

_TILE_QUERIES = 32


class AttentionTile(ctypes.Structure):
    """AttentionTile of native/arguments.h."""

    _fields_ = (
        ("sequence", ctypes.c_int32),
        ("first_row", ctypes.c_int32),
        ("first_position", ctypes.c_int32),
        ("count", ctypes.c_int32),
    )


class AttentionPlan(ctypes.Structure):
    """AttentionPlan of native/arguments.h."""

    _fields_ = (
        ("num_tiles", ctypes.c_int64),
        ("tiles", ctypes.c_void_p),
        ("block_table", ctypes.c_void_p),
        ("table_stride", ctypes.c_int64),
        ("block_size", ctypes.c_int32),
        ("window", ctypes.c_int32),
    )


@dataclass(slots=True, eq=False)
class Plan:
    """A step's queries cut into tiles, for all layers of a cache group.

    arguments: what native code reads, at `address`; it points into tiles, int32 [num_tiles, 4], and
    block_table. workspaces: float32, by (num_heads, num_kv_heads, head_dim), made when first asked
    for: calls of one plan must follow one another.
    """

    arguments: AttentionPlan
    address: int
    tiles: NDArray[np.int32]
    block_table: Tensor
    workspaces: dict[tuple[int, int, int], Tensor] = field(default_factory=dict)


def plan(
    query_lens: tuple[int, ...],
    context_lens: tuple[int, ...],
    block_table: Tensor,
    block_size: int,
    window: int | None,
) -> Plan:
    """Cut a step's queries into tiles, those with most work first; as `reference.plan`."""
    if block_table.dtype != torch.int32 or block_table.stride(-1) != 1:
        block_table = block_table.to(torch.int32).contiguous()
    longest = max(context_lens, default=0)
    assert longest <= block_table.shape[1] * block_size, (longest, block_table.shape, block_size)
    num_seqs = len(query_lens)
    if query_lens.count(1) == num_seqs:
        tiles = _decode_tiles(context_lens)
    else:
        tiles = _tiles(query_lens, context_lens, window)
    arguments = AttentionPlan(
        len(tiles),
        tiles.ctypes.data,
        block_table.data_ptr(),
        block_table.stride(0),
        block_size,
        window or 0,
    )
    return Plan(arguments, ctypes.addressof(arguments), tiles, block_table)


def _decode_tiles(context_lens: tuple[int, ...]) -> NDArray[np.int32]:
    """Make a tile of each sequence's one query: int32 [num_seqs, 4]."""
    num_seqs = len(context_lens)
    tiles = np.ones((num_seqs, 4), dtype=np.int32)
    contexts = np.array(context_lens, dtype=np.int32)
    order = np.argsort(-contexts, kind="stable")
    tiles[:, 0] = tiles[:, 1] = order
    tiles[:, 2] = contexts[order] - 1
    return tiles


def _tiles(
    query_lens: tuple[int, ...], context_lens: tuple[int, ...], window: int | None
) -> NDArray[np.int32]:
    """Make tiles of up to 32 queries: int32 [num_tiles, 4]."""
    lens = np.array(query_lens, dtype=np.int64)
    counts = -(-lens // _TILE_QUERIES)  # tiles of each sequence
    sequence = np.repeat(np.arange(len(lens)), counts)
    first_tile = np.cumsum(counts) - counts
    offset = (np.arange(len(sequence)) - first_tile[sequence]) * _TILE_QUERIES
    tiles = np.empty((len(sequence), 4), dtype=np.int32)
    tiles[:, 0] = sequence
    tiles[:, 1] = (np.cumsum(lens) - lens)[sequence] + offset
    tiles[:, 2] = (np.array(context_lens, dtype=np.int64) - lens)[sequence] + offset
    tiles[:, 3] = np.minimum(lens[sequence] - offset, _TILE_QUERIES)
    seen = tiles[:, 2] + tiles[:, 3]
    if window is not None:
        seen = np.minimum(seen, window + tiles[:, 3])
    return np.ascontiguousarray(tiles[np.argsort(-seen * tiles[:, 3], kind="stable")])


def build(native: Native) -> Callable[..., Tensor]:
    """Return `paged_attention` of an instruction set."""
    workspace_floats = native.function("attention_workspace", "plll", "l")
    run: Callable[..., Any] = native.function("paged_attention", "iipplppllllfppp")

    def paged_attention(
        query: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        plan: Plan,
        scale: float,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """As `reference.paged_attention`; query may have gaps between tokens."""
        num_heads, head_dim = query.shape[1:]
        num_kv_heads = key_cache.shape[0]
        assert query.dtype == key_cache.dtype == value_cache.dtype, (query.dtype, key_cache.dtype)
        if query.stride(2) != 1 or query.stride(1) != head_dim:
            query = query.contiguous()
        strides = (key_cache.stride(0), head_dim, 1)
        if strides[0] % head_dim or {key_cache.stride(), value_cache.stride()} != {strides}:
            key_cache, value_cache = key_cache.contiguous(), value_cache.contiguous()
        if sinks is not None:
            sinks = sinks.to(torch.float32).contiguous()
        shape = (num_heads, num_kv_heads, head_dim)
        workspace = plan.workspaces.get(shape)
        if workspace is None:
            floats = workspace_floats(plan.address, *shape)
            workspace = plan.workspaces[shape] = empty(floats, dtype=torch.float32)
        out = empty(*query.shape, dtype=query.dtype)
        run(
            torch.get_num_threads(),
            dtype_code(query.dtype),
            plan.address,
            query.data_ptr(),
            query.stride(0),
            key_cache.data_ptr(),
            value_cache.data_ptr(),
            key_cache.stride(0) // head_dim,
            *shape,
            scale,
            None if sinks is None else sinks.data_ptr(),
            out.data_ptr(),
            workspace.data_ptr(),
        )
        return out

    return paged_attention
