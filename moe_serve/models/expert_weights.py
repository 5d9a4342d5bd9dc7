"""A model's expert weights on their way in: allocated as records, filled by a loader, packed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from moe_serve.errors import ConfigError
from moe_serve.experts.executor import ResidentExperts
from moe_serve.experts.profile import ProfileKeeper
from moe_serve.experts.recorder import RoutingRecorder
from moe_serve.experts.records import ExpertArena
from moe_serve.kernels.suite import Kernels
from moe_serve.models.spec import ModelSpec


def expert_names(layer: int) -> tuple[str, str]:
    """Return the names in `ModelSpec.weights` of a layer's gate_up and down of all experts."""
    return f"layers.{layer}.experts.gate_up", f"layers.{layer}.experts.down"


def moe_layers(spec: ModelSpec) -> tuple[int, ...]:
    """Return the layers that have experts."""
    return tuple(index for index, layer in enumerate(spec.layers) if layer.moe is not None)


def names_without_experts(spec: ModelSpec) -> frozenset[str]:
    """Return the names of all weights that are no expert's: what is held whatever is offloaded."""
    experts = {name for layer in moe_layers(spec) for name in expert_names(layer)}
    return frozenset(weight.name for weight in spec.weights) - experts


class ExpertWeights:
    """The arenas of all MoE layers of a model: one for each shape of experts, mostly one in all."""

    def __init__(
        self,
        spec: ModelSpec,
        dtype: torch.dtype,
        kernels: Kernels,
        slots_before: int = 0,
        held: Mapping[int, Sequence[int]] | None = None,
        spare_slots: int = 0,
        device: torch.device | None = None,
    ) -> None:
        """Allocate. Raises CapacityError where there is no memory.

        slots_before: slots of a cache, in front of each arena's records. held: by layer, the
        experts that are kept in this process, rising; None: all. spare_slots: see `ExpertArena`.
        device: where they are; None: where the kernels' tensors are.
        """
        self._kernels = kernels
        routers = [layer.moe.router for layer in spec.layers if layer.moe is not None]
        self._top_k = max((router.top_k for router in routers), default=0)
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
                slots_before,
                held,
                kernels.device if device is None else device,
                spare_slots,
            )
            for (num_experts, size), layers in layers_of_shape.items()
        ]

    def plain(self) -> dict[str, Tensor]:
        """Return the tensors that a loader must fill, by the names of `ModelSpec.weights`."""
        views: dict[str, Tensor] = {}
        for arena in self._arenas:
            for layer in arena.layers:
                views |= zip(expert_names(layer), arena.plain_weights(layer), strict=True)
        return views

    def plain_runs(self) -> Iterator[tuple[dict[str, Tensor], range]]:
        """Yield what `plain` returns in pieces of experts that follow one another, with these."""
        for arena in self._arenas:
            for layer in arena.layers:
                views = arena.plain_weights(layer)
                for first, run in _runs(arena.held[layer]):
                    parts = [view[first : first + len(run)] for view in views]
                    yield dict(zip(expert_names(layer), parts, strict=True)), run

    def pack(self) -> None:
        """Pack what was filled, in place; what `plain` returned means nothing from then on."""
        for arena in self._arenas:
            arena.pack(self._kernels.pack_records_, self._kernels.record_layout)

    def packed(
        self, recorder: RoutingRecorder | None = None, keeper: ProfileKeeper | None = None
    ) -> ResidentExperts:
        """Pack, and return experts that are all resident."""
        self.pack()
        arenas = {layer: arena for arena in self._arenas for layer in arena.layers}
        tables = {layer: arena.table(layer) for layer, arena in arenas.items()}
        return ResidentExperts(self._kernels.moe, tables, self._top_k, recorder, keeper, arenas)

    def only_arena(self) -> ExpertArena:
        """Return the arena of a model whose experts all have one shape.

        Raises ConfigError for another one: its records cannot share slots in host memory.
        """
        if len(self._arenas) != 1:
            raise ConfigError(
                f"the experts have {len(self._arenas)} shapes; behind an emulated link they must "
                "have one: leave emulate_link out"
            )
        return self._arenas[0]


def _runs(numbers: Sequence[int]) -> Iterator[tuple[int, range]]:
    """Yield runs of numbers that rise by one: the place of the first, and the run."""
    first = 0
    for place in range(1, len(numbers) + 1):
        if place == len(numbers) or numbers[place] != numbers[place - 1] + 1:
            yield first, range(numbers[first], numbers[place - 1] + 1)
            first = place
