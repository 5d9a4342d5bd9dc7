"""Linear layers by the native library; numbers as in reference.py."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_serve.kernels.native.loader import Native
from moe_serve.kernels.native.memory import allocate
from moe_serve.kernels.native.pointers import dtype_code, empty, pointer, pointer_or_null


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
        code = dtype_code(weight.dtype)
        out_features, in_features = weight.shape
        count = self._packed_elements(code, out_features, in_features)
        data = allocate(count * weight.dtype.itemsize).view(weight.dtype)
        plain = weight.contiguous()
        threads = torch.get_num_threads()
        self._pack(
            threads,
            code,
            pointer(plain, data.dtype),
            out_features,
            in_features,
            pointer(data, data.dtype),
        )
        return PackedWeight(data, out_features, in_features)

    def linear(self, rows: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
        num_rows, in_features = rows.shape
        assert in_features == weight.in_features, (rows.shape, weight.in_features)
        dtype = weight.data.dtype
        is_router = rows.dtype == torch.bfloat16 and dtype == torch.float32
        if not is_router:
            rows = rows.to(dtype)
        rows = rows.contiguous()
        bias = None if bias is None else bias.to(dtype).contiguous()
        out = empty(num_rows, weight.out_features, dtype=dtype)
        function = self._router_linear if is_router else self._linear
        function(
            torch.get_num_threads(),
            dtype_code(rows.dtype),
            pointer(rows, rows.dtype),
            num_rows,
            in_features,
            pointer(weight.data, dtype),
            weight.out_features,
            pointer_or_null(bias, dtype),
            pointer(out, dtype),
        )
        return out

    def gather(self, weight: PackedWeight, ids: Tensor) -> Tensor:
        ids = ids.contiguous()
        num_ids, dtype = ids.shape[0], weight.data.dtype
        if num_ids and not 0 <= int(ids.min()) <= int(ids.max()) < weight.out_features:
            raise IndexError(f"ids from {int(ids.min())} to {int(ids.max())}: not all are rows")
        out = empty(num_ids, weight.in_features, dtype=dtype)
        self._gather(
            torch.get_num_threads(),
            dtype_code(dtype),
            pointer(weight.data, dtype),
            weight.in_features,
            pointer(ids, torch.int64),
            num_ids,
            pointer(out, dtype),
        )
        return out
