"""Attention over paged keys and values, in plain torch: prompt chunks and decodes in one call.

A query's result must not depend on what else runs, so keys are taken in pieces of 64 that begin at
absolute positions 0, 64, 128 ... whatever the blocks, chunks and windows are. For each piece p, in
float32: scores s, their maximum m_p, e = exp(s - m_p), l_p = sum(e), o_p = e @ values. Then, with
M the largest m_p (and the head's sink, if it has one) and c_p = exp(m_p - M), added up from zero
in the order of p: L = sum c_p l_p (+ exp(sink - M)), O = sum c_p o_p. The result is O / L, rounded
once to the model's dtype. A piece that a query does not see adds exactly zero: it may be left out.
PagedAttention: Kwon et al. 2023 (arXiv 2309.06180).

`plan` works out once a step what to gather; `paged_attention` does it in every layer of the group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

PIECE = 64
# a product of float32 matrices has one order of adding at multiples of 4 (docs/log.md)
_ROW_GRAIN = 4
_TILE_QUERIES = 128
# keys gathered at once; bounds the workspace, not the result
_TILE_PIECES = 1024
# a decode joins a batch whose longest member has at most this many times its pieces
_RAGGED = 1.5
# stands for the maximum of a piece that a query does not see: exp(it - M) is 0, and not NaN
_UNSEEN = -1e30


@dataclass(frozen=True, slots=True)
class Tile:
    """Queries that are computed together: `count` of each of several sequences.

    rows: int64 [num_seqs * count], their tokens in the batch. slots: int64 [num_seqs, num_pieces *
    64], the cache slots of their keys; 0, in the null block, where there is none. is_hidden: bool
    [num_seqs, count, num_pieces * 64], True where a query must not see a key.
    """

    rows: Tensor
    count: int
    slots: Tensor
    is_hidden: Tensor


def plan(
    query_lens: tuple[int, ...],
    context_lens: tuple[int, ...],
    block_table: Tensor,
    block_size: int,
    window: int | None,
) -> list[Tile]:
    """Cut a step's queries into tiles.

    block_table: int [num_seqs, max_blocks] of one cache group; the other arguments as in
    `ForwardBatch` and `CacheGroup`. Returns tiles that cover each token once.
    """
    device = block_table.device
    starts: list[int] = []
    total = 0
    for length in query_lens:
        starts.append(total)
        total += length
    # (sequence, first query's token, its position, count)
    decodes = [
        (seq, starts[seq], context_lens[seq] - 1)
        for seq, length in enumerate(query_lens)
        if length == 1
    ]
    tiles = []
    decodes.sort(key=lambda item: _num_pieces(item[2], 1, window), reverse=True)
    begin = 0
    while begin < len(decodes):
        widest = _num_pieces(decodes[begin][2], 1, window)
        limit = max(1, _TILE_PIECES // widest)
        end = begin + 1
        while (
            end < len(decodes)
            and end - begin < limit
            and widest <= _RAGGED * _num_pieces(decodes[end][2], 1, window)
        ):
            end += 1
        part = decodes[begin:end]
        tiles.append(
            _tile(
                torch.tensor([seq for seq, _, _ in part], device=device),
                torch.tensor([row for _, row, _ in part], device=device),
                torch.tensor([position for _, _, position in part], device=device),
                1,
                widest,
                block_table,
                block_size,
                window,
            )
        )
        begin = end
    for seq, length in enumerate(query_lens):
        if length == 1:
            continue
        first = context_lens[seq] - length
        for offset in range(0, length, _TILE_QUERIES):
            count = min(_TILE_QUERIES, length - offset)
            tiles.append(
                _tile(
                    torch.tensor([seq], device=device),
                    torch.tensor([starts[seq] + offset], device=device),
                    torch.tensor([first + offset], device=device),
                    count,
                    _num_pieces(first + offset, count, window),
                    block_table,
                    block_size,
                    window,
                )
            )
    return tiles


def _first_key(position: int, window: int | None) -> int:
    return 0 if window is None else max(0, position - window + 1)


def _num_pieces(position: int, count: int, window: int | None) -> int:
    """Return how many pieces `count` queries from `position` on see together."""
    return (position + count - 1) // PIECE - _first_key(position, window) // PIECE + 1


def _tile(
    sequences: Tensor,
    rows: Tensor,
    positions: Tensor,
    count: int,
    num_pieces: int,
    block_table: Tensor,
    block_size: int,
    window: int | None,
) -> Tile:
    """Build a tile of `count` queries from each of `positions` on; all tensors int64 [num_seqs]."""
    device = block_table.device
    first = torch.zeros_like(positions)
    if window is not None:
        first = (positions - window + 1).clamp_min(0) // PIECE * PIECE
    keys = first[:, None] + torch.arange(num_pieces * PIECE, device=device)  # [num_seqs, num_keys]
    steps = torch.arange(count, device=device)
    queries = positions[:, None] + steps  # [num_seqs, count]
    is_hidden = keys[:, None, :] > queries[:, :, None]
    if window is not None:
        is_hidden |= keys[:, None, :] <= queries[:, :, None] - window
    blocks = (keys // block_size).clamp_max(block_table.shape[1] - 1)
    slots = block_table[sequences[:, None], blocks].long() * block_size + keys % block_size
    # past the context a block may hold what another request left, even NaN: 0 * NaN is not 0
    slots = torch.where(keys < positions[:, None] + count, slots, 0)
    return Tile((rows[:, None] + steps).flatten(), count, slots, is_hidden)


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    tiles: list[Tile],
    scale: float,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attend from each query to the keys its tile lets it see.

    query: [num_tokens, num_heads, head_dim]; caches: [num_kv_heads, num_slots, head_dim], the first
    block zeros; sinks: float32 [num_heads], a logit in each head's denominator (gpt-oss), or None.
    Returns [num_tokens, num_heads, head_dim] in the query's dtype.
    """
    out = torch.empty_like(query)
    for tile in tiles:
        out[tile.rows] = _attend(query, key_cache, value_cache, tile, scale, sinks).to(query.dtype)
    return out


def _attend(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    tile: Tile,
    scale: float,
    sinks: Tensor | None,
) -> Tensor:
    """Return the result of one tile, float32 [num_seqs * count, num_heads, head_dim]."""
    num_heads, head_dim = query.shape[1:]
    num_kv_heads = key_cache.shape[0]
    group = num_heads // num_kv_heads
    num_seqs, num_keys = tile.slots.shape
    pieces = num_keys // PIECE
    count = tile.count
    num_rows = count * group
    wanted = -(-num_rows // _ROW_GRAIN) * _ROW_GRAIN
    slots = tile.slots.flatten()

    def gather(cache: Tensor) -> Tensor:  # -> [num_kv_heads * num_seqs * pieces, 64, head_dim]
        return cache.index_select(1, slots).float().view(-1, PIECE, head_dim)

    heads = query[tile.rows].view(num_seqs, count, num_kv_heads, group, head_dim)
    rows = torch.zeros(
        num_kv_heads, num_seqs, 1, wanted, head_dim, dtype=torch.float32, device=query.device
    )
    rows[:, :, 0, :num_rows] = heads.permute(2, 0, 1, 3, 4).reshape(
        num_kv_heads, num_seqs, num_rows, head_dim
    )
    rows *= scale
    rows = rows.expand(-1, -1, pieces, -1, -1).reshape(-1, wanted, head_dim)
    scores = torch.bmm(rows, gather(key_cache).transpose(1, 2))
    scores = scores.view(num_kv_heads, num_seqs, pieces, wanted, PIECE)
    # [num_seqs, pieces, count, 1, 64] beside [num_kv_heads, num_seqs, pieces, count, group, 64]
    hidden = tile.is_hidden.view(num_seqs, count, 1, pieces, PIECE).permute(0, 3, 1, 2, 4)
    visible = scores[:, :, :, :num_rows].view(num_kv_heads, num_seqs, pieces, count, group, PIECE)
    visible.masked_fill_(hidden, float("-inf"))
    highest = scores.amax(-1, keepdim=True).clamp_min_(_UNSEEN)  # m_p
    scores -= highest
    weights = scores.exp_()
    sums = weights.sum(-1, keepdim=True)  # l_p
    values = gather(value_cache)
    if head_dim % _ROW_GRAIN:  # or the last columns' bits would show a row's place
        values = F.pad(values, (0, -head_dim % _ROW_GRAIN))
    parts = torch.bmm(weights.view(-1, wanted, PIECE), values)[..., :head_dim]
    parts = parts.view(num_kv_heads, num_seqs, pieces, wanted, head_dim)  # o_p
    top = highest.amax(2, keepdim=True)  # M: [num_kv_heads, num_seqs, 1, wanted, 1]
    sink = None
    if sinks is not None:
        # rows run over (count, group)
        per_row = sinks.view(num_kv_heads, 1, group).expand(-1, count, -1).reshape(num_kv_heads, -1)
        sink = torch.full((num_kv_heads, wanted), _UNSEEN, dtype=torch.float32, device=query.device)
        sink[:, :num_rows] = per_row
        sink = sink.view(num_kv_heads, 1, 1, wanted, 1)
        top = torch.maximum(top, sink)
    factors = torch.exp(highest - top)  # c_p
    numerator = torch.zeros_like(parts[:, :, 0])
    denominator = torch.zeros_like(sums[:, :, 0])
    for piece in range(pieces):
        numerator += factors[:, :, piece] * parts[:, :, piece]
        denominator += factors[:, :, piece] * sums[:, :, piece]
    if sink is not None:
        denominator += torch.exp(sink - top)[:, :, 0]
    result = (numerator / denominator)[:, :, :num_rows]
    result = result.view(num_kv_heads, num_seqs, count, group, head_dim)
    return result.permute(1, 2, 0, 3, 4).reshape(num_seqs * count, num_heads, head_dim)
