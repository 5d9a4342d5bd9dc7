"""Expert records filled and packed from plain weights, as a loader and the kernels do it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_serve.experts.records import ExpertArena
from moe_serve.kernels.moe.base import ExpertTable
from moe_serve.kernels.suite import Kernels


def arena(kernels: Kernels, layers: Sequence[int], gate_up: Tensor, down: Tensor) -> ExpertArena:
    """Return records of as many layers, packed.

    gate_up: [num_layers, num_experts, 2 * intermediate_size, hidden_size]; down: [num_layers,
    num_experts, hidden_size, intermediate_size].
    """
    _, num_experts, hidden_size, intermediate_size = down.shape
    record_bytes = kernels.record_bytes(hidden_size, intermediate_size, down.dtype)
    made = ExpertArena(
        layers, num_experts, hidden_size, intermediate_size, down.dtype, record_bytes
    )
    for index, layer in enumerate(layers):
        plain_gate_up, plain_down = made.plain_weights(layer)
        plain_gate_up.copy_(gate_up[index])
        plain_down.copy_(down[index])
    made.pack(kernels.pack_records_, kernels.record_layout)
    return made


def table(kernels: Kernels, gate_up: Tensor, down: Tensor) -> ExpertTable:
    """Return one layer's experts; gate_up, down: as above, without the first dimension."""
    return arena(kernels, [0], gate_up[None], down[None]).table(0)


def random_experts(
    num_experts: int, hidden_size: int, intermediate_size: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return gate_up and down of one layer, of a size that keeps rows as large as they are."""
    torch.manual_seed(0)
    gate_up = torch.randn(num_experts, 2 * intermediate_size, hidden_size) * hidden_size**-0.5
    down = torch.randn(num_experts, hidden_size, intermediate_size) * intermediate_size**-0.5
    return gate_up.to(dtype), down.to(dtype)
