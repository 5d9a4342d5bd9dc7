"""Experts' MLPs on a GPU, over rows sorted by expert; numbers as in reference.py.

Two products, each one launch for all experts. A program finds from the counts which expert its tile
is of and which rows; the grid is an upper bound, from shapes alone, and programs beyond the last
tile return at once. Few pairs are bound by the reading of weights: each expert's are read once, by
as many programs as it has tiles of columns.
"""

from __future__ import annotations

# first, as it says whether Triton interprets, before Triton is imported
from moe_serve.kernels.gpu.triton import rounded

# isort: split
import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_serve.kernels.gpu.gemm_tiles import DOWN, GATE_UP, chosen, operands, row_tiles
from moe_serve.kernels.gpu.numerics import Numerics
from moe_serve.kernels.linear.triton import summed, tile_in_group
from moe_serve.kernels.moe import reference
from moe_serve.kernels.moe.base import ExpertTable, plain_weights

RECORD_LAYOUT = reference.RECORD_LAYOUT  # plain rows: a tile's are read straight into shared memory
_SILU_ROWS, _SILU_COLUMNS = 8, 128


@triton.jit
def _activated(gate, up):
    """Return silu(gate) * up, float32."""
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def _runs(slot_of_expert, only, expert, is_expert, HAS_ONLY: tl.constexpr):
    """Return which experts are resident and, if HAS_ONLY, asked for."""
    is_run = tl.load(slot_of_expert + expert, mask=is_expert, other=-1) >= 0
    if HAS_ONLY:
        is_run = is_run & (tl.load(only + expert, mask=is_expert, other=0) != 0)
    return is_run


@triton.jit
def _rows_of_tile(
    tile,
    counts,
    slot_of_expert,
    only,
    num_experts,
    ROWS: tl.constexpr,
    EXPERTS: tl.constexpr,
    HAS_ONLY: tl.constexpr,
):
    """Return a tile's expert, its first pair, and the pair after the last of that expert.

    Tiles are of ROWS pairs of one expert each, in the order of the experts that run. The expert is
    `num_experts` or above where there are not as many tiles.
    """
    expert = tl.arange(0, EXPERTS)
    is_expert = expert < num_experts
    pairs = tl.load(counts + expert, mask=is_expert, other=0).to(tl.int32)
    is_run = _runs(slot_of_expert, only, expert, is_expert, HAS_ONLY)
    tiles = tl.where(is_run, (pairs + ROWS - 1) // ROWS, 0)
    is_before = tl.cumsum(tiles, 0) <= tile
    found = tl.sum(is_before.to(tl.int32), 0)
    first_pair = tl.sum(tl.where(is_before, pairs, 0), 0)
    first_tile = tl.sum(tl.where(is_before, tiles, 0), 0)
    own = tl.load(counts + found, mask=found < num_experts, other=0).to(tl.int32)
    return found, first_pair + (tile - first_tile) * ROWS, first_pair + own


@triton.jit(do_not_specialize=["row_tiles"])
def _gate_up(
    hidden,
    hidden_stride,
    row_of_pair,
    weights,
    slot_stride,
    counts,
    slot_of_expert,
    only,
    uses,
    out,
    row_tiles,
    num_experts,
    hidden_size,
    intermediate_size,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    NUM_STEPS: tl.constexpr,
    EXPERTS: tl.constexpr,
    IS_WHOLE: tl.constexpr,
    HAS_ONLY: tl.constexpr,
):
    """Write silu(gate) * up of each pair, and count the uses.

    A tile has COLUMNS / 2 gates and as many ups, in turns, so that a thread has both of a column.
    """
    if tl.program_id(0) == 0:
        expert = tl.arange(0, EXPERTS)
        is_expert = expert < num_experts
        is_run = _runs(slot_of_expert, only, expert, is_expert, HAS_ONLY)
        given = tl.load(counts + expert, mask=is_run, other=0)
        tl.store(uses + expert, tl.load(uses + expert, mask=is_run) + given, mask=is_run)
    size: tl.constexpr = COLUMNS // 2
    tile, column_tile = tile_in_group(tl.program_id(0), row_tiles, tl.cdiv(intermediate_size, size))
    expert, first, end = _rows_of_tile(
        tile, counts, slot_of_expert, only, num_experts, ROWS, EXPERTS, HAS_ONLY
    )
    if expert >= num_experts:
        return
    slot = tl.load(slot_of_expert + expert).to(tl.int64)
    pair = first + tl.arange(0, ROWS)
    row = tl.load(row_of_pair + pair, mask=pair < end, other=0)
    mixed = tl.arange(0, COLUMNS)
    gate_column = tl.minimum(column_tile * size + mixed // 2, intermediate_size - 1)
    weight_row = gate_column + mixed % 2 * intermediate_size
    total = summed(
        hidden + row * hidden_stride,
        pair < end,
        weights + slot * slot_stride + weight_row * hidden_size,
        0,
        hidden_size,
        ROWS,
        COLUMNS,
        DEPTH,
        NUM_STEPS,
        NUM_STEPS,
        IS_WHOLE,
    )
    dtype = out.dtype.element_ty
    gate, up = tl.split(tl.reshape(total, (ROWS, size, 2)))
    gate = rounded(gate, dtype).to(tl.float32)
    up = rounded(up, dtype).to(tl.float32)
    column = column_tile * size + tl.arange(0, size)
    places = pair.to(tl.int64)[:, None] * intermediate_size + column[None, :]
    is_there = (pair < end)[:, None] & (column < intermediate_size)[None, :]
    tl.store(out + places, rounded(_activated(gate, up), dtype), mask=is_there)


@triton.jit(do_not_specialize=["row_tiles"])
def _down(
    inner,
    weights,
    slot_stride,
    counts,
    slot_of_expert,
    only,
    out,
    out_stride,
    row_tiles,
    num_experts,
    hidden_size,
    intermediate_size,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    NUM_STEPS: tl.constexpr,
    EXPERTS: tl.constexpr,
    IS_WHOLE: tl.constexpr,
    HAS_ONLY: tl.constexpr,
):
    tile, column_tile = tile_in_group(tl.program_id(0), row_tiles, tl.cdiv(hidden_size, COLUMNS))
    expert, first, end = _rows_of_tile(
        tile, counts, slot_of_expert, only, num_experts, ROWS, EXPERTS, HAS_ONLY
    )
    if expert >= num_experts:
        return
    slot = tl.load(slot_of_expert + expert).to(tl.int64)
    pair = first + tl.arange(0, ROWS)
    column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    total = summed(
        inner + pair.to(tl.int64) * intermediate_size,
        pair < end,
        weights + slot * slot_stride + tl.minimum(column, hidden_size - 1) * intermediate_size,
        0,
        intermediate_size,
        ROWS,
        COLUMNS,
        DEPTH,
        NUM_STEPS,
        NUM_STEPS,
        IS_WHOLE,
    )
    places = pair.to(tl.int64)[:, None] * out_stride + column[None, :]
    is_there = (pair < end)[:, None] & (column < hidden_size)[None, :]
    tl.store(out + places, rounded(total, out.dtype.element_ty), mask=is_there)


@triton.jit
def _missing(
    counts,
    slot_of_expert,
    only,
    flags,
    total,
    num_experts,
    EXPERTS: tl.constexpr,
    HAS_ONLY: tl.constexpr,
):
    expert = tl.arange(0, EXPERTS)
    is_expert = expert < num_experts
    is_asked = tl.load(counts + expert, mask=is_expert, other=0) > 0
    if HAS_ONLY:
        is_asked = is_asked & (tl.load(only + expert, mask=is_expert, other=0) != 0)
    is_missing = is_asked & (tl.load(slot_of_expert + expert, mask=is_expert, other=0) < 0)
    tl.store(flags + expert, is_missing.to(tl.uint8), mask=is_expert)
    tl.store(total, tl.sum(is_missing.to(tl.int32), 0))


@triton.jit(do_not_specialize=["num_rows"])
def _silu_and_mul(gate_up, stride, out, num_rows, size, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_there = (row < num_rows)[:, None] & (column < size)[None, :]
    wide_row = row.to(tl.int64)[:, None]
    start = gate_up + wide_row * stride + column[None, :]
    gate = tl.load(start, mask=is_there, other=0.0).to(tl.float32)
    up = tl.load(start + size, mask=is_there, other=0.0).to(tl.float32)
    result = rounded(_activated(gate, up), out.dtype.element_ty)
    tl.store(out + wide_row * size + column[None, :], result, mask=is_there)


def missing(
    counts: Tensor, slot_of_expert: Tensor, only: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return which experts have pairs and no slot, on the device.

    counts, slot_of_expert, only: as for `moe`. Returns flags, uint8 [num_experts], 1 for those, and
    how many they are, int32 [1].
    """
    num_experts = counts.shape[0]
    flags = torch.empty(num_experts, dtype=torch.uint8, device=counts.device)
    total = torch.empty(1, dtype=torch.int32, device=counts.device)
    _missing[(1,)](
        counts.contiguous(),
        slot_of_expert.contiguous(),
        flags if only is None else only.contiguous(),
        flags,
        total,
        num_experts,
        EXPERTS=triton.next_power_of_2(num_experts),
        HAS_ONLY=only is not None,
    )
    return flags, total


class MoeKernels:
    """`record_bytes`, `pack_records_`, `moe` and `silu_and_mul`, as reference.py has them."""

    def __init__(self, numerics: Numerics) -> None:
        self._numerics = numerics

    def record_bytes(self, hidden_size: int, intermediate_size: int, dtype: torch.dtype) -> int:
        return reference.record_bytes(hidden_size, intermediate_size, dtype)

    def pack_records_(
        self, records: Tensor, hidden_size: int, intermediate_size: int, dtype: torch.dtype
    ) -> None:
        """Leave the records as they are."""

    def moe(
        self,
        hidden: Tensor,
        row_of_pair: Tensor,
        counts: Tensor,
        experts: ExpertTable,
        only: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """As reference.py; the pairs of experts without a slot, too, are left as they are in `out`.

        Nor are those counted as uses; `missing` tells which experts they are.
        """
        num_pairs, num_experts, dtype = row_of_pair.shape[0], experts.num_experts, experts.dtype
        hidden_size, intermediate_size = experts.hidden_size, experts.intermediate_size
        assert hidden.shape[1] == hidden_size, (hidden.shape, hidden_size)
        assert hidden.dtype == dtype, (hidden.dtype, dtype)
        assert counts.shape == (num_experts,), (counts.shape, num_experts)
        assert only is None or only.shape == counts.shape, only
        if out is None:
            out = torch.empty(num_pairs, hidden_size, dtype=dtype, device=hidden.device)
        assert out.shape == (num_pairs, hidden_size), out.shape
        assert out.stride(1) == 1, out.stride()
        if not num_pairs:
            return out
        inner = torch.empty(num_pairs, intermediate_size, dtype=dtype, device=hidden.device)
        gate_up, down = plain_weights(experts.records, hidden_size, intermediate_size, dtype)
        hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
        row_of_pair, counts = row_of_pair.contiguous(), counts.contiguous()
        chosen_experts = counts if only is None else only.contiguous()
        kind, num_rows = operands(dtype, dtype), (num_pairs, num_experts)
        tiles = chosen(GATE_UP[self._numerics][kind], *num_rows, 2 * intermediate_size)
        most_tiles = row_tiles(tiles, *num_rows)
        _gate_up[(most_tiles * triton.cdiv(2 * intermediate_size, tiles.columns),)](
            hidden,
            hidden.stride(0),
            row_of_pair,
            gate_up,
            gate_up.stride(0),
            counts,
            experts.slot_of_expert,
            chosen_experts,
            experts.uses,
            inner,
            most_tiles,
            num_experts,
            hidden_size,
            intermediate_size,
            ROWS=tiles.rows,
            COLUMNS=tiles.columns,
            DEPTH=tiles.depth,
            NUM_STEPS=triton.cdiv(hidden_size, tiles.depth),
            EXPERTS=triton.next_power_of_2(num_experts),
            IS_WHOLE=hidden_size % tiles.depth == 0,
            HAS_ONLY=only is not None,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )
        tiles = chosen(DOWN[self._numerics][kind], *num_rows, hidden_size)
        most_tiles = row_tiles(tiles, *num_rows)
        _down[(most_tiles * triton.cdiv(hidden_size, tiles.columns),)](
            inner,
            down,
            down.stride(0),
            counts,
            experts.slot_of_expert,
            chosen_experts,
            out,
            out.stride(0),
            most_tiles,
            num_experts,
            hidden_size,
            intermediate_size,
            ROWS=tiles.rows,
            COLUMNS=tiles.columns,
            DEPTH=tiles.depth,
            NUM_STEPS=triton.cdiv(intermediate_size, tiles.depth),
            EXPERTS=triton.next_power_of_2(num_experts),
            IS_WHOLE=intermediate_size % tiles.depth == 0,
            HAS_ONLY=only is not None,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )
        return out

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        num_rows, size = gate_up.shape[0], gate_up.shape[1] // 2
        gate_up = gate_up if gate_up.stride(1) == 1 else gate_up.contiguous()
        out = torch.empty(num_rows, size, dtype=gate_up.dtype, device=gate_up.device)
        if out.numel():
            grid = (triton.cdiv(num_rows, _SILU_ROWS), triton.cdiv(size, _SILU_COLUMNS))
            _silu_and_mul[grid](
                gate_up,
                gate_up.stride(0),
                out,
                num_rows,
                size,
                ROWS=_SILU_ROWS,
                COLUMNS=_SILU_COLUMNS,
            )
        return out
