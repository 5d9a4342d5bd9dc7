"""Linear layers on a GPU; numbers as in reference.py.

A product with few rows is bound by the reading of the weight, which needs as many programs as there
are multiprocessors: where the weight has too few columns of tiles, the sum over k is split. The
parts are added in order, in float32, by the last program of a tile to arrive, or, where there are
programs enough, by one program that computes all of them: the same sums in the same order.
"""

from __future__ import annotations

# first, as it says whether Triton interprets, before Triton is imported
from moe_serve.kernels.gpu.triton import device, product, rounded

# isort: split
import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_serve.kernels.gpu.gemm_tiles import MOST_SPREAD_TILES, operands, row_tiles, schedule
from moe_serve.kernels.gpu.numerics import Numerics
from moe_serve.kernels.linear import reference

_GROUP: tl.constexpr = tl.constexpr(8)  # tiles of rows that run together, so as to share weights
_MERGED_ROWS: tl.constexpr = tl.constexpr(16)


@triton.jit
def tile_in_group(program, row_tiles, column_tiles):
    """Return a program's tile of rows and of columns; a group's tiles of rows come first."""
    first = program // (_GROUP * column_tiles) * _GROUP
    place = program % (_GROUP * column_tiles)
    size = tl.minimum(row_tiles - first, _GROUP)
    return first + place % size, place // size


@triton.jit
def _wide_product(rows, columns, total):
    """Add bfloat16 rows times float32 columns to `total`, on the tensor cores, and all but exact.

    Three bfloat16 numbers hold a float32.
    """
    high = rounded(columns, rows.dtype)
    rest = columns - high.to(tl.float32)
    middle = rounded(rest, rows.dtype)
    low = rounded(rest - middle.to(tl.float32), rows.dtype)
    total = product(rows, low, total)
    total = product(rows, middle, total)
    return product(rows, high, total)


@triton.jit
def summed(
    row_starts,
    is_row,
    column_starts,
    first,
    depth,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    NUM_STEPS: tl.constexpr,
    STEPS_OF_PART: tl.constexpr,
    IS_WHOLE: tl.constexpr,
):
    """Multiply rows with rows of a weight: float32 [ROWS, COLUMNS].

    row_starts, column_starts: pointers to their first elements, [ROWS] and [COLUMNS]; is_row: the
    rows that are there. first: the element to begin at, of `depth`; then follow NUM_STEPS steps of
    DEPTH each. IS_WHOLE: they end where depth does, or before. The sum is that of the sums of parts
    of STEPS_OF_PART.
    """
    offsets = first + tl.arange(0, DEPTH)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    part = tl.zeros((ROWS, COLUMNS), tl.float32)
    for step in range(NUM_STEPS):
        place = step * DEPTH + offsets
        if IS_WHOLE:
            rows = tl.load(row_starts[:, None] + place[None, :], mask=is_row[:, None], other=0.0)
            columns = tl.load(column_starts[None, :] + place[:, None])
        else:
            is_inside = place < depth
            rows = tl.load(
                row_starts[:, None] + place[None, :],
                mask=is_row[:, None] & is_inside[None, :],
                other=0.0,
            )
            columns = tl.load(
                column_starts[None, :] + place[:, None], mask=is_inside[:, None], other=0.0
            )
        if rows.dtype == columns.dtype:
            part = product(rows, columns, part)
        else:
            part = _wide_product(rows, columns, part)
        if STEPS_OF_PART < NUM_STEPS and (step + 1) % STEPS_OF_PART == 0:
            total += part
            part = tl.zeros((ROWS, COLUMNS), tl.float32)
    return total + part


@triton.jit
def _store(total, bias, out, rows, columns, num_rows, out_features, HAS_BIAS: tl.constexpr):
    dtype = out.dtype.element_ty
    result = rounded(total, dtype)
    is_column = columns < out_features
    if HAS_BIAS:
        added = tl.load(bias + columns, mask=is_column, other=0.0).to(tl.float32)
        result = rounded(result.to(tl.float32) + added[None, :], dtype)
    places = rows.to(tl.int64)[:, None] * out_features + columns[None, :]
    tl.store(out + places, result, mask=(rows < num_rows)[:, None] & is_column[None, :])


@triton.jit
def _merge(
    parts,
    bias,
    out,
    rows,
    columns,
    num_rows,
    out_features,
    COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Add up the parts of a few rows, so few that all of them are on their way at once."""
    is_there = (rows < num_rows)[:, None] & (columns < out_features)[None, :]
    places = parts + rows[:, None] * out_features + columns[None, :]
    total = tl.zeros((_MERGED_ROWS, COLUMNS), tl.float32)
    for index in tl.static_range(SPLITS):
        # other programs' stores: not through this multiprocessor's own cache
        part = tl.load(
            places + index * num_rows * out_features,
            mask=is_there,
            other=0.0,
            cache_modifier=".cg",
        )
        total += part
    _store(total, bias, out, rows, columns, num_rows, out_features, HAS_BIAS)


@triton.jit(do_not_specialize=["num_rows"])
def _linear(
    rows,
    weight,
    bias,
    out,
    parts,
    arrivals,
    num_rows,
    row_stride,
    out_features,
    in_features,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    SPLITS: tl.constexpr,
    NUM_STEPS: tl.constexpr,
    STEPS_OF_PART: tl.constexpr,
    IS_WHOLE: tl.constexpr,
    IS_SPREAD: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Programs: tiles of the result, and, if IS_SPREAD, parts of the sum over k."""
    tile, split = tl.program_id(0), tl.program_id(1)
    row_tile, column_tile = tile_in_group(
        tile, tl.cdiv(num_rows, ROWS), tl.cdiv(out_features, COLUMNS)
    )
    row = row_tile * ROWS + tl.arange(0, ROWS)
    column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    total = summed(
        rows + row.to(tl.int64) * row_stride,
        row < num_rows,
        weight + tl.minimum(column, out_features - 1).to(tl.int64) * in_features,
        split * STEPS_OF_PART * DEPTH,
        in_features,
        ROWS,
        COLUMNS,
        DEPTH,
        NUM_STEPS,
        STEPS_OF_PART,
        IS_WHOLE,
    )
    if IS_SPREAD:
        places = row[:, None] * out_features + column[None, :]
        is_there = (row < num_rows)[:, None] & (column < out_features)[None, :]
        tl.store(parts + split * num_rows * out_features + places, total, mask=is_there)
        tl.debug_barrier()  # before this program is counted, all of its threads have stored
        if tl.atomic_add(arrivals + tile, 1) == SPLITS - 1:
            for piece in range(ROWS // _MERGED_ROWS):
                _merge(
                    parts,
                    bias,
                    out,
                    row_tile * ROWS + piece * _MERGED_ROWS + tl.arange(0, _MERGED_ROWS),
                    column,
                    num_rows,
                    out_features,
                    COLUMNS,
                    SPLITS,
                    HAS_BIAS,
                )
            tl.store(arrivals + tile, 0)
    else:
        _store(total, bias, out, row, column, num_rows, out_features, HAS_BIAS)


class LinearKernels:
    """`pack`, `linear` and `gather`, as reference.py has them.

    Calls of one object must follow one another, as on one stream: they count arrivals in one place.
    """

    def __init__(self, numerics: Numerics) -> None:
        self._numerics = numerics
        self._arrivals = torch.zeros(MOST_SPREAD_TILES, dtype=torch.int32, device=device())

    def pack(self, weight: Tensor) -> Tensor:
        """Return the weight with its rows side by side."""
        return weight.contiguous()

    def linear(self, rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        num_rows, (out_features, in_features) = rows.shape[0], weight.shape
        assert rows.shape[1] == in_features, (rows.shape, weight.shape)
        if (rows.dtype, weight.dtype) != (torch.bfloat16, torch.float32):
            rows = rows.to(weight.dtype)
        if rows.stride(1) != 1:
            rows = rows.contiguous()
        out = torch.empty(num_rows, out_features, dtype=weight.dtype, device=weight.device)
        if not out.numel():
            return out
        plan = schedule(
            self._numerics,
            operands(rows.dtype, weight.dtype),
            num_rows,
            out_features,
            in_features,
        )
        tiles, parts = plan.tiles, out
        if plan.is_spread:
            parts = torch.empty(
                plan.splits, num_rows, out_features, dtype=torch.float32, device=weight.device
            )
        column_tiles = triton.cdiv(out_features, tiles.columns)
        splits = plan.splits if plan.is_spread else 1  # among programs
        num_steps = plan.steps if plan.is_spread else triton.cdiv(in_features, tiles.depth)
        _linear[(row_tiles(tiles, num_rows) * column_tiles, splits)](
            rows,
            weight,
            out if bias is None else bias.to(weight.dtype).contiguous(),
            out,
            parts,
            self._arrivals,
            num_rows,
            rows.stride(0),
            out_features,
            in_features,
            ROWS=tiles.rows,
            COLUMNS=tiles.columns,
            DEPTH=tiles.depth,
            SPLITS=splits,
            NUM_STEPS=num_steps,
            STEPS_OF_PART=plan.steps,
            IS_WHOLE=splits * num_steps * tiles.depth == in_features,
            IS_SPREAD=plan.is_spread,
            HAS_BIAS=bias is not None,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )
        return out

    def gather(self, weight: Tensor, ids: Tensor) -> Tensor:
        return reference.gather(weight, ids)
