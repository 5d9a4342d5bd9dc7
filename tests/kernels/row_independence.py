"""Compare bits, for tests that a row's result depends on that row alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tests.kernels.implementations import INTERPRETED, NATIVE

_MOST_INTERPRETED = 24  # rows
_INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: Tensor) -> Tensor:
    """View a floating-point tensor as integers, so that NaN and -0 compare too."""
    return tensor.contiguous().view(_INTEGER[tensor.dtype.itemsize])


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Return whether dtype, shape and every bit agree."""
    return first.dtype == second.dtype and torch.equal(bits(first), bits(second))


def mixes(name: str, num_rows: int, seed: int) -> list[tuple[Tensor, int]]:
    """Return random choices of rows (int64, shuffled, 1 to num_rows) and numbers of threads.

    Three of four are of few rows. Native kernels get 200, of 1 to 4 threads; the reference 20, of 1
    and 2, as it asks torch anew about each number of threads; those that are interpreted 8, of 1.
    """
    count, max_threads = (200, 4) if name in NATIVE else (8, 1) if name in INTERPRETED else (20, 2)
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for turn in range(count):
        most = num_rows if turn % 4 == 0 else min(16, num_rows)
        size = int(torch.randint(1, most + 1, (), generator=generator))
        rows = torch.randperm(num_rows, generator=generator)[:size]
        drawn.append((rows, 1 + int(torch.randint(0, max_threads, (), generator=generator))))
    # threads are made and ended where their number changes, which takes longer than the kernels
    return sorted(drawn, key=lambda mix: mix[1])


def check_rows(
    name: str, num_rows: int, seed: int, run: Callable[[Tensor], tuple[Tensor, ...]]
) -> None:
    """Check that `run`, of any choice of rows (int64), gives those rows of what all of them give.

    run: returns tensors with a row for each that it is given. Changes torch's number of threads.
    Of what is interpreted only the first rows are tried.
    """
    if name in INTERPRETED:
        num_rows = min(num_rows, _MOST_INTERPRETED)
    whole = run(torch.arange(num_rows))
    for rows, threads in mixes(name, num_rows, seed):
        torch.set_num_threads(threads)
        for got, want in zip(run(rows), whole, strict=True):
            assert same_bits(got, want[rows]), f"{len(rows)} rows, {threads} threads"
