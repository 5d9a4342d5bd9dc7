"""Experts' MLPs by the native library; numbers as in reference.py."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from moe_serve.kernels.moe.base import ExpertTable
from moe_serve.kernels.native.library import DTYPE_CODES, Native

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
            experts.records.data_ptr(),
            experts.records.shape[1],
            experts.slot_of_expert.data_ptr(),
            experts.uses.data_ptr(),
            experts.num_experts,
            experts.hidden_size,
            experts.intermediate_size,
        )


class MoeKernels:
    """`record_bytes`, `pack_records_`, `moe` and `silu_and_mul`, as reference.py has them."""

    def __init__(self, native: Native) -> None:
        self._record_bytes = native.function("record_bytes", "ill", "l")
        self._pack_records = native.function("pack_records", "iipllll")
        self._moe = native.function("moe", "iipppplp", "i")
        self._silu_and_mul = native.function("silu_and_mul", "iipllp")

    def record_bytes(self, hidden_size: int, intermediate_size: int, dtype: torch.dtype) -> int:
        return int(self._record_bytes(DTYPE_CODES[dtype], hidden_size, intermediate_size))

    def pack_records_(
        self, records: Tensor, hidden_size: int, intermediate_size: int, dtype: torch.dtype
    ) -> None:
        self._pack_records(
            torch.get_num_threads(),
            DTYPE_CODES[dtype],
            records.data_ptr(),
            records.shape[1],
            records.shape[0],
            hidden_size,
            intermediate_size,
        )

    def moe(
        self, hidden: Tensor, row_of_pair: Tensor, counts: Tensor, experts: ExpertTable
    ) -> Tensor:
        hidden = hidden.contiguous()
        num_pairs = row_of_pair.shape[0]
        arguments = ExpertTableArguments.of(experts)
        out = torch.empty(num_pairs, hidden.shape[1], dtype=hidden.dtype)
        failed = self._moe(
            torch.get_num_threads(),
            DTYPE_CODES[hidden.dtype],
            ctypes.addressof(arguments),
            counts.data_ptr(),
            hidden.data_ptr(),
            row_of_pair.data_ptr(),
            num_pairs,
            out.data_ptr(),
        )
        if failed:
            raise MemoryError(f"no memory for the work space of {num_pairs} (token, expert) pairs")
        return out

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        gate_up = gate_up.contiguous()
        num_rows, width = gate_up.shape
        out = torch.empty(num_rows, width // 2, dtype=gate_up.dtype)
        self._silu_and_mul(
            torch.get_num_threads(),
            DTYPE_CODES[gate_up.dtype],
            gate_up.data_ptr(),
            num_rows,
            width // 2,
            out.data_ptr(),
        )
        return out
