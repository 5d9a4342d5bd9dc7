"""Root-mean-square norm on a GPU; rounding points as in reference.py.

A row is read once, by one program, and added up in an order that its size alone decides.
"""

from __future__ import annotations

# first, as it says whether Triton interprets, before Triton is imported
from moe_serve.kernels.gpu.triton import aligned, rounded, widened

# isort: split
import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_serve.kernels.gpu.row_tiles import NORM, whole_rows


@triton.jit(do_not_specialize=["num_rows"])
def _norm(
    rows, residual, weight, out, total, num_rows, eps,
    SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write the norm of `rows`, or of their sum with `residual`, and that sum to `total`."""
    dtype: tl.constexpr = out.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    at = row[:, None] * SIZE + column[None, :]
    is_there = (row < num_rows)[:, None] & (column < SIZE)[None, :]
    wide = widened(tl.load(rows + at, mask=is_there, other=0.0))
    scale = widened(tl.load(weight + column, mask=column < SIZE, other=0.0))
    if residual is not None:
        wide += widened(tl.load(residual + at, mask=is_there, other=0.0))
        kept = rounded(wide, dtype)
        tl.store(total + at, kept, mask=is_there)
        wide = widened(kept)
    mean_square = tl.sum(wide * wide, 1) / SIZE
    normed = widened(rounded(wide * tl.rsqrt(mean_square + eps)[:, None], dtype))
    tl.store(out + at, rounded(normed * scale[None, :], dtype), mask=is_there)


def rms_norm(rows: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Do what reference.py's `rms_norm` does, in one kernel."""
    return _normed(rows, None, weight, eps)[0]


def add_rms_norm(
    rows: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Do what reference.py's `add_rms_norm` does, in one kernel."""
    assert rows.shape == residual.shape, (rows.shape, residual.shape)
    out, total = _normed(rows, aligned(residual), weight, eps)
    assert total is not None
    return out, total


def _normed(
    rows: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor | None]:
    size = rows.shape[-1]
    assert weight.shape == (size,), (weight.shape, size)
    rows = aligned(rows)
    out = torch.empty_like(rows)
    total = None if residual is None else torch.empty_like(rows)
    num_rows = rows.shape[:-1].numel()
    if num_rows:
        tiles = whole_rows(NORM, size)
        _norm[(triton.cdiv(num_rows, tiles.rows),)](
            rows, residual, aligned(weight), out, total, num_rows, eps,
            SIZE=size, ROWS=tiles.rows, COLUMNS=tiles.columns, num_warps=tiles.warps,
        )  # fmt: skip
    return out, total
