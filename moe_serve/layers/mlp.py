"""A dense gated MLP: what a layer without experts has, and what a shared expert is."""

from __future__ import annotations

from torch import Tensor

from moe_serve.kernels.suite import Kernels
from moe_serve.layers.linear import Linear


class GatedMlp:
    """down(silu(gate(x)) * up(x)), gate and up in one product."""

    def __init__(self, kernels: Kernels, gate_up: Linear, down: Linear) -> None:
        self._silu_and_mul = kernels.silu_and_mul
        self.gate_up = gate_up
        self.down = down

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return [num_tokens, hidden_size], like `hidden`."""
        return self.down(self._silu_and_mul(self.gate_up(hidden)))
