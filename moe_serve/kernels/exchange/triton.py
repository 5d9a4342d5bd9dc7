"""Rows to and from the form in which they travel, on a GPU; integers and bytes as in reference.py.

A program looks at the choices of some tokens, or the names of some rows, that are of one rank or
one expert, and finds their places by counting those before it; bytes are moved by programs of their
own. Nothing here waits for the device: where only it knows how many there are, `unpack_rows` gives
the most that there may be, and what is none has place -1, which `scatter_rows` passes over. Nor can
anything be refused: a name that is no expert is none, and a place outside is passed over.

Rows are moved in units of 2 bytes: one with an odd number of names begins at no multiple of 4.
"""

from __future__ import annotations

# first, as it says whether Triton interprets, before Triton is imported
import moe_serve.kernels.gpu.triton  # noqa: F401

# isort: split
import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_serve.kernels.exchange.base import NAME, Packed, Replicas, RowPlan, Unpacked, row_bytes
from moe_serve.kernels.gpu.row_tiles import CHOICES, MOVE, Tiles, pieces, power_of_two, whole_rows

_BLOCK: tl.constexpr = tl.constexpr(1024)  # counts of earlier programs that are added up at once
_LEAST_CHUNKS = 128


@triton.jit
def _chosen(
    expert_ids, ranks, counts, most, token, is_token, TOP_K: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Return expert and rank of each choice of some tokens, [tokens, WIDTH]; -1 where is none."""
    choice = tl.arange(0, WIDTH)[None, :]
    is_there = is_token[:, None] & (choice < TOP_K)
    at = token.to(tl.int64)[:, None] * TOP_K + choice
    expert = tl.load(expert_ids + at, mask=is_there, other=0)
    turn = token[:, None] % tl.load(counts + expert, mask=is_there, other=1)
    rank = tl.load(ranks + expert * most + turn, mask=is_there, other=-1)
    return expert.to(tl.int32), rank.to(tl.int32)


@triton.jit(do_not_specialize=["most", "num_tokens", "num_chunks"])
def _count_choices(
    expert_ids, ranks, counts, most, found, num_tokens, num_chunks,
    TOP_K: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Count a chunk's pairs, and rows, of one rank: found, int32 [2, num_ranks, num_chunks]."""
    rank, chunk = tl.program_id(0), tl.program_id(1)
    token = chunk * TOKENS + tl.arange(0, TOKENS)
    _, chosen = _chosen(
        expert_ids, ranks, counts, most, token, token < num_tokens, TOP_K, WIDTH
    )  # fmt: skip
    num_mine = tl.sum((chosen == rank).to(tl.int32), 1)
    at = found + rank * num_chunks + chunk
    tl.store(at, tl.sum(num_mine, 0))
    tl.store(at + tl.num_programs(0) * num_chunks, tl.sum((num_mine > 0).to(tl.int32), 0))


@triton.jit(do_not_specialize=["most", "num_tokens", "num_chunks", "capacity", "rounds"])
def _place_choices(
    expert_ids, ranks, counts, most, found, out, places, rows, of_ranks, num_tokens, num_chunks,
    capacity, rounds, width,
    TOP_K: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr,
    ROW: tl.constexpr, SIZE: tl.constexpr, HAS_SLOTS: tl.constexpr, HAS_WIDTH: tl.constexpr,
    IS_COUNTED: tl.constexpr,
):  # fmt: skip
    """Place a chunk's pairs of one rank, write their rows' names, and say where rows are.

    rows: int32 [num_tokens, TOP_K], the row that a choice's token has at its rank, if it is the
    token's first choice there, else -1. of_ranks: int64 [2, num_ranks], rows and pairs of each.
    """
    rank, chunk, num_ranks = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    token = chunk * TOKENS + tl.arange(0, TOKENS)
    expert, chosen = _chosen(
        expert_ids, ranks, counts, most, token, token < num_tokens, TOP_K, WIDTH
    )  # fmt: skip
    is_mine = chosen == rank
    mine = is_mine.to(tl.int32)
    num_mine = tl.sum(mine, 1)
    needed = (num_mine > 0).to(tl.int32)
    first_pair, first_row = 0, 0
    num_pairs, num_rows = tl.sum(num_mine, 0), tl.sum(needed, 0)
    if IS_COUNTED:
        num_found = num_ranks * num_chunks
        own = rank * num_chunks
        num_pairs, num_rows = 0, 0
        for start in range(0, num_found, _BLOCK):
            index = start + tl.arange(0, _BLOCK)
            pairs = tl.load(found + index, mask=index < num_found, other=0)
            needs = tl.load(found + num_found + index, mask=index < num_found, other=0)
            is_before = index < own + chunk
            is_own = (index >= own) & (index < own + num_chunks)
            first_pair += tl.sum(tl.where(is_before, pairs, 0), 0)
            first_row += tl.sum(tl.where(is_before, needs, 0), 0)
            num_pairs += tl.sum(tl.where(is_own, pairs, 0), 0)
            num_rows += tl.sum(tl.where(is_own, needs, 0), 0)
    turn = tl.cumsum(mine, 1) - mine
    if HAS_SLOTS:
        num_rows = rounds * capacity
        in_round = tl.maximum(capacity, 1)
        row = (token // in_round * num_ranks + rank) * capacity + token % in_round
        is_row = token < num_rows
    else:
        row = first_row + tl.cumsum(needed, 0) - needed
        is_row = needed > 0
    if HAS_WIDTH:
        place = row[:, None] * width + turn
    else:
        place = first_pair + (tl.cumsum(num_mine, 0) - num_mine)[:, None] + turn
    if chunk == 0:
        tl.store(of_ranks + rank, num_rows.to(tl.int64))
        tl.store(of_ranks + num_ranks + rank, num_pairs.to(tl.int64))
    choice = tl.arange(0, WIDTH)[None, :]
    at = token.to(tl.int64)[:, None] * TOP_K + choice
    tl.store(places + at, place.to(tl.int64), mask=is_mine)
    tl.store(rows + at, tl.where(turn == 0, row[:, None], -1), mask=is_mine)
    names = tl.where(is_mine, expert, -1).to(tl.int16)
    at = row.to(tl.int64)[:, None] * ROW + SIZE + choice
    tl.store(out + at, names, mask=is_row[:, None] & (choice < TOP_K))


@triton.jit
def _send(
    hidden, rows, out,
    TOP_K: tl.constexpr, ROW: tl.constexpr, SIZE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Copy a piece of one token to its row at each rank."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_there = column < SIZE
    values = tl.load(hidden + token * SIZE + column, mask=is_there)
    for choice in tl.static_range(TOP_K):
        row = tl.load(rows + token * TOP_K + choice).to(tl.int64)
        tl.store(out + row * ROW + column, values, mask=is_there & (row >= 0))


def pack_rows(
    hidden: Tensor, expert_ids: Tensor, replicas: Replicas, plan: RowPlan, out: Tensor
) -> Packed:
    """Do what reference.py's `pack_rows` does."""
    num_tokens, top_k = expert_ids.shape
    num_ranks, capacity, device = plan.num_ranks, plan.capacity, hidden.device
    assert hidden.shape[0] == num_tokens, (hidden.shape, expert_ids.shape)
    assert capacity is None or num_tokens <= plan.rounds * capacity, (num_tokens, plan)
    wanted = plan.num_rows(num_tokens, top_k), row_bytes(hidden.shape[1], hidden.dtype, top_k)
    assert out.shape == wanted, (out.shape, wanted)
    assert out.is_contiguous(), out.stride()
    units = out.view(NAME)
    moved = hidden.contiguous().view(NAME)
    size = moved.shape[1]
    places = torch.empty(num_tokens, top_k, dtype=torch.int64, device=device)
    rows = torch.empty(num_tokens, top_k, dtype=torch.int32, device=device)
    of_ranks = torch.empty(2, num_ranks, dtype=torch.int64, device=device)
    num_slots = num_tokens if capacity is None else plan.rounds * capacity
    tiles, width = _tiles(top_k)
    num_chunks = max(1, triton.cdiv(num_slots, tiles.rows))
    grid = (num_ranks, num_chunks)
    # where replicas are filled there is a rank for each token: most is another number in each step
    chosen = (
        expert_ids.contiguous(), replicas.ranks.contiguous(), replicas.counts.contiguous(),
        replicas.ranks.shape[1],
    )  # fmt: skip
    shape = {"TOP_K": top_k, "WIDTH": width, "TOKENS": tiles.rows}
    is_counted = capacity is None or plan.width is None or num_chunks > 1
    found = of_ranks
    if is_counted:
        found = torch.empty(2, num_ranks, num_chunks, dtype=torch.int32, device=device)
        _count_choices[grid](*chosen, found, num_tokens, num_chunks, **shape, num_warps=tiles.warps)
    _place_choices[grid](
        *chosen, found, units, places, rows, of_ranks, num_tokens, num_chunks,
        capacity or 0, plan.rounds, plan.width or 0, **shape,
        ROW=units.shape[1], SIZE=size, HAS_SLOTS=capacity is not None,
        HAS_WIDTH=plan.width is not None, IS_COUNTED=is_counted, num_warps=tiles.warps,
    )  # fmt: skip
    if num_tokens:
        cut = pieces(MOVE, size)
        _send[(num_tokens, triton.cdiv(size, cut.columns))](
            moved, rows, units,
            TOP_K=top_k, ROW=units.shape[1], SIZE=size, COLUMNS=cut.columns, num_warps=cut.warps,
        )  # fmt: skip
    return Packed(places, of_ranks[0], of_ranks[1])


@triton.jit
def _named(
    packed, row, num_rows, num_experts,
    TOP_K: tl.constexpr, WIDTH: tl.constexpr, ROW: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Return the experts that some rows are for, int32 [rows, WIDTH]; -1 where is none."""
    choice = tl.arange(0, WIDTH)[None, :]
    is_there = (row < num_rows)[:, None] & (choice < TOP_K)
    at = row.to(tl.int64)[:, None] * ROW + SIZE + choice
    name = tl.load(packed + at, mask=is_there, other=-1).to(tl.int32)
    return tl.where(name < num_experts, tl.maximum(name, -1), -1)


@triton.jit(do_not_specialize=["num_rows", "num_chunks"])
def _count_names(
    packed, found, lower, num_rows, num_chunks, num_experts,
    TOP_K: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, ROW: tl.constexpr,
    SIZE: tl.constexpr,
):  # fmt: skip
    """Count a chunk's pairs of one expert (`found`) and of those before it (`lower`).

    Both int32 [num_experts + 2, num_chunks]; the last two count rows that are used, and all pairs.
    """
    expert, chunk = tl.program_id(0), tl.program_id(1)
    row = chunk * ROWS + tl.arange(0, ROWS)
    name = _named(packed, row, num_rows, num_experts, TOP_K, WIDTH, ROW, SIZE)
    in_row = tl.sum((name >= 0).to(tl.int32), 1)
    if expert < num_experts:
        num_found = tl.sum(tl.sum((name == expert).to(tl.int32), 1), 0)
        num_lower = tl.sum(tl.sum(((name >= 0) & (name < expert)).to(tl.int32), 1), 0)
    else:
        used = tl.where(expert == num_experts, (in_row > 0).to(tl.int32), in_row)
        num_found = tl.sum(used, 0)
        num_lower = 0
    at = expert * num_chunks + chunk
    tl.store(found + at, num_found)
    tl.store(lower + at, num_lower)


@triton.jit(do_not_specialize=["num_chunks"])
def _scan_names(found, lower, totals, num_chunks, CHUNKS: tl.constexpr):
    """Turn one expert's `found` into the place of its first pair of each chunk."""
    expert = tl.program_id(0)
    chunk = tl.arange(0, CHUNKS)
    is_there = chunk < num_chunks
    at = expert * num_chunks + chunk
    counted = tl.load(found + at, mask=is_there, other=0)
    first = tl.sum(tl.load(lower + at, mask=is_there, other=0), 0)
    tl.store(found + at, first + tl.cumsum(counted, 0) - counted, mask=is_there)
    tl.store(totals + expert, tl.sum(counted, 0).to(tl.int64))


@triton.jit(do_not_specialize=["num_rows", "num_chunks"])
def _place_names(
    packed, firsts, totals, kept, row_of_pair, place_of_pair, num_rows, num_chunks, num_experts,
    width,
    TOP_K: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, ROW: tl.constexpr,
    SIZE: tl.constexpr, HAS_WIDTH: tl.constexpr, IS_COUNTED: tl.constexpr,
):  # fmt: skip
    """Place a chunk's pairs of one expert; the last program, what is none, behind all pairs.

    kept: int32 [num_rows], where each row is among those that are used, -1 of another. firsts: what
    `_scan_names` has made of `found`; without it, all is in one chunk, and totals are written here.
    """
    expert, chunk = tl.program_id(0), tl.program_id(1)
    row = chunk * ROWS + tl.arange(0, ROWS)
    name = _named(packed, row, num_rows, num_experts, TOP_K, WIDTH, ROW, SIZE)
    here = (name >= 0).to(tl.int32)
    in_row = tl.sum(here, 1)
    used = (in_row > 0).to(tl.int32)
    rows_before, pairs_before = 0, 0
    if IS_COUNTED:
        rows_before = tl.load(firsts + num_experts * num_chunks + chunk)
        pairs_before = tl.load(firsts + (num_experts + 1) * num_chunks + chunk)
    row_kept = rows_before + tl.cumsum(used, 0) - used
    turn = tl.cumsum(here, 1) - here
    # how many pairs come before each, those of this row, too
    before = pairs_before + (tl.cumsum(in_row, 0) - in_row)[:, None] + turn
    choice = tl.arange(0, WIDTH)[None, :]
    if expert < num_experts:
        is_mine = name == expert
        mine = is_mine.to(tl.int32)
        mine_in_row = tl.sum(mine, 1)
        if IS_COUNTED:
            first = tl.load(firsts + expert * num_chunks + chunk)
        else:
            first = tl.sum(tl.sum(((name >= 0) & (name < expert)).to(tl.int32), 1), 0)
            tl.store(totals + expert, tl.sum(mine_in_row, 0).to(tl.int64))
        at = first + (tl.cumsum(mine_in_row, 0) - mine_in_row)[:, None]
        at = (at + tl.cumsum(mine, 1) - mine).to(tl.int64)
        place = row[:, None].to(tl.int64) * width + turn if HAS_WIDTH else before.to(tl.int64)
        tl.store(row_of_pair + at, row_kept[:, None].to(tl.int64) + tl.zeros_like(at), mask=is_mine)
        tl.store(place_of_pair + at, place, mask=is_mine)
    else:
        is_row = row < num_rows
        if IS_COUNTED:
            num_pairs = tl.load(totals + num_experts + 1)
        else:
            num_pairs = tl.sum(in_row, 0).to(tl.int64)
            tl.store(totals + num_experts, tl.sum(used, 0).to(tl.int64))
            tl.store(totals + num_experts + 1, num_pairs)
        tl.store(kept + row, tl.where(used > 0, row_kept, -1), mask=is_row)
        is_none = is_row[:, None] & (choice < TOP_K) & (name < 0)
        at = num_pairs + row[:, None].to(tl.int64) * TOP_K + choice - before
        tl.store(row_of_pair + at, tl.zeros_like(at), mask=is_none)
        tl.store(place_of_pair + at, tl.zeros_like(at) - 1, mask=is_none)


@triton.jit
def _count_ranks(
    packed, rows_of_rank, pairs_of_rank, num_rows, num_experts, num_ranks,
    TOP_K: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, ROW: tl.constexpr,
    SIZE: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """Count the pairs in the rows that came from one rank."""
    rank = tl.program_id(0)
    other = tl.arange(0, RANKS)
    rows = tl.load(rows_of_rank + other, mask=other < num_ranks, other=0).to(tl.int32)
    first = tl.sum(tl.where(other < rank, rows, 0), 0)
    end = tl.minimum(first + tl.sum(tl.where(other == rank, rows, 0), 0), num_rows)
    total = tl.zeros([ROWS], tl.int32)
    for start in range(first, end, ROWS):
        row = start + tl.arange(0, ROWS)
        name = _named(packed, row, end, num_experts, TOP_K, WIDTH, ROW, SIZE)
        total += tl.sum((name >= 0).to(tl.int32), 1)
    tl.store(pairs_of_rank + rank, tl.sum(total, 0).to(tl.int64))


@triton.jit(do_not_specialize=["num_places"])
def _scatter(
    rows, places, out, num_places,
    ROW: tl.constexpr, SIZE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Copy a piece of one row to its place; ROW: of `rows`, from one to the next."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    place = tl.load(places + row).to(tl.int64)
    if (place < 0) | (place >= num_places):
        return
    is_there = column < SIZE
    values = tl.load(rows + row * ROW + column, mask=is_there)
    tl.store(out + place * SIZE + column, values, mask=is_there)


def unpack_rows(
    packed: Tensor,
    rows_of_rank: Tensor | None,
    num_experts: int,
    top_k: int,
    plan: RowPlan,
    out: Tensor,
) -> Unpacked:
    """As reference.py, but of the most pairs that there may be; see `Unpacked`."""
    num_rows, hidden_size = out.shape
    wanted = num_rows, row_bytes(hidden_size, out.dtype, top_k)
    assert packed.shape == wanted, (packed.shape, wanted)
    device = packed.device
    units, room = packed.contiguous().view(NAME), out.view(NAME)
    size = room.shape[1]
    tiles, width = _tiles(top_k)
    num_chunks = max(1, triton.cdiv(num_rows, tiles.rows))
    totals = torch.empty(num_experts + 2, dtype=torch.int64, device=device)
    pairs = torch.empty(2, num_rows * top_k, dtype=torch.int64, device=device)
    kept = torch.empty(num_rows, dtype=torch.int32, device=device)
    shape = {"TOP_K": top_k, "WIDTH": width, "ROWS": tiles.rows, "ROW": units.shape[1]}
    shape |= {"SIZE": size, "num_warps": tiles.warps}
    found = totals
    if num_chunks > 1:
        counted = (num_experts + 2, num_chunks)
        found, lower = (torch.empty(counted, dtype=torch.int32, device=device) for _ in range(2))
        _count_names[counted](units, found, lower, num_rows, num_chunks, num_experts, **shape)
        _scan_names[(num_experts + 2,)](
            found, lower, totals, num_chunks, CHUNKS=max(_LEAST_CHUNKS, power_of_two(num_chunks))
        )
    _place_names[(num_experts + 1, num_chunks)](
        units, found, totals, kept, pairs[0], pairs[1], num_rows, num_chunks, num_experts,
        plan.width or 0, **shape, HAS_WIDTH=plan.width is not None, IS_COUNTED=num_chunks > 1,
    )  # fmt: skip
    pairs_of_rank = torch.empty(plan.num_ranks, dtype=torch.int64, device=device)
    if rows_of_rank is not None:
        _count_ranks[(plan.num_ranks,)](
            units, rows_of_rank.contiguous(), pairs_of_rank, num_rows, num_experts, plan.num_ranks,
            **shape, RANKS=power_of_two(plan.num_ranks),
        )  # fmt: skip
    _move(units, size, kept, room)
    return Unpacked(out, pairs[0], pairs[1], totals[:num_experts], pairs_of_rank)


def scatter_rows(rows: Tensor, places: Tensor, out: Tensor) -> None:
    """As reference.py, but a place that is not in `out` is passed over."""
    assert rows.shape[1:] == out.shape[1:], (rows.shape, out.shape)
    assert rows.dtype == out.dtype, (rows.dtype, out.dtype)
    assert places.shape == rows.shape[:1], (places.shape, rows.shape)
    moved = rows.contiguous().view(NAME)
    _move(moved, moved.shape[1], places.contiguous(), out.view(NAME))


def _move(rows: Tensor, size: int, places: Tensor, out: Tensor) -> None:
    """Copy the first `size` units of each row to its place in `out`, contiguous, if it has one."""
    assert out.is_contiguous(), out.stride()
    if rows.shape[0] and size:
        cut = pieces(MOVE, size)
        _scatter[(rows.shape[0], triton.cdiv(size, cut.columns))](
            rows, places, out, out.shape[0],
            ROW=rows.shape[1], SIZE=size, COLUMNS=cut.columns, num_warps=cut.warps,
        )  # fmt: skip


def _tiles(top_k: int) -> tuple[Tiles, int]:
    """Return how many tokens or rows a program looks at, and how many choices it has room for."""
    width = power_of_two(top_k)
    return whole_rows(CHOICES, width), width
