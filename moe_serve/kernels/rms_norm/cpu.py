"""Root-mean-square norm by the native library; numbers as in reference.py."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_serve.kernels.native.loader import Native
from moe_serve.kernels.native.pointers import dtype_code, pointer, pointer_or_null


class NormKernels:
    """`rms_norm` and `add_rms_norm`, as reference.py has them."""

    def __init__(self, native: Native) -> None:
        self._norm = native.function("add_rms_norm", "iipppllfpp")

    def rms_norm(self, rows: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self._run(rows.contiguous(), None, weight, eps)[0]

    def add_rms_norm(
        self, rows: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        assert rows.shape == residual.shape, (rows.shape, residual.shape)
        out, total = self._run(rows.contiguous(), residual.contiguous(), weight, eps)
        assert total is not None
        return out, total

    def _run(
        self, rows: Tensor, residual: Tensor | None, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor | None]:
        dtype, size = rows.dtype, rows.shape[-1]
        assert weight.shape == (size,), (weight.shape, size)
        out = torch.empty_like(rows)
        total = None if residual is None else torch.empty_like(rows)
        self._norm(
            torch.get_num_threads(),
            dtype_code(dtype),
            pointer(rows, dtype),
            pointer_or_null(residual, dtype),
            pointer(weight, dtype),
            rows.shape[:-1].numel(),
            size,
            eps,
            pointer(out, dtype),
            pointer_or_null(total, dtype),
        )
        return out, total
