"""Linear layers by the native library; numbers as in reference.py."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_serve.kernels.native.library import DTYPE_CODES, Native
from moe_serve.kernels.native.memory import allocate


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight [out_features, in_features] in the tiles that native/gemm.h describes."""

    data: Tensor
    out_features: int
    in_features: int


class LinearKernels:
    """`pack`, `linear` and `gather`, as reference.py has them."""

    def __init__(self, native: Native) -> None:
        self._packed_elements = native.function("packed_elements", "ill", "l")
        self._pack = native.function("pack_linear", "iipllp")
        self._gather = native.function("gather_packed", "iiplplp")
        self._linear = native.function("linear", "iipllplpp")
        self._router_linear = native.function("router_linear", "iipllplpp")

    def pack(self, weight: Tensor) -> PackedWeight:
        """Return a packed copy of `weight`, [out_features, in_features]."""
        code = DTYPE_CODES[weight.dtype]
        out_features, in_features = weight.shape
        count = self._packed_elements(code, out_features, in_features)
        data = allocate(count * weight.dtype.itemsize).view(weight.dtype)
        plain = weight.contiguous()
        threads = torch.get_num_threads()
        self._pack(threads, code, plain.data_ptr(), out_features, in_features, data.data_ptr())
        return PackedWeight(data, out_features, in_features)

    def linear(self, rows: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
        num_rows, in_features = rows.shape
        assert in_features == weight.in_features, (rows.shape, weight.in_features)
        rows = rows.contiguous()
        out = torch.empty(num_rows, weight.out_features, dtype=weight.data.dtype)
        # rows of bfloat16 and a weight of float32 have a function of their own
        function = self._linear if rows.dtype == weight.data.dtype else self._router_linear
        function(
            torch.get_num_threads(),
            DTYPE_CODES[rows.dtype],
            rows.data_ptr(),
            num_rows,
            in_features,
            weight.data.data_ptr(),
            weight.out_features,
            None if bias is None else bias.data_ptr(),
            out.data_ptr(),
        )
        return out

    def gather(self, weight: PackedWeight, ids: Tensor) -> Tensor:
        ids = ids.contiguous()
        out = torch.empty(ids.shape[0], weight.in_features, dtype=weight.data.dtype)
        self._gather(
            torch.get_num_threads(),
            DTYPE_CODES[out.dtype],
            weight.data.data_ptr(),
            weight.in_features,
            ids.data_ptr(),
            ids.shape[0],
            out.data_ptr(),
        )
        return out
