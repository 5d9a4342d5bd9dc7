"""The crc32 of zlib, by the native library where that is several times as fast."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable

import numpy as np

from moe_serve.kernels.native.loader import Native, NotBuilt, load


def crc32(data: memoryview) -> int:
    """Return the crc32 of contiguous bytes; the interpreter's lock is not held meanwhile."""
    function = _function()
    if function is None or not data.nbytes:
        return zlib.crc32(data)
    return int(function(np.frombuffer(data, np.uint8).ctypes.data, data.nbytes))


@functools.cache
def _function() -> Callable[[int, int], int] | None:
    """Return the native one, or None where there is none, or no instruction for it."""
    try:
        native: Native = load()
        if not native.machine_function("has_fast_crc32", "", "i")():
            return None
        return native.machine_function("crc32", "pl", "l")
    except NotBuilt:
        return None
