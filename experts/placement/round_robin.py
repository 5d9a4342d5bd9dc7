"""Expert e on rank e mod ranks: neighbours, which are often alike, apart."""

from __future__ import annotations

import numpy as np

from moe_serve.experts.placement.base import (
    Mesh,
    Placement,
    PlacementOptions,
    RoutingStats,
    from_owners,
    room_of,
)


def place(
    stats: RoutingStats,
    mesh: Mesh,
    slots_per_rank: int | None,
    options: PlacementOptions,
    current: Placement | None = None,
) -> Placement:
    """See `base`. Only the numbers of layers and experts are looked at."""
    room_of(mesh, stats.num_experts, slots_per_rank)  # is there room at all
    layer = np.arange(stats.num_experts) % mesh.num_ranks
    return from_owners(mesh, np.tile(layer, (stats.num_layers, 1)), "round_robin")
