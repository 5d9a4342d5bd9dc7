"""One rank of several, as an engine is built for it: who the others are, and what is whose."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from moe_serve import plugin
from moe_serve.comm._world import World
from moe_serve.config import RanksConfig
from moe_serve.errors import CapacityError, ConfigError
from moe_serve.experts.placement.base import (
    Array,
    Mesh,
    Placement,
    PlacementOptions,
    RoutingStats,
    room_of,
)
from moe_serve.experts.placement_file import read_placement
from moe_serve.kernels.exchange.base import MOST_EXPERTS
from moe_serve.models.expert_weights import moe_layers
from moe_serve.models.spec import ModelSpec

# strategies that need no trace
_WITHOUT_TRACE = ("contiguous", "round_robin")


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranks:
    """The ranks of a world, from one of them.

    num_here: how many are on this machine. agree: given what must be alike on all ranks, by name,
    raises CommError on all of them where it is not. wait_for_all: returns when all ranks have
    called it with the same word. generation: how many worlds there were before.
    """

    world: World
    mesh: Mesh
    num_here: int
    agree: Callable[[Mapping[str, str]], None]
    wait_for_all: Callable[[str], None]
    generation: int = 0


@dataclass(frozen=True, slots=True)
class Share:
    """What one rank holds of a placement. layers: the model's numbers of the MoE layers."""

    placement: Placement
    layers: tuple[int, ...]
    rank: int

    @property
    def held(self) -> dict[int, tuple[int, ...]]:
        """The experts of each layer, by the model's number, rising."""
        return {
            layer: tuple(self.placement.experts_of(self.rank, index))
            for index, layer in enumerate(self.layers)
        }

    @property
    def is_held(self) -> Array:
        """bool [num_layers, num_experts]."""
        held: Array = self.placement.holds()[:, :, self.rank]
        return held

    def own_file(self, path: Path) -> Path:
        """Return where this rank keeps what each rank writes."""
        return file_of_rank(path, self.rank)

    @property
    def most_held(self) -> int:
        return int(self.is_held.sum(axis=1).max())


def file_of_rank(path: Path, rank: int) -> Path:
    """Return the name that a rank's own file has: with the rank in it."""
    return path.with_name(f"{path.stem}-rank{rank}{path.suffix}")


def share_of(
    options: RanksConfig, spec: ModelSpec, mesh: Mesh, rank: int, model_id: str
) -> Share | None:
    """Return what `rank` holds by the options; None of a dense model.

    model_id: of this model, which a placement that names one must agree with. Raises ConfigError
    for a placement of other ranks or of another model, CapacityError for more ranks than experts.
    """
    layers = moe_layers(spec)
    if not layers:
        return None
    counts = {moe.router.num_experts for layer in spec.layers if (moe := layer.moe) is not None}
    if len(counts) > 1:
        raise ConfigError(
            f"the layers have {sorted(counts)} experts; only where all have as many can they be "
            "spread over ranks: run it in one process"
        )
    num_experts = counts.pop()
    if mesh.num_ranks > num_experts:
        raise CapacityError(
            f"{mesh.num_ranks} ranks for {num_experts} experts a layer: a rank would have none; "
            f"use at most {num_experts}"
        )
    if num_experts > MOST_EXPERTS:
        raise CapacityError(
            f"{num_experts} experts a layer; between ranks at most {MOST_EXPERTS} can be named"
        )
    if options.rebalance_slots is not None:
        room_of(mesh, num_experts, options.rebalance_slots)  # raises where that is too few or many
    if options.placement in _WITHOUT_TRACE:
        placement = _without_trace(options.placement, mesh, len(layers), num_experts)
    else:
        if not os.path.lexists(options.placement):
            raise ConfigError(
                f"placement is {options.placement!r}: there is no such file; give one of "
                f"`moe-serve place`, or {' or '.join(_WITHOUT_TRACE)}"
            )
        placement = read_placement(
            Path(options.placement), mesh, num_experts=num_experts, layer_ids=layers
        )
        own = _without_trace(_WITHOUT_TRACE[0], mesh, len(layers), num_experts)
        check_placement(options.placement, placement, replace(own, model_id=model_id))
    return Share(placement, layers, rank)


def _without_trace(name: str, mesh: Mesh, num_layers: int, num_experts: int) -> Placement:
    stats = RoutingStats(
        num_tokens=0,
        top_k=1,
        load=np.zeros((num_layers, num_experts)),
        coactivation=np.zeros((num_layers, num_experts, num_experts)),
        transitions=np.zeros((max(0, num_layers - 1), num_experts, num_experts)),
    )
    place = plugin.load("moe_serve.experts.placement", name).place
    placement: Placement = place(stats, mesh, None, PlacementOptions(), None)
    return placement


def check_placement(name: str, placement: Placement, like: Placement) -> None:
    """Raise ConfigError where a placement is not of the model and the ranks of another one.

    name: what the error calls it.
    """
    given = (placement.num_layers, placement.num_experts)
    shape = (like.num_layers, like.num_experts)
    if given != shape:
        raise ConfigError(
            f"{name}: a placement of {given[0]} layers of {given[1]} experts; this model has "
            f"{shape[0]} of {shape[1]}"
        )
    if placement.model_id is not None and placement.model_id != (
        like.model_id or placement.model_id
    ):
        raise ConfigError(
            f"{name}: a placement of another model ({placement.model_id}), not of this one "
            f"({like.model_id}); place a trace of this one"
        )
    num_ranks = like.mesh.num_ranks
    if placement.mesh.num_ranks != num_ranks:
        raise ConfigError(
            f"{name}: a placement on {placement.mesh.num_ranks} ranks, but there are {num_ranks}; "
            f"run `moe-serve place --ranks {num_ranks}`"
        )
