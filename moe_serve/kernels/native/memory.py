"""Memory for weights: zeros, in huge pages where there are many."""

from __future__ import annotations

import contextlib
import mmap

import torch
from torch import Tensor

from moe_serve.errors import CapacityError

_HUGE_PAGE = 2**21
# what is smaller would waste too much of its huge pages
_LEAST_HUGE = 4 * _HUGE_PAGE


def allocate(num_bytes: int) -> Tensor:
    """Return uint8 [num_bytes] of zeros, aligned to a page, or to a huge one if there are many.

    No memory stands behind it until it is written; then huge pages do, where the system has them:
    weights are read once a step, and misses of address translation would slow that down. Raises
    CapacityError.
    """
    is_huge = num_bytes >= _LEAST_HUGE and hasattr(mmap, "MADV_HUGEPAGE")
    # so that a huge page begins within
    size = num_bytes + _HUGE_PAGE if is_huge else max(1, num_bytes)
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, ValueError, OverflowError) as error:
        raise CapacityError(
            f"no memory for {num_bytes} bytes of weights ({error}); use a smaller model or dtype"
        ) from error
    if is_huge:
        with contextlib.suppress(OSError):  # a system without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    first = -whole.data_ptr() % _HUGE_PAGE if is_huge else 0
    return whole[first : first + num_bytes]
