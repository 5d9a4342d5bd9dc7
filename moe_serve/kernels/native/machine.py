"""How fast this machine's memory is: what bounds every kernel that has few rows.

Measured with the native library, or with torch where there is none. Knows nothing of kernels.
"""

from __future__ import annotations

import ctypes
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from moe_serve.kernels.native.loader import Native

_PIECE_BYTES = 2**20  # machine.cpp's kPiece
# Passes go over one window after another: a window is out of the caches when its turn comes again,
# and short enough that some pass is not interrupted where others use the machine too.
_NUM_WINDOWS = 8
_MIN_PASSES = 3


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """The best pass over an eighth of `num_bytes`, in bytes a second.

    copy_bytes_s counts a byte that is copied once, though it is read and written.
    """

    read_bytes_s: float
    copy_bytes_s: float
    num_bytes: int
    threads: int
    measured_by: str  # "native" or "torch"


def measure_bandwidth(native: Native | None, num_bytes: int, duration_s: float = 0.6) -> Bandwidth:
    """Read memory again and again, then copy it within itself, with torch's number of threads.

    native: None lets torch do it. num_bytes is rounded down to 8 MiB, but at least that; it should
    be several times the last cache. Each of the two takes half of `duration_s`, once the memory
    was filled, or three passes if that is longer.
    """
    threads = torch.get_num_threads()
    window_bytes = max(1, num_bytes // (_NUM_WINDOWS * _PIECE_BYTES)) * _PIECE_BYTES
    memory = torch.ones(_NUM_WINDOWS, window_bytes // 4)  # float32; written, so that it is there
    total = ctypes.c_uint64()
    if native is not None:
        read_seconds = native.machine_function("read_seconds", "iplp", "d")
        copy_seconds = native.machine_function("copy_seconds", "ippl", "d")

    def read_s(window: int) -> float:
        if native is None:
            return _timed_s(memory[window].sum)
        start = memory[window].data_ptr()
        return float(read_seconds(threads, start, window_bytes, ctypes.addressof(total)))

    def copy_s(window: int) -> float:
        source, target = memory[window], memory[(window + 1) % _NUM_WINDOWS]
        if native is None:
            return _timed_s(lambda: target.copy_(source))
        return float(copy_seconds(threads, source.data_ptr(), target.data_ptr(), window_bytes))

    return Bandwidth(
        window_bytes / _best_s(read_s, range(_NUM_WINDOWS), duration_s / 2),
        window_bytes / _best_s(copy_s, range(0, _NUM_WINDOWS, 2), duration_s / 2),
        memory.nbytes,
        threads,
        "torch" if native is None else "native",
    )


def _timed_s(work: Callable[[], object]) -> float:
    start_s = time.perf_counter()
    work()
    return time.perf_counter() - start_s


def _best_s(pass_s: Callable[[int], float], windows: range, duration_s: float) -> float:
    """Return the shortest of as many passes as fit, after one that warms up."""
    turns = itertools.cycle(windows)
    pass_s(next(turns))
    deadline_s = time.perf_counter() + duration_s
    times_s = [pass_s(next(turns)) for _ in range(_MIN_PASSES)]
    while time.perf_counter() < deadline_s:
        times_s.append(pass_s(next(turns)))
    return min(times_s)
