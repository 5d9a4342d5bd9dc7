"""What the GPU's attention is asked for in a step, and how it is cut: plain data, for Hopper.

A tile is some queries of a sequence times the query heads that share a key head. A unit of work is
a tile, or a tile and one of the splits of its keys; units are counted on the device, where the
lengths are, the host only bounds them: nothing waits, and a CUDA graph may be replayed.

Sizes chosen by reasoning for multiprocessors of 227 KB of shared memory and 65,536 registers: a
decode is bound by the bytes of keys and values in flight (128 KB or more on each multiprocessor), a
prompt chunk by the matrix units, which 128 rows feed from the cache.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from moe_serve.kernels.gpu.numerics import Numerics

PIECE = 64
# keys in a split, where bits must not depend on who does it
SPLIT = 512
Kind = Literal["decode", "chunk"]


@dataclass(frozen=True, slots=True)
class Tiles:
    """How a kernel is built.

    rows: of a tile, queries x heads; warps: of a program; stages: pieces of 64 keys in shared
    memory at once; programs: that fit on a multiprocessor at once.
    """

    rows: int
    warps: int
    stages: int
    programs: int


_LARGE = {128: Tiles(128, 8, 3, 1), 256: Tiles(128, 8, 2, 1)}
# without matrix units, and sums over a layout that must be one in all kinds
_FLOAT32 = {128: Tiles(32, 4, 2, 2), 256: Tiles(32, 4, 2, 1)}
# by kind, numerics and bytes of an element, then by the widest head_dim
_TILES: dict[tuple[Kind, Numerics, int], dict[int, Tiles]] = {
    ("decode", "exact", 2): {
        64: Tiles(64, 4, 3, 3),
        128: Tiles(64, 4, 3, 2),
        256: Tiles(64, 4, 3, 1),
    },
    ("decode", "fast", 2): {
        64: Tiles(16, 4, 3, 4),
        128: Tiles(16, 4, 3, 3),
        256: Tiles(16, 4, 2, 2),
    },
    ("chunk", "exact", 2): _LARGE,
    ("chunk", "fast", 2): _LARGE,
    ("decode", "exact", 4): _FLOAT32,
    ("decode", "fast", 4): _FLOAT32,
    ("chunk", "exact", 4): _FLOAT32,
    ("chunk", "fast", 4): _FLOAT32,
}
# fast: a tile has all heads of a group, so that keys are read once, up to so many rows
_MOST_FAST_ROWS = 64
# fast: the fewest and the most keys of a split
_FAST_SPLIT = (256, 1024)
# contexts up to this are not split where there are tiles enough for all multiprocessors
_WHOLE_CONTEXT = 4096
# what the parts of one kernel's tiles may take, at most; beyond, they are not split
PART_BYTES = 128 << 20


@dataclass(frozen=True, slots=True)
class Shape:
    """The shape of attention: query heads, key heads, their width, the bytes of an element."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    itemsize: int


@dataclass(frozen=True, slots=True)
class Part:
    """Sequences whose queries one kernel takes: decodes, or prompt chunks.

    items: int32 [3, num_items], on the device: of each its row of the block table, its first token
    in the batch, and how many queries it has; None: item i is token i alone, of sequence i.
    contexts: int32 [num_items], keys, those of the queries too. The rest bounds them, on the host:
    the sums of queries and keys, and the most of one item.
    """

    kind: Kind
    items: Tensor | None
    contexts: Tensor
    num_tokens: int
    num_keys: int
    max_len: int
    max_context: int


@dataclass(frozen=True, slots=True)
class Plan:
    """A step's queries, for all layers of a cache group; block_table: int32 [num_seqs, blocks]."""

    parts: tuple[Part, ...]
    block_table: Tensor
    block_size: int
    window: int | None


def plan(
    query_lens: tuple[int, ...],
    context_lens: tuple[int, ...],
    block_table: Tensor,
    block_size: int,
    window: int | None,
) -> Plan:
    """Part decodes from prompt chunks, these longest first; arguments as of `reference.plan`.

    Copies to the device once, without waiting for it.
    """
    longest = max(context_lens, default=0)
    assert longest <= block_table.shape[1] * block_size, (longest, block_table.shape, block_size)
    lens = np.array(query_lens, dtype=np.int32)
    contexts = np.array(context_lens, dtype=np.int32)
    starts = np.cumsum(lens, dtype=np.int32) - lens
    order = np.lexsort((np.where(lens == 1, 0, -contexts), lens != 1))
    items = np.stack([order.astype(np.int32), starts[order], lens[order], contexts[order]])
    packed = torch.from_numpy(items)
    if block_table.is_cuda:
        packed = packed.pin_memory()
    packed = packed.to(block_table.device, non_blocking=True)
    num_decodes = query_lens.count(1)
    bounds: tuple[tuple[Kind, slice], ...] = (
        ("decode", slice(0, num_decodes)),
        ("chunk", slice(num_decodes, len(lens))),
    )
    in_order = query_lens[:num_decodes].count(1) == num_decodes  # as in every `ForwardBatch`
    parts = tuple(
        Part(
            kind,
            None if kind == "decode" and in_order else packed[:3, of_kind],
            packed[3, of_kind],
            num_tokens=int(items[2, of_kind].sum(dtype=np.int64)),
            num_keys=int(items[3, of_kind].sum(dtype=np.int64)),
            max_len=int(items[2, of_kind].max()),
            max_context=int(items[3, of_kind].max()),
        )
        for kind, of_kind in bounds
        if of_kind.start < of_kind.stop
    )
    return Plan(parts, _as_int32(block_table), block_size, window)


def decode_plan(
    context_lens: Tensor, block_table: Tensor, block_size: int, window: int | None, max_context: int
) -> Plan:
    """Plan one query of each sequence, whose lengths the host need not know.

    context_lens: int32 [num_seqs] on the device, each at most max_context. That and num_seqs alone
    decide what is launched: a captured CUDA graph may be replayed with other lengths and blocks in
    the same memory. Of a row of padding, context 0, nothing is read and the result is zeros.
    """
    assert context_lens.dtype == torch.int32, context_lens.dtype
    assert context_lens.is_contiguous(), context_lens.stride()
    assert max_context <= block_table.shape[1] * block_size, (max_context, block_table.shape)
    num_seqs = context_lens.shape[0]
    decodes = Part(
        "decode",
        None,
        context_lens,
        num_tokens=num_seqs,
        num_keys=num_seqs * max_context,
        max_len=1,
        max_context=max_context,
    )
    return Plan((decodes,) if num_seqs else (), _as_int32(block_table), block_size, window)


def _as_int32(block_table: Tensor) -> Tensor:
    if block_table.dtype != torch.int32 or block_table.stride(-1) != 1:
        return block_table.to(torch.int32).contiguous()
    return block_table


@dataclass(frozen=True, slots=True)
class Cut:
    """How a part is computed.

    rows: of a tile; heads: that it has of a key head's group; columns: head_dim, padded;
    head_tiles: tiles of the same queries. num_tiles, num_splits, num_units: the most there may be,
    units and tiles of one of these head tiles. split: in keys. is_whole: a unit is a tile, whose
    splits of `merged` pieces its program merges; 0: which is not split. kept_rows: of a tile, its
    first, that may be a query's; of the others no part is kept.
    """

    tiles: Tiles
    rows: int
    kept_rows: int
    heads: int
    columns: int
    head_tiles: int
    num_tiles: int
    split: int
    num_splits: int
    num_units: int
    is_whole: bool
    merged: int

    def part_bytes(self, head_dim: int) -> int:
        """Return what the parts of split tiles take: sums of values, a maximum and a sum."""
        if self.is_whole:
            return 0
        return self.num_units * self.head_tiles * self.kept_rows * (head_dim + 2) * 4


def cut(
    part: Part, shape: Shape, window: int | None, numerics: Numerics, num_multiprocessors: int
) -> Cut:
    """Decide how a part is computed; where exact, what bits depend on is fixed by the shape."""
    columns = max(16, 1 << (shape.head_dim - 1).bit_length())
    by_width = _TILES[part.kind, numerics, shape.itemsize]
    tiles = by_width[min((width for width in by_width if columns <= width), default=max(by_width))]
    group = shape.num_heads // shape.num_kv_heads
    rows = tiles.rows
    if numerics == "fast":
        rows = max(rows, min(1 << (group - 1).bit_length(), _MOST_FAST_ROWS))
    heads = min(group, rows)
    head_tiles = shape.num_kv_heads * -(-group // heads)
    num_tiles = len(part.contexts)
    if part.kind == "chunk":
        num_tiles += part.num_tokens // (rows // heads)
    at_once = num_multiprocessors * tiles.programs
    split = SPLIT
    if numerics == "fast":
        even = num_tiles * head_tiles * part.max_context // (2 * at_once)
        split = -(-min(max(even, _FAST_SPLIT[0]), _FAST_SPLIT[1]) // PIECE) * PIECE
    num_splits = -(-part.max_context // split)
    if window is not None:
        num_splits = min(num_splits, (window + part.max_len - 2) // split + 2)
    num_units = num_tiles * num_splits
    if part.kind == "decode":
        num_units = min(num_units, num_tiles + part.num_keys // split)
        is_whole = num_tiles * head_tiles >= 2 * at_once and part.max_context <= _WHOLE_CONTEXT
    else:
        is_whole = 2 * num_tiles * head_tiles > at_once
    # of a decode one query, of its tile's queries
    kept_rows = heads if part.kind == "decode" else rows // heads * heads
    how = Cut(
        tiles=tiles,
        rows=rows,
        kept_rows=kept_rows,
        heads=heads,
        columns=columns,
        head_tiles=head_tiles,
        num_tiles=num_tiles,
        split=split,
        num_splits=num_splits,
        num_units=num_units,
        is_whole=is_whole or num_splits == 1,
        merged=0,
    )
    if not how.is_whole and how.part_bytes(shape.head_dim) <= PART_BYTES:
        return how
    merged = SPLIT // PIECE if num_splits > 1 and numerics == "exact" else 0
    return replace(how, num_units=num_tiles, is_whole=True, merged=merged)
