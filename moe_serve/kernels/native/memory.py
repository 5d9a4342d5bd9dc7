"""Memory for weights: zeros, in huge pages where there are many."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from collections.abc import Callable

import numpy as np
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


class GrowingMemory:
    """Memory whose size changes while what is in it stays where it is.

    Addresses are reserved once, for the most it can become; only the part in use counts as memory,
    also against a limit of a process's data. Where a limit of addresses is in the way, it stays as
    large as it is at first; where the system cannot do any of this, all of it is allocated.
    """

    def __init__(self, most_bytes: int, num_bytes: int) -> None:
        """Reserve `most_bytes`, and make the first `num_bytes` usable. Raises CapacityError."""
        self._most_bytes = most_bytes
        self._size = 0
        self._protect = _mprotect()
        if self._protect is None:
            self.tensor = allocate(most_bytes)
            return
        try:
            # no access: reserved, but not counted
            self._memory = mmap.mmap(
                -1, most_bytes + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=0
            )
        except (OSError, ValueError, OverflowError):
            self._most_bytes, self._protect = num_bytes, None
            self.tensor = allocate(num_bytes)
            return
        address = np.frombuffer(self._memory, np.uint8).ctypes.data
        self._first = -address % _HUGE_PAGE
        # not of the map itself, which passes for read-only
        view = (ctypes.c_uint8 * max(1, most_bytes)).from_address(address + self._first)
        setattr(view, "owner", self._memory)  # noqa: B010 - so that it lives as long as a tensor
        self.tensor = torch.frombuffer(view, dtype=torch.uint8)[:most_bytes]
        self.resize(num_bytes)

    def resize(self, num_bytes: int) -> None:
        """Make the first `num_bytes` usable, and give what lies behind them back to the system.

        Raises CapacityError where there is no memory; then the size is as it was.
        """
        assert 0 <= num_bytes <= self._most_bytes, (num_bytes, self._most_bytes)
        size = -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        if self._protect is None:
            return
        start = self.tensor.data_ptr()
        if size > self._size:
            error = self._protect(
                start + self._size, size - self._size, mmap.PROT_READ | mmap.PROT_WRITE
            )
            if error:
                raise CapacityError(
                    f"no memory for {num_bytes} bytes of experts ({os.strerror(error)}); "
                    "lower expert_cache_slots or expert_cache_gb"
                )
            if size >= _LEAST_HUGE and hasattr(mmap, "MADV_HUGEPAGE"):
                with contextlib.suppress(OSError):  # a system without them
                    self._memory.madvise(mmap.MADV_HUGEPAGE, self._first, size)
        elif size < self._size:
            self._memory.madvise(mmap.MADV_DONTNEED, self._first + size, self._size - size)
            self._protect(start + size, self._size - size, 0)
        self._size = size


def _mprotect() -> Callable[[int, int, int], int] | None:
    """Return the system's mprotect, which returns an errno or 0; None where there is none."""
    if not hasattr(mmap, "MADV_DONTNEED"):
        return None
    try:
        function = ctypes.CDLL(None, use_errno=True).mprotect
    except (OSError, AttributeError):
        return None
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

    def protect(address: int, num_bytes: int, access: int) -> int:
        return ctypes.get_errno() if function(address, num_bytes, access) else 0

    return protect
