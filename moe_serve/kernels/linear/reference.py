"""Matrix product with a weight, in plain torch, where a row's bits depend on that row alone.

Rounding points: the product is accumulated in float32 by the library and rounded once to the
dtype of the input; the bias is added after that, with one more rounding.

The libraries underneath choose their code by the number of rows, and not all of it adds in one
order (docs/log.md has what was measured: 1 row is often apart, 2 and 3 sometimes, and with several
threads counts that leave one of them 1 to 3 rows). Which counts agree is therefore asked of the
library itself, once for each shape, dtype and number of threads; rows are padded to one that does.
A small weight for which even large counts disagree is multiplied as sums of products instead.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

logger = logging.getLogger(__name__)

# from so many rows on, counts agree; below, each is tried
_MANY_ROWS = 32
# a few counts above, to see that they do
_LARGE_COUNTS = (33, 50, 64, 101)
# a wider weight is tried in part: enough to be split over threads as the whole is
_PROBED_ELEMENTS = 2**22
# a weight of at most so many elements may be multiplied as sums of products; one of less than
# the second number always is: torch has loops of its own up to so many multiply-adds in all
_SMALL_ELEMENTS = 2**18
_TINY_ELEMENTS = 2**12
# float32 products held at once by those sums
_SUMMED_ELEMENTS = 2**22


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
        if not all(counts[count] for counts in exact if counts is not None):
            padded[count] = padded[count + 1]
    return tuple(padded)


@functools.cache
def _exact_counts(
    dtype: torch.dtype, out_features: int, in_features: int, threads: int
) -> tuple[bool, ...] | None:
    """Return for 0 .. _MANY_ROWS - 1 rows whether all have the bits that they have among many.

    None: the weight is tiny, or it is small and not even many rows agree: `_add_up` is for it. The
    probe's terms cancel, so that a result is nothing but rounding errors: one order of adding
    cannot be taken for another, as it could where bfloat16 rounds the difference away.
    """
    if out_features * in_features < _TINY_ELEMENTS:
        return None
    generator = torch.Generator().manual_seed(0)
    width = max(1, min(out_features, _PROBED_ELEMENTS // in_features))
    half = -(-in_features // 2)
    terms = torch.randn(width + 1, half, generator=generator).to(dtype)
    row = torch.cat([terms[0], -terms[0, : in_features - half]])
    weight = torch.cat([terms[1:], terms[1:, : in_features - half]], dim=1)  # [width, in_features]
    rows = row.expand(4 * _MANY_ROWS, in_features).contiguous()
    many = torch.mm(rows, weight.t())[0]

    def is_exact(count: int) -> bool:
        # every place in the batch, for which all rows are the same
        return bool((torch.mm(rows[:count], weight.t()) == many).all())

    if not all(is_exact(count) for count in _LARGE_COUNTS):
        if out_features * in_features <= _SMALL_ELEMENTS:
            return None
        logger.warning(
            "%s products of %d x %d depend on the number of rows on this machine: "
            "tokens may differ between batches",
            dtype,
            out_features,
            in_features,
        )
    return tuple(is_exact(count) for count in range(_MANY_ROWS))


def multiplier(weight: Tensor) -> Callable[[Tensor, Tensor, Tensor], object]:
    """Return what multiplies rows, of a count that `padded_counts` names, with such a weight.

    It is called with rows [num_rows, in_features], the weight [out_features, in_features], and the
    result [num_rows, out_features], which it writes.
    """
    counts = _exact_counts(weight.dtype, *weight.shape, torch.get_num_threads())
    return _add_up if counts is None else _multiply


def _multiply(rows: Tensor, weight: Tensor, out: Tensor) -> None:
    torch.mm(rows, weight.t(), out=out)


def _add_up(rows: Tensor, weight: Tensor, out: Tensor) -> None:
    """Multiply as sums of products: slow, and exact whatever the shape."""
    step = max(1, _SUMMED_ELEMENTS // weight.numel())
    wide = weight.float()
    for start in range(0, rows.shape[0], step):
        terms = rows[start : start + step].float().unsqueeze(1) * wide  # [step, out, in]
        out[start : start + step] = terms.sum(-1)


def pack(weight: Tensor) -> Tensor:
    """Return the form in which `linear` wants a weight: here, as it is.

    Asks the library about the weight's shape, so that the first request need not wait for it.
    """
    padded_counts(weight)
    return weight


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply each row with a packed weight.

    rows: [num_rows, in_features], of the weight's dtype or a narrower one; weight: `pack` of
    [out_features, in_features]; bias: [out_features]. Returns [num_rows, out_features], in the
    dtype of the weight.
    """
    num_rows = rows.shape[0]
    rows = rows.to(weight.dtype)
    table = padded_counts(weight)
    wanted = table[num_rows] if num_rows < len(table) else num_rows
    if wanted != num_rows:
        rows = F.pad(rows, (0, 0, 0, wanted - num_rows))
    out = rows.new_empty(wanted, weight.shape[0])
    multiplier(weight)(rows, weight, out)
    out = out[:num_rows]
    return out if bias is None else out + bias


def gather(weight: Tensor, ids: Tensor) -> Tensor:
    """Return rows `ids`, int64 [num_ids], of a packed weight: [num_ids, in_features]."""
    return weight[ids]
