"""Experts that follow one another on one rank: for layouts in which tokens do not return home.

ExFlow (arXiv 2401.08383): of all hops from a layer to the next, as many as can be stay on their
rank. There a solver of integer programs; here each layer is placed exactly, given its neighbours
(a transport problem), forward once, then in sweeps both ways while anything is gained, from several
starts. With several nodes first the nodes are filled, then the ranks of each. Where tokens return
home after every layer, as in this runtime's exchanges, it has no effect.
"""

from __future__ import annotations

import numpy as np

from moe_serve.experts.placement._transport import assign
from moe_serve.experts.placement.base import (
    Array,
    Mesh,
    Placement,
    PlacementOptions,
    RoutingStats,
    blocks,
    from_owners,
    without_replicas,
)

_MOST_SWEEPS = 20
# Small cases have few good basins and take a millisecond each: they get more starts, up to so many
# times as many, while experts ** 2 * layers * starts stays below this.
_MOST_TIMES, _CHEAP = 32, 40_000


def place(
    stats: RoutingStats,
    mesh: Mesh,
    slots_per_rank: int | None,
    options: PlacementOptions,
    current: Placement | None = None,
) -> Placement:
    """See `base`."""
    room = without_replicas(mesh, stats.num_experts, slots_per_rank)
    hops = stats.transitions
    if mesh.num_nodes == 1:
        owners = solve(hops, room, options.restarts, options.seed)
        return from_owners(mesh, owners, "affinity")
    size = mesh.ranks_per_node
    of_nodes = [sum(room[node * size : (node + 1) * size]) for node in range(mesh.num_nodes)]
    nodes = solve(hops, of_nodes, options.restarts, options.seed)
    owners = np.empty_like(nodes)
    for node in range(mesh.num_nodes):
        inside = room[node * size : (node + 1) * size]
        members = [np.flatnonzero(layer == node) for layer in nodes]
        parts = [hop[np.ix_(members[layer], members[layer + 1])] for layer, hop in enumerate(hops)]
        found = solve(parts, inside, options.restarts, options.seed, sum(inside))
        for layer, experts in enumerate(members):
            owners[layer, experts] = node * size + found[layer]
    return from_owners(mesh, owners, "affinity")


def solve(
    hops: Array | list[Array], room: list[int], restarts: int, seed: int,
    num_experts: int | None = None,
) -> Array:  # fmt: skip
    """Return owners, int64 [num_layers, num_experts], with as many hops inside ranks as was found.

    hops: [num_experts, num_experts] for each layer but the last. restarts: random starts; small
    cases get more.
    """
    if num_experts is None:
        num_experts = hops[0].shape[0] if len(hops) else sum(room)
    source = np.random.default_rng(seed)
    first = blocks(room, num_experts)
    best: tuple[float, Array] | None = None
    size = max(1, num_experts**2 * (len(hops) + 1))
    num_starts = 1 + restarts * min(_MOST_TIMES, max(1, _CHEAP // size))
    for attempt in range(num_starts):
        start = first if attempt == 0 else first[source.permutation(num_experts)]
        owners = _sweep(hops, _forward(hops, start, room), room)
        inside = stays(hops, owners)
        if best is None or inside > best[0] + 1e-12:
            best = inside, owners
    assert best is not None
    return best[1]


def stays(hops: Array | list[Array], owners: Array) -> float:
    """Return the sum of the hops that stay on their rank."""
    return sum(
        float(hop[owners[layer][:, None] == owners[layer + 1][None, :]].sum())
        for layer, hop in enumerate(hops)
    )


def _forward(hops: Array | list[Array], start: Array, room: list[int]) -> Array:
    owners = [start]
    for hop in hops:
        owners.append(assign(hop.T @ _members(owners[-1], len(room)), room))
    return np.array(owners)


def _sweep(hops: Array | list[Array], owners: Array, room: list[int]) -> Array:
    """Place each layer anew, given its neighbours, until a round over all gains nothing."""
    owners = owners.copy()
    inside = stays(hops, owners)
    last = len(owners) - 1
    for sweep in range(_MOST_SWEEPS):
        order = range(last + 1) if sweep % 2 else range(last, -1, -1)
        for layer in order:
            gain = np.zeros((owners.shape[1], len(room)))
            if layer > 0:
                gain += hops[layer - 1].T @ _members(owners[layer - 1], len(room))
            if layer < last:
                gain += hops[layer] @ _members(owners[layer + 1], len(room))
            owners[layer] = assign(gain, room, owners[layer])
        now = stays(hops, owners)
        if now <= inside + 1e-9 * max(1.0, inside):
            break
        inside = now
    return owners


def _members(owners: Array, num_ranks: int) -> Array:
    member = np.zeros((len(owners), num_ranks))
    member[np.arange(len(owners)), owners] = 1.0
    return member
