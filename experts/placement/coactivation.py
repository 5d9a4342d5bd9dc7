"""Fewest ranks a token: experts that are used together are kept together, whatever the load.

What an exchange costs where tokens return home is how many ranks each token visits. The result is
uneven by design: `joint` weighs both.
"""

from __future__ import annotations

from dataclasses import replace

from moe_serve.experts.placement import joint
from moe_serve.experts.placement.base import Mesh, Placement, PlacementOptions, RoutingStats


def place(
    stats: RoutingStats,
    mesh: Mesh,
    slots_per_rank: int | None,
    options: PlacementOptions,
    current: Placement | None = None,
) -> Placement:
    """See `base`."""
    free = replace(options, balance=0.0, most_imbalance=float("inf"))
    placement = joint.place(stats, mesh, slots_per_rank, free, current)
    return replace(placement, strategy="coactivation")
