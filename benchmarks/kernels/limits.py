"""The machine's own limits, as works that are timed beside the kernels.

Reading and copying memory by the native library (or by torch where there is none), and matrix
products by torch, which are oneDNN's in bfloat16.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.kernels.timing import Work
from moe_serve.kernels.native.loader import Native
from moe_serve.kernels.native.memory import allocate

_NUM_WINDOWS = 8
_MIB = 2**20  # the native functions' piece


class Limits:
    """read: 1e9 bytes read; copy: bytes moved, so that a byte that is copied counts twice."""

    def __init__(self, native: Native | None, cold_bytes: int) -> None:
        """Fill memory of at least twice cold_bytes, in huge pages where there are any."""
        window_bytes = -(-2 * cold_bytes // (_NUM_WINDOWS * _MIB)) * _MIB
        memory = allocate(_NUM_WINDOWS * window_bytes).view(_NUM_WINDOWS, window_bytes)
        self._memory = memory.fill_(1)
        self.measured_by = "torch" if native is None else "native"
        read, copy = self._of_torch() if native is None else self._of_native(native)
        self.read = Work(read, num_bytes=window_bytes)
        self.copy = Work(copy, num_bytes=2 * window_bytes)

    def _windows(self, turn: int) -> tuple[Tensor, Tensor]:
        """Return the window to read in this turn, and one to copy it to."""
        return self._memory[turn % _NUM_WINDOWS], self._memory[(turn + 1) % _NUM_WINDOWS]

    def _of_torch(self) -> tuple[Callable[[int], object], Callable[[int], object]]:
        def read(turn: int) -> object:
            return self._windows(turn)[0].view(torch.float32).sum()

        def copy(turn: int) -> object:
            source, target = self._windows(2 * turn)
            return target.copy_(source)

        return read, copy

    def _of_native(self, native: Native) -> tuple[Callable[[int], object], Callable[[int], object]]:
        read_seconds = native.machine_function("read_seconds", "iplp", "d")
        copy_seconds = native.machine_function("copy_seconds", "ippl", "d")
        total = ctypes.c_uint64()

        def read(turn: int) -> object:
            window, _ = self._windows(turn)
            threads = torch.get_num_threads()
            return read_seconds(threads, window.data_ptr(), len(window), ctypes.addressof(total))

        def copy(turn: int) -> object:
            source, target = self._windows(2 * turn)
            threads = torch.get_num_threads()
            return copy_seconds(threads, source.data_ptr(), target.data_ptr(), len(source))

        return read, copy


def product(rows: int, out_features: int, in_features: int, dtype: torch.dtype) -> Work:
    """Return torch's product of [rows, in_features] with a weight [out_features, in_features]."""
    left = torch.randn(rows, in_features).to(dtype)
    weight = torch.randn(out_features, in_features).to(dtype)
    return Work(
        lambda _: torch.mm(left, weight.t()),
        num_bytes=weight.nbytes,
        flop=2.0 * rows * out_features * in_features,
    )


def square_product(size: int, dtype: torch.dtype) -> Work:
    """Return torch's product of two square matrices."""
    return product(size, size, size, dtype)
