"""The weighted sum of experts on a GPU, in one kernel; order and rounding as in reference.py."""

from __future__ import annotations

# first, as it says whether Triton interprets, before Triton is imported
from moe_serve.kernels.gpu.triton import rounded, widened

# isort: split
import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_serve.kernels.gpu.row_tiles import COMBINE, pieces


@triton.jit
def _combine(
    rows, pair_of_choice, weights, shared, shared_weights, out,
    TOP_K: tl.constexpr, SIZE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Add up some columns of one token."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_there = column < SIZE
    total = tl.zeros([COLUMNS], tl.float32)
    for choice in tl.static_range(TOP_K):  # so that all loads are on their way at once
        pair = tl.load(pair_of_choice + token * TOP_K + choice)
        weight = tl.load(weights + token * TOP_K + choice)
        row = widened(tl.load(rows + pair * SIZE + column, mask=is_there, other=0.0))
        total += row * weight
    if shared is not None:
        extra = widened(tl.load(shared + token * SIZE + column, mask=is_there, other=0.0))
        if shared_weights is not None:
            extra *= tl.load(shared_weights + token)
        total += extra
    tl.store(out + token * SIZE + column, rounded(total, out.dtype.element_ty), mask=is_there)


def combine(
    rows: Tensor,
    pair_of_choice: Tensor,
    weights: Tensor,
    shared: Tensor | None = None,
    shared_weights: Tensor | None = None,
) -> Tensor:
    """Do what reference.py's `combine` does."""
    num_tokens, top_k = weights.shape
    size = rows.shape[1]
    out = torch.empty(num_tokens, size, dtype=rows.dtype, device=rows.device)
    tiles = pieces(COMBINE, size)
    if num_tokens:
        _combine[(num_tokens, triton.cdiv(size, tiles.columns))](
            rows.contiguous(),
            pair_of_choice.contiguous(),
            weights.contiguous(),
            None if shared is None else shared.contiguous(),
            None if shared_weights is None else shared_weights.contiguous(),
            out,
            TOP_K=top_k, SIZE=size, COLUMNS=tiles.columns, num_warps=tiles.warps,
        )  # fmt: skip
    return out
