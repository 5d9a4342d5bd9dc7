"""A weight, packed once for the kernel that multiplies with it."""

from __future__ import annotations

from torch import Tensor

from moe_serve.kernels.forward.base import LinearPart
from moe_serve.kernels.suite import Kernels


class Linear:
    """rows @ weight.T + bias; weight [out_features, in_features], bias [out_features] or None.

    weight is packed as the kernels want it, the one that was given is not kept.
    """

    def __init__(self, kernels: Kernels, weight: Tensor, bias: Tensor | None = None) -> None:
        self._linear = kernels.linear
        self._gather = kernels.gather
        self.weight = kernels.pack(weight)
        self.bias = bias

    def __call__(self, rows: Tensor) -> Tensor:
        """Return [num_rows, out_features], in the weight's dtype; rows: [num_rows, in_features]."""
        return self._linear(rows, self.weight, self.bias)

    def rows(self, ids: Tensor) -> Tensor:
        """Return rows of the weight, [num_ids, in_features]: an embedding tied to this head."""
        return self._gather(self.weight, ids)

    def part(self) -> LinearPart:
        """Return this layer as the fused forward pass takes it."""
        return LinearPart(weight=self.weight, bias=self.bias)
