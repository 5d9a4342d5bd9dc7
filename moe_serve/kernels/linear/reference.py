"""Matrix product with a weight, in plain torch, where a row's bits depend on that row alone.

Rounding points: the product is accumulated in float32 by the library and rounded once to the
dtype of the input; the bias is added after that, with one more rounding.

The libraries underneath choose their code by the number of rows, and not all of it adds in one
order (measured, docs/log.md): float32 GEMM has other bits at 1, at 2 or 3, and, on 2 threads, at
5 to 11 rows that are no multiple of 4; bfloat16 GEMM at 1 row, and wherever the product is so
small that torch takes its own loop. Rows are padded until all row counts are in one class.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# below this many multiply-adds torch leaves bfloat16 to a loop of its own, with other bits
_SMALL_PRODUCT = 16**3
# with fewer outputs the libraries take matrix-vector code, whose bits show how rows are split
_NARROW = 8


def padded_rows(num_rows: int, weight: Tensor) -> int:
    """Return the least row count >= num_rows that is in the one class of equal bits.

    weight: [out_features, in_features]; its dtype and size decide.
    """
    if num_rows == 0:
        return 0
    if weight.dtype == torch.float32:
        grain = 4 * torch.get_num_threads()
        return num_rows if num_rows >= 4 * grain else -(-num_rows // grain) * grain
    return max(num_rows, 4, _SMALL_PRODUCT // weight.numel() + 1)


def pack(weight: Tensor) -> Tensor:
    """Return the form in which `linear` wants a weight: here, as it is."""
    return weight


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply each row with a packed weight.

    rows: [num_rows, in_features]; weight: `pack` of [out_features, in_features]; bias:
    [out_features]. Returns [num_rows, out_features], in the dtype of the rows.
    """
    if weight.shape[0] < _NARROW:
        products = rows.float().unsqueeze(1) * weight.float()  # [num_rows, out, in]
        out = products.sum(-1).to(rows.dtype)
        return out if bias is None else out + bias
    num_rows = rows.shape[0]
    wanted = padded_rows(num_rows, weight)
    if wanted != num_rows:
        rows = F.pad(rows, (0, 0, 0, wanted - num_rows))
    out = F.linear(rows, weight)[:num_rows]
    return out if bias is None else out + bias
