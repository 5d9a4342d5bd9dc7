"""Root-mean-square norm by the native library; numbers as in reference.py."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_serve.kernels.native.library import DTYPE_CODES, Native


class NormKernels:
    """`rms_norm` and `add_rms_norm`, as reference.py has them, for rows [num_rows, size]."""

    def __init__(self, native: Native) -> None:
        self._norm = native.function("add_rms_norm", "iipppllfpp")

    def rms_norm(self, rows: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows = rows.contiguous()
        out = torch.empty_like(rows)
        self._norm(
            torch.get_num_threads(),
            DTYPE_CODES[rows.dtype],
            rows.data_ptr(),
            None,
            weight.data_ptr(),
            rows.shape[0],
            rows.shape[1],
            eps,
            out.data_ptr(),
            None,
        )
        return out

    def add_rms_norm(
        self, rows: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        rows, residual = rows.contiguous(), residual.contiguous()
        out, total = torch.empty_like(rows), torch.empty_like(rows)
        self._norm(
            torch.get_num_threads(),
            DTYPE_CODES[rows.dtype],
            rows.data_ptr(),
            residual.data_ptr(),
            weight.data_ptr(),
            rows.shape[0],
            rows.shape[1],
            eps,
            out.data_ptr(),
            total.data_ptr(),
        )
        return out, total
