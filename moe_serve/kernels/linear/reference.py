"""Matrix product with a weight, in plain torch, where a row's bits depend on that row alone.

Rounding points: the product is accumulated in float32 by the library and rounded once to the
dtype of the input; the bias is added after that, with one more rounding.

The libraries underneath choose their code by the number of rows, and not all of it adds in one
order (docs/log.md has what was measured: 1 row is often apart, 2 and 3 sometimes, and with several
threads counts that leave one of them 1 to 3 rows). Which counts agree is therefore asked of the
library itself, once for each shape, dtype and number of threads; rows are padded to one that does.
"""

from __future__ import annotations

import functools
import logging

import torch
import torch.nn.functional as F
from torch import Tensor

logger = logging.getLogger(__name__)

# from so many rows on, counts agree; below, each is tried
_MANY_ROWS = 32
# a few counts above, to see that they do
_LARGE_COUNTS = (33, 50, 63, 100)
# with fewer outputs the libraries take matrix-vector code, whose bits show how rows are split
_NARROW = 8
# a wider weight is tried in part: enough to be split over threads as the whole is
_PROBED_ELEMENTS = 2**22


def padded_counts(*weights: Tensor) -> tuple[int, ...]:
    """Return for 0, 1, 2 ... rows the least count from there on that is exact for each weight.

    Exact: every row has the bits that it has among many rows. weights: [out_features,
    in_features], of one dtype. Counts beyond the end of the table need no padding.
    """
    shapes = tuple((weight.dtype, *weight.shape) for weight in weights)
    return _padded_counts(shapes, torch.get_num_threads())


@functools.cache
def _padded_counts(
    shapes: tuple[tuple[torch.dtype, int, int], ...], threads: int
) -> tuple[int, ...]:
    exact = [_exact_counts(*shape, threads) for shape in shapes]
    padded = list(range(_MANY_ROWS + 1))
    for count in range(_MANY_ROWS - 1, 0, -1):
        if not all(counts[count] for counts in exact):
            padded[count] = padded[count + 1]
    return tuple(padded)


@functools.cache
def _exact_counts(
    dtype: torch.dtype, out_features: int, in_features: int, threads: int
) -> tuple[bool, ...]:
    """Return for 0 .. _MANY_ROWS - 1 rows whether all have the bits that they have among many."""
    generator = torch.Generator().manual_seed(0)
    width = max(_NARROW, min(out_features, _PROBED_ELEMENTS // in_features))
    weight = torch.randn(width, in_features, generator=generator).to(dtype)
    rows = torch.randn(4 * _MANY_ROWS, in_features, generator=generator).to(dtype)
    many = torch.mm(rows, weight.t())

    def is_exact(count: int) -> bool:
        return torch.equal(torch.mm(rows[:count], weight.t()), many[:count])

    if not all(is_exact(count) for count in _LARGE_COUNTS):
        logger.warning(
            "%s products of %d x %d depend on the number of rows on this machine: "
            "tokens may differ between batches",
            dtype,
            out_features,
            in_features,
        )
    return tuple(is_exact(count) for count in range(_MANY_ROWS))


def pack(weight: Tensor) -> Tensor:
    """Return the form in which `linear` wants a weight: here, as it is.

    Asks the library about the weight's shape, so that the first request need not wait for it.
    """
    padded_counts(weight)
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
    table = padded_counts(weight)
    wanted = table[num_rows] if num_rows < len(table) else num_rows
    if wanted != num_rows:
        rows = F.pad(rows, (0, 0, 0, wanted - num_rows))
    out = torch.mm(rows, weight.t())[:num_rows]
    return out if bias is None else out + bias
