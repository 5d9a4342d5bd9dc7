"""Root-mean-square norm (Zhang and Sennrich 2019, arXiv 1910.07467) in plain torch.

Rounding points: the sum with the residual, to the dtype of the input; the normalised row, to the
same dtype, before it is scaled; the scaled row.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(rows: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Scale each row to root mean square 1, then by `weight`.

    rows: [..., size]; weight: [size]. Returns the shape and dtype of the rows. Computed in float32.
    """
    wide = rows.float()
    mean_square = (wide * wide).sum(-1, keepdim=True) / rows.shape[-1]
    return weight * (wide * torch.rsqrt(mean_square + eps)).to(rows.dtype)


def add_rms_norm(
    rows: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Add the residual, then norm; return (normed, the sum), both like `rows` [num_rows, size]."""
    total = rows + residual
    return rms_norm(total, weight, eps), total
