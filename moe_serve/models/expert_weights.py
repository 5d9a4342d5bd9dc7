"""A model's expert weights on their way in: allocated as records, filled by a loader, packed."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_serve.experts.executor import ResidentExperts
from moe_serve.experts.records import ExpertArena
from moe_serve.kernels.suite import Kernels
from moe_serve.models.spec import ModelSpec


class ExpertWeights:
    """The arenas of all MoE layers of a model: one for each shape of experts, mostly one in all."""

    def __init__(self, spec: ModelSpec, dtype: torch.dtype, kernels: Kernels) -> None:
        """Allocate. Raises CapacityError where there is no memory."""
        self._kernels = kernels
        layers_of_shape: dict[tuple[int, int], list[int]] = {}
        for index, layer in enumerate(spec.layers):
            if layer.moe is not None:
                shape = (layer.moe.router.num_experts, layer.moe.intermediate_size)
                layers_of_shape.setdefault(shape, []).append(index)
        self._arenas = [
            ExpertArena(
                layers,
                num_experts,
                spec.hidden_size,
                size,
                dtype,
                kernels.record_bytes(spec.hidden_size, size, dtype),
            )
            for (num_experts, size), layers in layers_of_shape.items()
        ]

    def plain(self) -> dict[str, Tensor]:
        """Return the tensors that a loader must fill, by the names of `ModelSpec.weights`."""
        views: dict[str, Tensor] = {}
        for arena in self._arenas:
            for layer in arena.layers:
                gate_up, down = arena.plain_weights(layer)
                views[f"layers.{layer}.experts.gate_up"] = gate_up
                views[f"layers.{layer}.experts.down"] = down
        return views

    def packed(self) -> ResidentExperts:
        """Pack what was filled, in place; what `plain` returned means nothing from then on."""
        for arena in self._arenas:
            arena.pack(self._kernels.pack_records_, self._kernels.record_layout)
        tables = {layer: arena.table(layer) for arena in self._arenas for layer in arena.layers}
        return ResidentExperts(self._kernels.moe, tables)
