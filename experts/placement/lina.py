"""Replicas in proportion to how popular an expert is expected to be, by the path of the tokens.

Lina's inference side (arXiv 2210.17223): what a token used in the layers before tells what it will
use. Popularity here is the expectation over the paths of the statistics: the distribution of a
layer's experts given the expert of the layer before, weighed by how often that one was used of
late. Popular experts get a number of slots in proportion, unpopular ones share what is left; both
are packed by expected load.
"""

from __future__ import annotations

import numpy as np

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

_RECENT = 0.25  # of the tokens, the last ones, say how popular the layer before is


def place(
    stats: RoutingStats,
    mesh: Mesh,
    slots_per_rank: int | None,
    options: PlacementOptions,
    current: Placement | None = None,
) -> Placement:
    """See `base`."""
    room = room_of(mesh, stats.num_experts, slots_per_rank)
    holds = np.zeros((stats.num_layers, stats.num_experts, mesh.num_ranks), bool)
    for layer in range(stats.num_layers):
        load = expected_load(stats, layer)
        counts = in_proportion(load, sum(room), mesh.num_ranks)
        experts = np.repeat(np.arange(len(load)), counts)
        ranks = pack(load[experts] / counts[experts], room, experts.tolist())
        holds[layer, experts, ranks] = True
    return from_holds(mesh, holds, "lina")


def expected_load(stats: RoutingStats, layer: int) -> Array:
    """Return float64 [num_experts], how often each expert is expected to be used."""
    if layer == 0 or stats.ids is None:
        own: Array = stats.load[layer]
        return own
    recent = stats.ids[-max(1, int(_RECENT * len(stats.ids))) :, layer - 1]
    before = np.bincount(recent.ravel(), minlength=stats.num_experts).astype(float)
    hops = stats.transitions[layer - 1]
    totals = hops.sum(axis=1, keepdims=True)
    following = np.divide(hops, totals, out=np.zeros_like(hops), where=totals > 0)
    expected = before @ following
    scaled: Array = expected * (stats.load[layer].sum() / max(float(expected.sum()), 1e-12))
    return scaled


def in_proportion(load: Array, num_slots: int, most: int) -> Array:
    """Return replicas in proportion to load, each expert one at least and `most` at most."""
    share = load / max(float(load.sum()), 1e-12) * num_slots
    counts = np.clip(np.floor(share), 1, most).astype(np.int64)
    while counts.sum() > num_slots:  # those with the least load a replica give way
        shrunk = np.where(counts > 1, load / counts, np.inf)
        counts[int(shrunk.argmin())] -= 1
    while counts.sum() < num_slots and (counts < most).any():
        counts[int(np.where(counts < most, load / counts, -1.0).argmax())] += 1
    return counts
