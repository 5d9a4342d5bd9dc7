"""Memory for weights: zeros that cost nothing until they are written, in huge pages."""

from __future__ import annotations

import contextlib
import mmap

import torch
from torch import Tensor

from moe_serve.errors import CapacityError

_HUGE_PAGE = 2**21


def allocate(num_bytes: int) -> Tensor:
    """Return uint8 [num_bytes] of zeros, aligned to a huge page.

    No memory stands behind it until it is written; then huge pages do, where the system has them:
    weights are read once a step, and misses of address translation would slow that down. Raises
    CapacityError.
    """
    size = num_bytes + _HUGE_PAGE  # so that a huge page begins within
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, ValueError, OverflowError) as error:
        raise CapacityError(
            f"no memory for {num_bytes} bytes of weights ({error}); use a smaller model or dtype"
        ) from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a system without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    first = -whole.data_ptr() % _HUGE_PAGE
    return whole[first : first + num_bytes]
