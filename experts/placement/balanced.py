"""As even as can be by load, no replicas; experts that are busy together are kept apart.

Huang et al. (arXiv 2303.06182, section on load balancing) place greedily by historical load, and in
a variant so that loads that move together do not meet on one rank. Here the greedy choice takes,
of the ranks whose load is within a tenth of a mean slot of the lightest, the one whose experts are
least used by the same tokens.
"""

from __future__ import annotations

import numpy as np

from moe_serve.experts.placement.base import (
    Array,
    Mesh,
    Placement,
    PlacementOptions,
    RoutingStats,
    from_owners,
    without_replicas,
)

_ALIKE = 0.1  # of an expert's mean load: ranks nearer than this to the lightest are as good


def place(
    stats: RoutingStats,
    mesh: Mesh,
    slots_per_rank: int | None,
    options: PlacementOptions,
    current: Placement | None = None,
) -> Placement:
    """See `base`."""
    room = without_replicas(mesh, stats.num_experts, slots_per_rank)
    owners = [
        _layer(load, together, room)
        for load, together in zip(stats.load, stats.coactivation, strict=True)
    ]
    return from_owners(mesh, np.array(owners), "balanced")


def _layer(load: Array, together: Array, room: list[int]) -> Array:
    left = np.array(room)
    loads = np.zeros(len(room))
    met = np.zeros((len(load), len(room)))  # how often an expert meets those of a rank
    owners = np.empty(len(load), np.int64)
    slack = _ALIKE * load.mean()
    for expert in np.argsort(-load, kind="stable").tolist():
        reached = np.where(left > 0, loads, np.inf)
        alike = np.flatnonzero(reached <= reached.min() + slack)
        rank = int(alike[np.lexsort((alike, reached[alike], met[expert, alike]))[0]])
        owners[expert] = rank
        loads[rank] += load[expert]
        left[rank] -= 1
        met[:, rank] += together[:, expert]
    return owners
