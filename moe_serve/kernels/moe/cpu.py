"""Experts' MLPs by the native library; numbers as in reference.py."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from moe_serve.errors import CapacityError
from moe_serve.kernels.moe.base import ExpertTable
from moe_serve.kernels.native.loader import Native
from moe_serve.kernels.native.pointers import dtype_code, empty, pointer, pointer_or_null

_MOST_COPIES_BYTES = 2**29
RECORD_LAYOUT = 1  # of a record's header: the tiles of native/moe.h


class ExpertTableArguments(ctypes.Structure):
    """See native/arguments.h."""

    _fields_ = (
        ("records", ctypes.c_void_p),
        ("record_bytes", ctypes.c_int64),
        ("slot_of_expert", ctypes.c_void_p),
        ("uses", ctypes.c_void_p),
        ("num_experts", ctypes.c_int64),
        ("hidden_size", ctypes.c_int64),
        ("intermediate_size", ctypes.c_int64),
    )

    @classmethod
    def of(cls, experts: ExpertTable) -> ExpertTableArguments:
        """Point to the tensors of `experts`, which must live on."""
        return cls(
            pointer(experts.records, torch.uint8),
            experts.records.shape[1],
            pointer(experts.slot_of_expert, torch.int32),
            pointer(experts.uses, torch.int64),
            experts.num_experts,
            experts.hidden_size,
            experts.intermediate_size,
        )


class MoeKernels:
    """`record_bytes`, `pack_records_`, `moe` and `silu_and_mul`, as reference.py has them."""

    def __init__(self, native: Native) -> None:
        self._record_bytes = native.function("record_bytes", "ill", "l")
        self._pack_records = native.function("pack_records", "iipllll", "i")
        self._moe = native.function("moe", "iippppplp", "i")
        self._silu_and_mul = native.function("silu_and_mul", "iipllp")

    def record_bytes(self, hidden_size: int, intermediate_size: int, dtype: torch.dtype) -> int:
        return int(self._record_bytes(dtype_code(dtype), hidden_size, intermediate_size))

    def pack_records_(
        self, records: Tensor, hidden_size: int, intermediate_size: int, dtype: torch.dtype
    ) -> None:
        # each thread holds a plain copy of one record
        threads = min(torch.get_num_threads(), max(1, _MOST_COPIES_BYTES // records.shape[1]))
        failed = self._pack_records(
            threads,
            dtype_code(dtype),
            pointer(records, torch.uint8),
            records.shape[1],
            records.shape[0],
            hidden_size,
            intermediate_size,
        )
        if failed:
            raise CapacityError(
                f"no memory to pack experts of {records.shape[1]} bytes; use a smaller dtype"
            )

    def moe(
        self,
        hidden: Tensor,
        row_of_pair: Tensor,
        counts: Tensor,
        experts: ExpertTable,
        only: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        hidden, row_of_pair, counts = (t.contiguous() for t in (hidden, row_of_pair, counts))
        num_pairs, dtype = row_of_pair.shape[0], experts.dtype
        assert hidden.shape[1] == experts.hidden_size, (hidden.shape, experts.hidden_size)
        assert counts.shape == (experts.num_experts,), (counts.shape, experts.num_experts)
        arguments = ExpertTableArguments.of(experts)
        if out is None:
            out = empty(num_pairs, experts.hidden_size, dtype=dtype)
        assert out.shape == (num_pairs, experts.hidden_size), out.shape
        assert only is None or only.shape == counts.shape, only
        failed = self._moe(
            torch.get_num_threads(),
            dtype_code(dtype),
            ctypes.addressof(arguments),
            pointer(counts, torch.int64),
            pointer_or_null(only, torch.uint8),
            pointer(hidden, dtype),
            pointer(row_of_pair, torch.int64),
            num_pairs,
            pointer(out, dtype),
        )
        if failed:
            raise MemoryError(f"no memory for the work space of {num_pairs} (token, expert) pairs")
        return out

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        gate_up = gate_up.contiguous()
        num_rows, width = gate_up.shape
        assert width % 2 == 0, "gate and up, side by side"
        dtype = gate_up.dtype
        out = empty(num_rows, width // 2, dtype=dtype)
        self._silu_and_mul(
            torch.get_num_threads(),
            dtype_code(dtype),
            pointer(gate_up, dtype),
            num_rows,
            width // 2,
            pointer(out, dtype),
        )
        return out
