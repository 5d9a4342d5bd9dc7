"""Experts in blocks: the first to rank 0, and so on. What most systems do."""

from __future__ import annotations

import numpy as np

from moe_serve.experts.placement.base import (
    Mesh,
    Placement,
    PlacementOptions,
    RoutingStats,
    blocks,
    from_owners,
    without_replicas,
)


def place(
    stats: RoutingStats,
    mesh: Mesh,
    slots_per_rank: int | None,
    options: PlacementOptions,
    current: Placement | None = None,
) -> Placement:
    """See `base`. Only the numbers of layers and experts are looked at."""
    room = without_replicas(mesh, stats.num_experts, slots_per_rank)
    layer = blocks(room, stats.num_experts)
    return from_owners(mesh, np.tile(layer, (stats.num_layers, 1)), "contiguous")
