"""Replicate what is hot, and pack: DeepSeek's expert-parallel load balancer, with its gaps closed.

A slot more goes to the expert with the most load a replica, until all slots are given; then slots
are packed by load (github.com/deepseek-ai/EPLB). Hierarchical where `groups` divide by the nodes:
groups of experts are packed onto nodes, replicas are made inside a node, and packed onto its ranks.
Other than there no rank gets the same expert twice, and neither experts nor groups need divide.
"""

from __future__ import annotations

import numpy as np

from moe_serve.errors import ConfigError
from moe_serve.experts.placement._pack import pack
from moe_serve.experts.placement.base import (
    Array,
    Mesh,
    Placement,
    PlacementOptions,
    RoutingStats,
    from_holds,
    room_of,
)


def place(
    stats: RoutingStats,
    mesh: Mesh,
    slots_per_rank: int | None,
    options: PlacementOptions,
    current: Placement | None = None,
) -> Placement:
    """See `base`. Raises ConfigError for groups that do not divide the experts."""
    room = room_of(mesh, stats.num_experts, slots_per_rank)
    if options.groups and stats.num_experts % options.groups:
        raise ConfigError(
            f"{stats.num_experts} experts cannot be in {options.groups} groups of one size"
        )
    is_hierarchical = options.groups and mesh.num_nodes > 1 and options.groups % mesh.num_nodes == 0
    holds = np.zeros((stats.num_layers, stats.num_experts, mesh.num_ranks), bool)
    for layer, load in enumerate(stats.load):
        if is_hierarchical:
            _by_node(load, mesh, room, options, holds[layer])
        else:
            _spread(load, room, options.bias, holds[layer])
    return from_holds(mesh, holds, "eplb")


def replicate(load: Array, num_slots: int, most: int, bias: int = 0) -> Array:
    """Return how many replicas each expert gets, int64 [num_experts], `num_slots` in all if it can.

    A slot at a time goes to the highest load a replica (of equals the lower expert), at most `most`
    of one expert: more would meet on a rank. bias: this many of the hottest get `most` first.
    """
    counts = np.ones(len(load), np.int64)
    for expert in np.argsort(-load, kind="stable")[:bias].tolist():
        counts[expert] = min(most, 1 + num_slots - int(counts.sum()))
    share = load / counts
    share[counts >= most] = -1.0
    for _ in range(num_slots - int(counts.sum())):
        expert = int(share.argmax())
        if share[expert] < 0:
            break
        counts[expert] += 1
        share[expert] = load[expert] / counts[expert] if counts[expert] < most else -1.0
    return counts


def _spread(load: Array, room: list[int], bias: int, holds: Array) -> None:
    """Replicate and pack one layer onto ranks. holds: bool [num_experts, num_ranks], filled."""
    counts = replicate(load, sum(room), len(room), bias)
    experts = np.repeat(np.arange(len(load)), counts)
    ranks = pack(load[experts] / counts[experts], room, experts.tolist())
    holds[experts, ranks] = True


def _by_node(
    load: Array, mesh: Mesh, room: list[int], options: PlacementOptions, holds: Array
) -> None:
    size = len(load) // options.groups
    groups = load.reshape(options.groups, size)
    nodes = pack(groups.sum(axis=1), [options.groups // mesh.num_nodes] * mesh.num_nodes)
    for node in range(mesh.num_nodes):
        experts = (np.flatnonzero(nodes == node)[:, None] * size + np.arange(size)).ravel()
        first = node * mesh.ranks_per_node
        ranks = slice(first, first + mesh.ranks_per_node)
        inside = np.zeros((len(experts), mesh.ranks_per_node), bool)
        _spread(load[experts], room[ranks], options.bias, inside)
        holds[experts, ranks] = inside
