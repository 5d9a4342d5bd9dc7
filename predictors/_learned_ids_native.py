"""What learned_ids does at a layer, by one call of the native library, where there is one."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from moe_serve.kernels.native.loader import Native, NotBuilt, load
from moe_serve.predictors.base import Array

_MOST_CHOICES, _MOST_STAGES = 64, 16  # of the library's arguments.h


class _LearnedIds(ctypes.Structure):
    _fields_ = (
        ("table", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("num_experts", ctypes.c_int64),
        ("num_layers", ctypes.c_int64),
        ("top_k", ctypes.c_int64),
        ("reach", ctypes.c_int64),
        ("near", ctypes.c_int64),
        ("num_rows", ctypes.c_int64),
        ("num_sequences", ctypes.c_int64),
        ("pad", ctypes.c_int64),
        ("stage_of_row", ctypes.c_void_p),
        ("logits", ctypes.c_void_p),
        ("guesses", ctypes.c_void_p),
        ("rows", ctypes.c_void_p),
        ("rate", ctypes.c_float),
        ("last_scale", ctypes.c_float),
    )


class NativeStep:
    """A step's arrays, as the library takes them."""

    def __init__(
        self,
        native: Native,
        *,
        stage_of_row: Array,
        guesses: Array,
        rows: Array,
        top_k: int,
        reach: int,
        pad: int,
        rate: float,
        last_scale: float,
    ) -> None:
        """guesses: float32 [learned, padded, stages, num_experts]; rows: int64 [learned, padded,
        num_rows]; stage_of_row: [num_rows]."""
        num_learned, padded, stages, num_experts = guesses.shape
        if native.machine_function("sizes", "i", "l")(6) != ctypes.sizeof(_LearnedIds):
            raise NotBuilt("learned_ids of the native library is another one; install again")
        self._see = native.function("learned_ids_see", "plpplpp")
        self._errors = np.empty((stages, num_experts), np.float32)
        self._losses = np.empty(num_learned, np.float32)
        self._learned = np.empty(num_learned, np.int64)
        self._kept: tuple[Any, ...] = (np.ascontiguousarray(stage_of_row, np.int32), guesses, rows)
        self._how = _LearnedIds(
            None,
            None,
            num_experts,
            padded - reach,
            top_k,
            reach,
            stages - 1,
            rows.shape[2],
            0,
            pad,
            self._kept[0].ctypes.data,
            None,
            guesses.ctypes.data,
            rows.ctypes.data,
            rate,
            last_scale,
        )
        self._address = ctypes.addressof(self._how)
        self._addresses = (
            self._learned.ctypes.data,
            self._errors.ctypes.data,
            self._losses.ctypes.data,
        )

    def begin(self, table: Array, scale: Array, logits: Array) -> None:
        """Begin a step. logits: float32 [num_sequences, padded, num_experts], contiguous."""
        self._used = table, scale, logits
        self._how.table, self._how.scale = _address(table), _address(scale)
        self._how.logits, self._how.num_sequences = _address(logits), len(logits)

    def see(self, layer: int, ids: Array, learned: list[int]) -> list[float]:
        """Learn from a layer, and say what it tells; return the loss of each learned sequence."""
        ids = np.ascontiguousarray(ids, np.int64)
        count = len(learned)
        self._learned[:count] = learned
        at, errors, losses = self._addresses
        self._see(self._address, layer, _address(ids), at, count, errors, losses)
        found: list[float] = self._losses[:count].tolist()
        return found


def _address(array: Array) -> int:
    address: int = array.__array_interface__["data"][0]  # .ctypes takes several times as long
    return address


def native_for(top_k: int, stages: int) -> Native | None:
    """Return the library, where there is one that can do this much."""
    try:
        return load() if top_k <= _MOST_CHOICES and stages <= _MOST_STAGES else None
    except NotBuilt:
        return None
