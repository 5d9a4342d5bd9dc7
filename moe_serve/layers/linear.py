"""A weight, packed once for the kernel that multiplies with it."""

from __future__ import annotations

from torch import Tensor

from moe_serve.kernels.suite import Kernels


class Linear:
    """rows @ weight.T + bias; weight [out_features, in_features], bias [out_features] or None."""

    def __init__(self, kernels: Kernels, weight: Tensor, bias: Tensor | None = None) -> None:
        self._linear = kernels.linear
        self._weight = kernels.pack(weight)
        self._bias = bias

    def __call__(self, rows: Tensor) -> Tensor:
        """Return [num_rows, out_features] for rows [num_rows, in_features]."""
        return self._linear(rows, self._weight, self._bias)
