"""Compare bits, for tests that a row's result depends on that row alone."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: Tensor) -> Tensor:
    """View a floating-point tensor as integers, so that NaN and -0 compare too."""
    return tensor.contiguous().view(_INTEGER[tensor.dtype.itemsize])


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Return whether dtype, shape and every bit agree."""
    return first.dtype == second.dtype and torch.equal(bits(first), bits(second))


def subsets(num_rows: int, seed: int, count: int) -> Iterator[tuple[Tensor, int]]:
    """Yield random choices of rows (int64, shuffled, 1 to num_rows of them) and 1 or 2 threads."""
    generator = torch.Generator().manual_seed(seed)
    for turn in range(count):
        few = turn % 2 == 0
        size = int(
            torch.randint(1, min(17, num_rows) if few else num_rows + 1, (), generator=generator)
        )
        rows = torch.randperm(num_rows, generator=generator)[:size]
        yield rows, 1 + int(torch.randint(0, 2, (), generator=generator))
